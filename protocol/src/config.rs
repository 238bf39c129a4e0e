//! `/etc/caisson/config.toml`, its drop-ins, and the annotations of a pod.
//!
//! Every setting is one row of [`KEYS`]: its name, what it means with unit and limits, and how a
//! value is read into [`Config`]. Files, annotations, `caisson config` and the error messages all
//! work on that table, so they cannot disagree.
//!
//! A pod's annotation `io.caisson.<key>` sets `<key>` for that pod when `annotations.allowed`
//! lists the key.

mod choices;
mod error;
mod hosts_own;
mod keys;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use self::choices::{CoreScheduling, DiskLayers, HostNamespaces, HostSockets, Join, NetworkDefault};
pub use self::error::ConfigError;
pub use self::keys::{KEYS, Key};
use self::keys::{Value, find, quoted};
use crate::fs::CachePolicy;
use crate::publish::Publish;
use crate::vmm::{MEMORY_MIB, RateLimit, VCPUS};

/// Where the configuration lies; drop-ins are `/etc/caisson/config.toml.d/*.toml` in sorted order.
pub const PATH: &str = "/etc/caisson/config.toml";
/// What the name of an annotation begins with.
pub const ANNOTATION_PREFIX: &str = "io.caisson.";

/// What the pods of a tenant share on the host. See [`KEYS`] for each of these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Its own name; empty for none.
    pub name: String,
    /// A path, or a slice; empty for none.
    pub cgroup: String,
    /// 0 for none.
    pub memory_mib: u64,
    /// 0 for none.
    pub cpus: u32,
    /// 0 for none.
    pub processes: u32,
}

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
    /// Memory of the machine beyond its containers' limit, in MiB.
    pub overhead_mib: u64,
    /// The most memory that a pod's limits size its machine to, in MiB.
    pub max_memory_mib: u64,
    /// The most vCPUs that a pod's limits size its machine to.
    pub max_vcpus: u32,
    /// Whether the guest may run virtual machines itself.
    pub nested: bool,
    /// Which guests may run at once on one core of the host's.
    pub core_scheduling: CoreScheduling,
    /// Whether the guest tells which of its memory is free.
    pub report_free_memory: bool,
    /// The VMM's program.
    pub vmm_path: PathBuf,
    /// First user id for VMMs.
    pub uid_base: u32,
    /// Number of user ids for VMMs.
    pub uid_count: u32,
    /// What a pod has that was given no network.
    pub network_default: NetworkDefault,
    /// The program of a user-mode network.
    pub network_passt: PathBuf,
    /// Ports of the host that lead into a pod with a user-mode network.
    pub network_publish: Vec<Publish>,
    /// Whether the host's kernel serves network interfaces where it can.
    pub network_vhost: bool,
    /// How a pod's interfaces are joined to the machine.
    pub network_join: Join,
    /// Most megabits a second of an interface, each way; 0 for no limit.
    pub network_max_mbit: u32,
    /// Most frames a second of an interface, each way; 0 for no limit.
    pub network_max_frames: u32,
    /// Whose layers become disks, where a snapshotter has them as file systems.
    pub disk_layers: DiskLayers,
    /// How many disks a pod may have at a time.
    pub disk_places: u32,
    /// Whether disks have rings of the kernel's.
    pub disk_io_uring: bool,
    /// Most MiB a second of a disk; 0 for no limit.
    pub disk_max_mib: u32,
    /// Most requests a second to a disk; 0 for no limit.
    pub disk_max_requests: u32,
    /// The virtio-fs server's program.
    pub fs_path: PathBuf,
    /// Program that stands for a container on the host.
    pub task_path: PathBuf,
    /// What becomes of `hostNetwork`, `hostPID` and `hostIPC`.
    pub host_namespaces: HostNamespaces,
    /// The group of the host whose members are the pod's owners; empty for none.
    pub pod_owners: String,
    /// Whom the pod belongs to.
    pub tenant: Tenant,
    /// What the guest may cache.
    pub fs_cache: CachePolicy,
    /// Whether set-user-id and capabilities of files, and device nodes, are kept in all volumes of the host.
    pub fs_set_id: bool,
    /// Whether the guest collects writes.
    pub fs_writeback: bool,
    /// MiB of the window into which the guest maps files; 0 for none.
    pub fs_window_mib: u64,
    /// What becomes of sockets of the host.
    pub fs_sockets: HostSockets,
    /// `fs.id_base`
    pub fs_id_base: u32,
    /// `fs.mapped_volumes`
    pub fs_mapped_volumes: Vec<PathBuf>,
    /// Threads of the virtio-fs server for requests that wait.
    pub fs_threads: u32,
    /// For so long the virtio-fs server looks for a request before it sleeps, in microseconds.
    pub fs_poll_us: u32,
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
            overhead_mib: 96,
            max_memory_mib: 65_536,
            max_vcpus: 32,
            nested: false,
            core_scheduling: CoreScheduling::Auto,
            report_free_memory: true,
            vmm_path: "/usr/libexec/caisson/caisson-vmm".into(),
            uid_base: 1_879_048_192,
            uid_count: 65_536,
            network_default: NetworkDefault::None,
            network_passt: "/usr/bin/passt".into(),
            network_publish: Vec::new(),
            network_vhost: true,
            network_join: Join::Redirect,
            network_max_mbit: 0,
            network_max_frames: 0,
            disk_layers: DiskLayers::Always,
            disk_places: 8,
            disk_io_uring: false,
            disk_max_mib: 0,
            disk_max_requests: 0,
            fs_path: "/usr/libexec/caisson/caisson-fs".into(),
            task_path: "/usr/libexec/caisson/caisson-stand-in".into(),
            host_namespaces: HostNamespaces::Refuse,
            pod_owners: String::new(),
            tenant: Tenant::default(),
            fs_cache: CachePolicy::Auto,
            fs_set_id: false,
            fs_writeback: false,
            fs_window_mib: 0,
            fs_sockets: HostSockets::Refuse,
            fs_id_base: 0,
            fs_mapped_volumes: Vec::new(),
            fs_threads: 2,
            fs_poll_us: 1000,
            boot_timeout_ms: 60_000,
            agent_timeout_ms: 30_000,
            health_interval_ms: 10_000,
            drain_timeout_ms: 10_000,
            log_level: "info".into(),
            annotations_allowed: vec!["vm.vcpus".into(), "vm.memory_mib".into()],
        }
    }
}

