//! `/etc/caisson/config.toml`, its drop-ins, and the annotations of a pod.
//!
//! Every setting is one row of [`KEYS`]: its name, what it means with unit and limits, and how a
//! value is read into [`Config`]. Files, annotations, `caisson config` and the error messages all
//! work on that table, so they cannot disagree.
//!
//! A pod's annotation `io.caisson.<key>` sets `<key>` for that pod when `annotations.allowed`
//! lists the key.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::fs::CachePolicy;
use crate::vmm::{MEMORY_MIB, VCPUS};

/// Where the configuration lies; drop-ins are `/etc/caisson/config.toml.d/*.toml` in sorted order.
pub const PATH: &str = "/etc/caisson/config.toml";
/// What the name of an annotation begins with.
pub const ANNOTATION_PREFIX: &str = "io.caisson.";

/// The effective configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// See [`KEYS`] for each of these.
    pub run_dir: PathBuf,
    /// Guest kernel, an ELF `vmlinux`.
    pub kernel_path: PathBuf,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// Serial console of the guest, to the shim's log.
    pub kernel_console: bool,
    /// Initramfs with the agent.
    pub initramfs_path: PathBuf,
    /// vCPUs of a pod.
    pub vcpus: u32,
    /// Memory of a pod in MiB.
    pub memory_mib: u64,
    /// The VMM's program.
    pub vmm_path: PathBuf,
    /// First user id for VMMs.
    pub uid_base: u32,
    /// Number of user ids for VMMs.
    pub uid_count: u32,
    /// The virtio-fs server's program.
    pub fs_path: PathBuf,
    /// What the guest may cache.
    pub fs_cache: CachePolicy,
    /// Worker threads of the virtio-fs server.
    pub fs_threads: u32,
    /// From the VMM's start to the agent's answer, in milliseconds.
    pub boot_timeout_ms: u32,
    /// For one call to the agent, in milliseconds.
    pub agent_timeout_ms: u32,
    /// Between health checks, in milliseconds.
    pub health_interval_ms: u32,
    /// For a stream without progress when its process is deleted, in milliseconds.
    pub drain_timeout_ms: u32,
    /// Which messages the shim logs.
    pub log_level: String,
    /// Keys that annotations may set.
    pub annotations_allowed: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/caisson".into(),
            kernel_path: "/usr/share/caisson/vmlinux".into(),
            kernel_args: String::new(),
            kernel_console: false,
            initramfs_path: "/usr/share/caisson/initramfs".into(),
            vcpus: 1,
            memory_mib: 256,
            vmm_path: "/usr/libexec/caisson/caisson-vmm".into(),
            uid_base: 1_500_000_000,
            uid_count: 65_536,
            fs_path: "/usr/libexec/caisson/caisson-fs".into(),
            fs_cache: CachePolicy::Auto,
            fs_threads: 0,
            boot_timeout_ms: 30_000,
            agent_timeout_ms: 30_000,
            health_interval_ms: 10_000,
            drain_timeout_ms: 10_000,
            log_level: "info".into(),
            annotations_allowed: vec!["vm.vcpus".into(), "vm.memory_mib".into()],
        }
    }
}

/// A value as it stands in a file or an annotation.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Integer(i64),
    Bool(bool),
    Text(String),
    List(Vec<String>),
}

/// One setting.
pub struct Key {
    /// Section and name: `vm.vcpus`.
    pub name: &'static str,
    /// What it means, with its unit.
    pub meaning: &'static str,
    /// What is allowed, as it stands in error messages.
    pub allowed: &'static str,
    set: fn(&mut Config, Value) -> Option<()>,
    show: fn(&Config) -> String,
}

/// Reads a whole number within limits, also from an annotation's text.
fn integer<T: TryFrom<i64>>(value: &Value, min: i64, max: i64) -> Option<T> {
    let number = match value {
        Value::Integer(number) => *number,
        Value::Text(text) => text.parse().ok()?,
        Value::Bool(_) | Value::List(_) => return None,
    };
    (min..=max).contains(&number).then(|| T::try_from(number).ok())?
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Text(text) => text.parse().ok(),
        Value::Integer(_) | Value::List(_) => None,
    }
}

