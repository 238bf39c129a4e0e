//! `start`: leaves a daemon behind and tells containerd its address.
//!
//! containerd runs us in the container's bundle. The daemon is this program again, with the
//! listening socket at a known descriptor. A container of an existing pod gets no daemon: it is
//! served by its pod's.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control;
use caisson_protocol::options::Options;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use sha2::{Digest, Sha256};

use crate::flags::Flags;
use crate::spec;

/// Where containerd's shims have their sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// What containerd's options of a handler that it does not know are.
const OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";
const MAX_OPTIONS: u64 = 1 << 20;
/// In the bundle: the shim's address, which containerd reads after its own restart.
const ADDRESS_FILE: &str = "address";

/// Path of the socket of a pod's shim.
pub fn socket_path(address: &str, namespace: &str, pod: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in [address, namespace, pod, "caisson"] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SOCKET_DIR).join(name)
}

/// Starts the pod's daemon when it is not there, and prints its address.
///
/// # Errors
/// One sentence; containerd shows it to the user.
pub fn start(flags: &Flags) -> Result<()> {
    let bundle = std::env::current_dir().context("find the bundle")?;
    let pod = spec::pod_of(&bundle.join("config.json"))?.unwrap_or_else(|| flags.id.clone());
    let socket = socket_path(&flags.address, &flags.namespace, &pod);
    if pod == flags.id {
        spawn_daemon(flags, config_path(&options()?)?, &bundle, &socket)?;
    } else if UnixStream::connect(&socket).is_err() {
        bail!("container {} belongs to pod {pod}, whose shim does not run", flags.id);
    }
    let address = format!("unix://{}", socket.display());
    std::fs::write(bundle.join(ADDRESS_FILE), &address).with_context(|| format!("write {ADDRESS_FILE} in the bundle"))?;
    print!("{address}");
    std::io::stdout().flush().context("print the address")
}

/// The options of the runtime handler, which containerd writes to standard input: nothing or a message.
fn options() -> Result<Vec<u8>> {
    let (input, mut bytes) = (std::io::stdin(), Vec::new());
    // By hand there is nobody to write any.
    if !input.is_terminal() {
        input.take(MAX_OPTIONS).read_to_end(&mut bytes).context("read the runtime's options")?;
    }
    Ok(bytes)
}

/// The configuration file that options name (`ConfigPath`, and `ctr run --runtime-config-path`).
fn config_path(options: &[u8]) -> Result<Option<String>> {
    let options = Any::parse_from_bytes(options).context("parse the runtime's options")?;
    if options.type_url.trim_start_matches("type.googleapis.com/") != OPTIONS_TYPE {
        return Ok(None);
    }
    let path = Options::parse_from_bytes(&options.value).context("parse the runtime's options")?.config_path;
    ensure!(path.is_empty() || path.starts_with('/'), "ConfigPath {path:?}: allowed is an absolute path");
    Ok(Some(path).filter(|path| !path.is_empty()))
}

fn spawn_daemon(flags: &Flags, config: Option<String>, bundle: &Path, socket: &Path) -> Result<()> {
    std::fs::create_dir_all(SOCKET_DIR).with_context(|| format!("create {SOCKET_DIR}"))?;
    let listener = match UnixListener::bind(socket) {
        Ok(listener) => listener,
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                bail!("a shim for pod {} runs already", flags.id);
            }
            // Left behind by a shim that was killed.
            std::fs::remove_file(socket).context("remove a stale socket")?;
            UnixListener::bind(socket).context("listen for containerd")?
        }
        Err(error) => return Err(error).context("listen for containerd"),
    };
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    if let Some(config) = config {
        command.args(["-config", &config]);
    }
    if flags.debug {
        command.arg("-debug");
    }
    command.current_dir(bundle).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    // Two threads serve a pod well; glibc would give each an arena of its own.
    command.env("MALLOC_ARENA_MAX", "2");
    control::pass(&mut command, listener.as_fd());
    if let Err(error) = command.spawn() {
        let _ = std::fs::remove_file(socket);
        return Err(error).context("start the shim's daemon");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handlers_configuration_is_read_out_of_its_options() {
        let options = |kind: &str, path: &str| {
            let value = Options { config_path: path.into(), ..Options::default() }.write_to_bytes().unwrap();
            config_path(&Any { type_url: kind.into(), value, ..Any::default() }.write_to_bytes().unwrap())
        };
        assert_eq!(options(OPTIONS_TYPE, "/etc/caisson/acme.toml").unwrap().as_deref(), Some("/etc/caisson/acme.toml"));
        assert!(options(OPTIONS_TYPE, "acme.toml").unwrap_err().to_string().contains("\"acme.toml\""));
        for none in [config_path(&[]), options(OPTIONS_TYPE, ""), options("containerd.runc.v1.Options", "/x")] {
            assert_eq!(none.unwrap(), None);
        }
        assert!(config_path(b"nonsense").is_err());
    }
}