impl Config {
    /// The defaults where only the 65536 users are that somebody without root is given: the upper half of them is for VMMs.
    pub fn rootless() -> Self {
        Self { uid_base: 32_768, uid_count: 32_768, ..Self::default() }
    }

    /// What a network interface may carry each way.
    pub fn network_limit(&self) -> RateLimit {
        // Of network rates a megabit is 10^6 bits, of disks' a MiB 2^20 bytes.
        RateLimit { bytes: u64::from(self.network_max_mbit) * 125_000, operations: self.network_max_frames.into() }
    }

    /// What a disk may carry.
    pub fn disk_limit(&self) -> RateLimit {
        RateLimit { bytes: u64::from(self.disk_max_mib) << 20, operations: self.disk_max_requests.into() }
    }

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

    /// Whom a pod belongs to: by the configuration, or else by its annotation, which is taken away; nobody where it is empty.
    ///
    /// # Errors
    /// When the annotation is not allowed, has a bad value, or names another than the configuration does.
    pub fn take_tenant(&self, annotations: &mut BTreeMap<String, String>) -> Result<String, ConfigError> {
        let mut chosen = self.clone();
        chosen.apply_annotations(
            annotations.remove_entry(&format!("{ANNOTATION_PREFIX}tenant.name")).iter().map(|(name, value)| (name, value)),
        )?;
        let (asked, tenant) = (chosen.tenant.name, &self.tenant.name);
        if tenant.is_empty() || *tenant == asked { Ok(asked) } else { Err(ConfigError::OfAnother { asked, tenant: tenant.clone() }) }
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
            let most = (self.max_memory_mib, self.max_vcpus);
            self.set(&origin, key, Some(Value::Text(value.clone())), &quoted(value))?;
            // What limits of containers may size a machine to, who writes the pod may, and no more.
            let (over, allowed) = match key {
                "vm.memory_mib" => (self.memory_mib > most.0, "as much as vm.max_memory_mib"),
                "vm.vcpus" => (self.vcpus > most.1, "as many as vm.max_vcpus"),
                _ => continue,
            };
            if over {
                return Err(ConfigError::BadValue { origin, key: key.to_owned(), value: quoted(value), allowed });
            }
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

    /// Sizes the machine for what a pod may use: `memory` in bytes and `cpus` in thousandths, each
    /// `None` when the pod has no such limit, which leaves the configured size.
    pub fn size_for(&mut self, memory: Option<u64>, cpus: Option<u64>) {
        if let Some(bytes) = memory {
            // A page table covers 2 MiB: an odd MiB would be small pages at the end.
            let wanted = bytes.div_ceil(1 << 20).saturating_add(self.overhead_mib).next_multiple_of(2);
            self.memory_mib = wanted.clamp(*MEMORY_MIB.start(), self.max_memory_mib);
        }
        if let Some(thousandths) = cpus {
            let wanted = u32::try_from(thousandths.div_ceil(1000)).unwrap_or(u32::MAX);
            self.vcpus = wanted.clamp(*VCPUS.start(), self.max_vcpus);
        }
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
    fn limits_size_the_machine_within_bounds() {
        let sized = |memory, cpus| {
            let mut config = Config { max_memory_mib: 8192, max_vcpus: 8, ..Config::default() };
            config.size_for(memory, cpus);
            (config.memory_mib, config.vcpus)
        };
        assert_eq!(sized(None, None), (256, 1));
        assert_eq!(sized(Some(512 << 20), Some(1500)), (608, 2));
        assert_eq!(sized(Some((512 << 20) + 1), Some(1)), (610, 1));
        assert_eq!(sized(Some(u64::MAX), Some(u64::MAX)), (8192, 8));
        assert_eq!(sized(Some(0), Some(0)), (96, 1));
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

    use super::hosts_own::HOSTS_OWN;

    #[test]
    fn what_is_the_hosts_business_no_pod_may_be_let_to_set() {
        for key in KEYS.iter().map(|key| key.name) {
            let allowed = config(&format!("[annotations]\nallowed = [\"{key}\"]\n"));
            let is_hosts =
                key.ends_with("path") || key.contains("uid_") || ["run.dir", "pod.owners", "tenant.cgroup", "fs.id_base"].contains(&key);
            if is_hosts {
                assert!(allowed.unwrap_err().contains("annotations.allowed"), "{key}");
            } else {
                assert_eq!(allowed.is_ok(), !HOSTS_OWN.contains(&key), "{key}");
            }
        }
        assert!(HOSTS_OWN.iter().all(|name| find(name).is_some()));
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
        let mut bound = Config { max_memory_mib: 1024, max_vcpus: 2, ..Config::default() };
        bound.apply_annotations(&annotations(&[("io.caisson.vm.vcpus", "2"), ("io.caisson.vm.memory_mib", "1024")])).unwrap();
        for (key, value, most) in [("vm.vcpus", "3", "as many as vm.max_vcpus"), ("vm.memory_mib", "1026", "as much as vm.max_memory_mib")]
        {
            let error = bound.clone().apply_annotations(&annotations(&[(&format!("io.caisson.{key}"), value)])).unwrap_err();
            assert!(error.to_string().contains(&format!("{key} = \"{value}\" is not allowed; allowed is {most}")), "{error}");
        }
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