fn absolute(value: Value) -> Option<PathBuf> {
    match value {
        Value::Text(text) if text.starts_with('/') && text.len() < 4096 && !text.contains('\0') => Some(text.into()),
        _ => None,
    }
}

fn text(value: Value, allowed: impl Fn(&str) -> bool) -> Option<String> {
    match value {
        Value::Text(text) if allowed(&text) => Some(text),
        _ => None,
    }
}

fn quoted(text: impl std::fmt::Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

const PATH_ALLOWED: &str = "an absolute path";
const TIMEOUT_ALLOWED: &str = "100 to 3600000";

macro_rules! key {
    ($name:literal, $meaning:literal, $allowed:expr, |$config:ident, $value:ident| $set:expr, |$shown:ident| $show:expr) => {
        Key {
            name: $name,
            meaning: $meaning,
            allowed: $allowed,
            set: |$config, $value| {
                $set;
                Some(())
            },
            show: |$shown| $show,
        }
    };
}

/// Every setting there is.
pub const KEYS: &[Key] = &[
    key!("run.dir", "folder for the records and sockets of running pods", PATH_ALLOWED, |c, v| c.run_dir = absolute(v)?, |c| quoted(
        c.run_dir.display()
    )),
    key!("kernel.path", "guest kernel, an ELF vmlinux", PATH_ALLOWED, |c, v| c.kernel_path = absolute(v)?, |c| quoted(
        c.kernel_path.display()
    )),
    key!(
        "kernel.args",
        "added to the guest kernel's command line",
        "up to 512 printable ASCII characters",
        |c, v| c.kernel_args = text(v, |t| t.len() <= 512 && t.chars().all(|ch| (' '..='~').contains(&ch)))?,
        |c| quoted(&c.kernel_args)
    ),
    key!(
        "kernel.console",
        "serial console of the guest, written to the shim's log",
        "true or false",
        |c, v| c.kernel_console = boolean(&v)?,
        |c| c.kernel_console.to_string()
    ),
    key!("image.initramfs", "initramfs that holds the agent", PATH_ALLOWED, |c, v| c.initramfs_path = absolute(v)?, |c| quoted(
        c.initramfs_path.display()
    )),
    key!("vm.vcpus", "vCPUs of a pod", "1 to 32", |c, v| c.vcpus = integer(&v, i64::from(*VCPUS.start()), i64::from(*VCPUS.end()))?, |c| c
        .vcpus
        .to_string()),
    key!(
        "vm.memory_mib",
        "memory of a pod in MiB",
        "64 to 1048576",
        |c, v| c.memory_mib = integer(&v, MEMORY_MIB.start().cast_signed(), MEMORY_MIB.end().cast_signed())?,
        |c| c.memory_mib.to_string()
    ),
    key!("vmm.path", "program of the virtual machine monitor", PATH_ALLOWED, |c, v| c.vmm_path = absolute(v)?, |c| quoted(
        c.vmm_path.display()
    )),
    key!(
        "vmm.uid_base",
        "first of the user ids that VMMs run as, one for each pod",
        "1000 to 4294000000",
        |c, v| c.uid_base = integer(&v, 1000, 4_294_000_000)?,
        |c| c.uid_base.to_string()
    ),
    key!(
        "vmm.uid_count",
        "number of those user ids, and so of pods on this host",
        "1 to 900000",
        |c, v| c.uid_count = integer(&v, 1, 900_000)?,
        |c| c.uid_count.to_string()
    ),
    key!("fs.path", "program of the virtio-fs server", PATH_ALLOWED, |c, v| c.fs_path = absolute(v)?, |c| quoted(c.fs_path.display())),
    key!(
        "fs.cache",
        "what the guest may cache of files",
        "\"never\", \"auto\" or \"always\"",
        |c, v| c.fs_cache = match v {
            Value::Text(t) if t == "never" => CachePolicy::Never,
            Value::Text(t) if t == "auto" => CachePolicy::Auto,
            Value::Text(t) if t == "always" => CachePolicy::Always,
            _ => return None,
        },
        |c| quoted(match c.fs_cache {
            CachePolicy::Never => "never",
            CachePolicy::Auto => "auto",
            CachePolicy::Always => "always",
        })
    ),
    key!(
        "fs.threads",
        "worker threads of the virtio-fs server, 0 to serve on the queue's own",
        "0 to 64",
        |c, v| c.fs_threads = integer(&v, 0, 64)?,
        |c| c.fs_threads.to_string()
    ),
    key!(
        "timeouts.boot_ms",
        "from the VMM's start to the agent's answer, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.boot_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.boot_timeout_ms.to_string()
    ),
    key!(
        "timeouts.agent_ms",
        "for one call to the agent, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.agent_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.agent_timeout_ms.to_string()
    ),
    key!(
        "timeouts.health_interval_ms",
        "between health checks of the agent, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.health_interval_ms = integer(&v, 100, 3_600_000)?,
        |c| c.health_interval_ms.to_string()
    ),
    key!(
        "timeouts.drain_ms",
        "for output that nobody reads when its process is deleted, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.drain_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.drain_timeout_ms.to_string()
    ),
    key!(
        "log.level",
        "which messages the shim logs",
        "\"error\", \"warn\", \"info\", \"debug\" or \"trace\"",
        |c, v| c.log_level = text(v, |t| ["error", "warn", "info", "debug", "trace"].contains(&t))?,
        |c| quoted(&c.log_level)
    ),
    key!(
        "annotations.allowed",
        "keys that a pod may set by an annotation io.caisson.<key>",
        "a list of keys",
        |c, v| c.annotations_allowed = match v {
            Value::List(names) if names.iter().all(|name| find(name).is_some()) => names,
            _ => return None,
        },
        |c| toml::Value::from(c.annotations_allowed.clone()).to_string()
    ),
];

fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// What is wrong with a configuration, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML.
    #[error("{origin}: {cause}")]
    Syntax {
        /// File.
        origin: String,
        /// The parser's words, on one line.
        cause: String,
    },
    /// No such setting.
    #[error("{origin}: unknown key {key}; known keys are {}", known_keys())]
    UnknownKey {
        /// File or annotation.
        origin: String,
        /// As written.
        key: String,
    },
    /// Of the wrong type or out of limits.
    #[error("{origin}: {key} = {value} is not allowed; allowed is {allowed}")]
    BadValue {
        /// File or annotation.
        origin: String,
        /// The setting.
        key: String,
        /// As written.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The configuration does not let pods set this.
    #[error("annotation {ANNOTATION_PREFIX}{key} is not allowed on this host; annotations.allowed lists {allowed}")]
    NotAllowed {
        /// The setting.
        key: String,
        /// What the configuration allows.
        allowed: String,
    },
}

fn known_keys() -> String {
    KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")
}

impl Config {
    /// Lays the text of one file over what is there. `origin` names the file in errors.
    ///
    /// # Errors
    /// The first key or value that is not allowed; `self` may hold earlier ones.
    pub fn apply_toml(&mut self, origin: &str, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            origin: origin.to_owned(),
            cause: error.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
        })?;
        for (section, value) in table {
            let toml::Value::Table(settings) = value else {
                return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key: section });
            };
            for (name, value) in settings {
                let written = value.to_string();
                let value = match value {
                    toml::Value::Integer(number) => Some(Value::Integer(number)),
                    toml::Value::Boolean(flag) => Some(Value::Bool(flag)),
                    toml::Value::String(text) => Some(Value::Text(text)),
                    toml::Value::Array(items) => {
                        items.into_iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>().map(Value::List)
                    }
                    _ => None,
                };
                // Numbers must be written as numbers in a file; only annotations are text.
                self.set(origin, &format!("{section}.{name}"), value, &written)?;
            }
        }
        Ok(())
    }

    /// Lays a pod's `io.caisson.*` annotations over what is there; others are passed over.
    ///
    /// # Errors
    /// The first annotation that is unknown, not allowed, or has a bad value.
    pub fn apply_annotations<'a>(&mut self, annotations: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<(), ConfigError> {
        let sorted: BTreeMap<&String, &String> = annotations.into_iter().collect();
        for (name, value) in sorted {
            let Some(key) = name.strip_prefix(ANNOTATION_PREFIX) else { continue };
            let origin = format!("annotation {name}");
            if find(key).is_none() {
                return Err(ConfigError::UnknownKey { origin, key: key.to_owned() });
            }
            if !self.annotations_allowed.iter().any(|allowed| allowed == key) {
                return Err(ConfigError::NotAllowed { key: key.to_owned(), allowed: self.annotations_allowed.join(", ") });
            }
            self.set(&origin, key, Some(Value::Text(value.clone())), &quoted(value))?;
        }
        Ok(())
    }

    fn set(&mut self, origin: &str, name: &str, value: Option<Value>, written: &str) -> Result<(), ConfigError> {
        let Some(key) = find(name) else {
            return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key: name.to_owned() });
        };
        value.and_then(|value| (key.set)(self, value)).ok_or_else(|| ConfigError::BadValue {
            origin: origin.to_owned(),
            key: name.to_owned(),
            value: written.chars().take(200).collect(),
            allowed: key.allowed,
        })
    }

    /// The effective configuration as a commented TOML file.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        let mut section = "";
        for key in KEYS {
            let (this, name) = key.name.split_once('.').expect("every key has a section");
            if this != section {
                out.push_str(&format!("{}[{this}]\n", if section.is_empty() { "" } else { "\n" }));
                section = this;
            }
            out.push_str(&format!(
                "# {}; allowed: {}; default: {}\n{name} = {}\n",
                key.meaning,
                key.allowed,
                (key.show)(&Self::default()),
                (key.show)(self)
            ));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(text: &str) -> Result<Config, String> {
        let mut config = Config::default();
        config.apply_toml("config.toml", text).map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let printed = Config::default().to_toml();
        assert_eq!(config(&printed).unwrap(), Config::default());
    }

    #[test]
    fn a_later_file_overrides_an_earlier_one() {
        let mut config = config("[vm]\nvcpus = 2\nmemory_mib = 512\n").unwrap();
        config.apply_toml("drop-in", "[vm]\nvcpus = 4\n").unwrap();
        assert_eq!((config.vcpus, config.memory_mib), (4, 512));
    }

    #[test]
    fn a_bad_value_names_key_value_and_what_is_allowed() {
        assert_eq!(
            config("[vm]\nmemory_mib = 1\n").unwrap_err(),
            "config.toml: vm.memory_mib = 1 is not allowed; allowed is 64 to 1048576"
        );
        assert_eq!(config("[vm]\nvcpus = 0\n").unwrap_err(), "config.toml: vm.vcpus = 0 is not allowed; allowed is 1 to 32");
        assert_eq!(
            config("[kernel]\npath = \"vmlinux\"\n").unwrap_err(),
            "config.toml: kernel.path = \"vmlinux\" is not allowed; allowed is an absolute path"
        );
    }

    #[test]
    fn an_unknown_key_is_named() {
        assert!(config("[vm]\ncpus = 1\n").unwrap_err().starts_with("config.toml: unknown key vm.cpus; known keys are run.dir"));
        assert!(config("vcpus = 1\n").unwrap_err().contains("unknown key vcpus"));
    }

    #[test]
    fn a_syntax_error_is_one_line() {
        assert!(!config("[vm\n").unwrap_err().contains('\n'));
    }

    #[test]
    fn an_annotation_sets_only_what_is_allowed() {
        let annotations = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let mut config = Config::default();
        config.apply_annotations(&annotations(&[("io.caisson.vm.vcpus", "3"), ("other", "x")])).unwrap();
        assert_eq!(config.vcpus, 3);
        let error = config.apply_annotations(&annotations(&[("io.caisson.kernel.path", "/x")])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "annotation io.caisson.kernel.path is not allowed on this host; annotations.allowed lists vm.vcpus, vm.memory_mib"
        );
        let error = config.apply_annotations(&annotations(&[("io.caisson.vm.vcpus", "33")])).unwrap_err();
        assert!(error.to_string().contains("vm.vcpus = \"33\" is not allowed; allowed is 1 to 32"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            let _outcome = config(&text);
        }

        #[test]
        fn memory_within_limits_is_taken(mib in 64u64..=1 << 20) {
            prop_assert_eq!(config(&format!("[vm]\nmemory_mib = {mib}\n")).unwrap().memory_mib, mib);
        }
    }
}
