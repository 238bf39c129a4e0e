//! The command line that containerd gives a shim (containerd `core/runtime/v2/README.md`).
//!
//! Go's flag syntax: one or two dashes, a value behind a blank or an equals sign. No library for
//! our own command line reads that, and it is seven flags.

/// What the shim is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `start`
    Start,
    /// `delete`
    Delete,
    /// No action: be the daemon.
    Serve,
    /// `-info`
    Info,
    /// `-v`
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container that this call is about.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// Bundle, for `delete`.
    pub bundle: String,
    /// Configuration of the runtime handler; empty for none. `start` hands it to the daemon.
    pub config: String,
    /// Log everything.
    pub debug: bool,
}

impl Flags {
    /// Reads the arguments behind the program's name.
    ///
    /// # Errors
    /// One sentence that names the argument.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut flags = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: String::new(),
            config: String::new(),
            debug: false,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                flags.action = match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(format!("unknown action {argument:?}; known are start and delete")),
                };
                continue;
            };
            let (name, inline) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value.to_owned())));
            match name {
                "v" | "version" => flags.action = Action::Version,
                "info" => flags.action = Action::Info,
                "debug" => flags.debug = inline.as_deref() != Some("false"),
                "namespace" | "id" | "address" | "bundle" | "config" | "socket" | "publish-binary" => {
                    let value = inline.or_else(|| arguments.next()).ok_or_else(|| format!("flag -{name} needs a value"))?;
                    match name {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "bundle" => flags.bundle = value,
                        "config" => flags.config = value,
                        // Ours is passed as a descriptor, and events go by ttrpc.
                        _ => {}
                    }
                }
                _ => return Err(format!("unknown flag -{name}")),
            }
        }
        if matches!(flags.action, Action::Start | Action::Delete | Action::Serve) {
            for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
                check_name(name, value)?;
            }
        }
        Ok(flags)
    }
}

/// Namespaces and ids become names of folders: containerd's own rule for them, and no more
/// (`identifiers.Validate`; CRI's ids are hexadecimal).
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    const MAX: usize = 200;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(plain) {
        return Err(format!("{what} {name:?}: allowed are 1 to {MAX} letters, digits, '-', '_' and '.', beginning with a letter or digit"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, String> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_lines_that_containerd_writes_are_read() {
        let flags = parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id web -debug start").unwrap();
        assert_eq!((flags.action, flags.namespace.as_str(), flags.id.as_str(), flags.debug), (Action::Start, "k8s.io", "web", true));
        let flags = parse("--namespace=n --id=i -bundle /b delete").unwrap();
        assert_eq!((flags.action, flags.bundle.as_str()), (Action::Delete, "/b"));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        for id in ["../x", "a/b", ".", "-a"] {
            assert!(parse(&format!("-namespace n -id={id} start")).unwrap_err().contains("allowed are"), "{id}");
        }
    }

    #[test]
    fn a_flag_without_value_is_named() {
        assert_eq!(parse("-id").unwrap_err(), "flag -id needs a value");
    }
}
