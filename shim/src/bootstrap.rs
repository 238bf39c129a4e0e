//! `start`: leaves a daemon behind and tells containerd its address.
//!
//! containerd runs us in the container's bundle. The daemon is this program again, with the
//! listening socket at a known descriptor. A container of an existing pod gets no daemon: it is
//! served by its pod's.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control;
use caisson_protocol::options::{Any, BootstrapParams, Options};
use protobuf::Message;
use sha2::{Digest, Sha256};

use crate::flags::Flags;
use crate::spec;

/// Where containerd's shims have their sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// What containerd's options of a handler that it does not know are.
const OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";
const MAX_INPUT: u64 = 1 << 20;
/// In the bundle: the shim's address, which containerd reads after its own restart.
const ADDRESS_FILE: &str = "address";

/// Path of the socket of a pod's shim, by the rule of containerd's own shims (its `pkg/shim.SocketAddress`),
/// by which tools find a shim whose task they know.
pub fn socket_path(address: &str, namespace: &str, pod: &str) -> PathBuf {
    let hash = Sha256::digest(Path::new(address).join(namespace).join(pod).as_os_str().as_bytes());
    let name: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
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
        spawn_daemon(flags, config_path(flags, &input()?)?, &bundle, &socket)?;
    } else if UnixStream::connect(&socket).is_err() {
        bail!("container {} belongs to pod {pod}, whose shim does not run", flags.id);
    }
    let address = format!("unix://{}", socket.display());
    std::fs::write(bundle.join(ADDRESS_FILE), &address).with_context(|| format!("write {ADDRESS_FILE} in the bundle"))?;
    print!("{address}");
    std::io::stdout().flush().context("print the address")
}

/// What containerd writes to standard input: nothing or a message.
fn input() -> Result<Vec<u8>> {
    let (input, mut bytes) = (std::io::stdin(), Vec::new());
    // By hand there is nobody to write any.
    if !input.is_terminal() {
        input.take(MAX_INPUT).read_to_end(&mut bytes).context("read the runtime's options")?;
    }
    Ok(bytes)
}

/// The configuration file that the options of the runtime handler name (`ConfigPath`, and `ctr run
/// --runtime-config-path`).
fn config_path(flags: &Flags, input: &[u8]) -> Result<Option<String>> {
    // From containerd 2.3 on it is a message that is about us; before, it is the options alone.
    let about_us = |params: &BootstrapParams| params.instance_id == flags.id && params.namespace == flags.namespace;
    let given: Vec<Any> = match BootstrapParams::parse_from_bytes(input).ok().filter(about_us) {
        Some(params) => params.extensions.into_iter().filter_map(|extension| extension.value.into_option()).collect(),
        None => vec![Any::parse_from_bytes(input).context("parse the runtime's options")?],
    };
    let Some(options) = given.iter().find(|any| any.type_url.trim_start_matches("type.googleapis.com/") == OPTIONS_TYPE) else {
        return Ok(None);
    };
    let Options { config_path, config_body, .. } = Options::parse_from_bytes(&options.value).context("parse the runtime's options")?;
    ensure!(
        config_body.is_empty(),
        "the options of the runtime handler hold settings other than ConfigPath, which names the file that they belong into"
    );
    ensure!(config_path.is_empty() || config_path.starts_with('/'), "ConfigPath {config_path:?}: allowed is an absolute path");
    Ok(Some(config_path).filter(|path| !path.is_empty()))
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
    use caisson_protocol::options::Extension;
    use protobuf::MessageField;

    use super::*;

    #[test]
    fn the_socket_is_where_containerds_tools_look_for_it() {
        // sha256("/run/containerd/containerd.sock/k8s.io/web")
        let path = "/run/containerd/s/31492f64622e2197f39d1097eef6dd53ef2551ab09ee09a8437ce5507a085daa";
        assert_eq!(socket_path("/run/containerd/containerd.sock", "k8s.io", "web"), Path::new(path));
    }

    #[test]
    fn a_handlers_configuration_is_read_out_of_its_options() {
        let flags = Flags::parse(["-namespace", "k8s.io", "-id", "web", "start"].map(str::to_owned).into_iter()).unwrap();
        let message =
            |kind: &str, options: Options| Any { type_url: kind.into(), value: options.write_to_bytes().unwrap(), ..Any::default() };
        let named = |path: &str| Options { config_path: path.into(), ..Options::default() };
        let before = |kind: &str, options: Options| config_path(&flags, &message(kind, options).write_to_bytes().unwrap());
        let since = |kind: &str, options: Options| {
            let extension = Extension { value: MessageField::some(message(kind, options)), ..Extension::default() };
            let (instance_id, namespace) = ("web".into(), "k8s.io".into());
            let params = BootstrapParams { instance_id, namespace, extensions: vec![extension], ..BootstrapParams::default() };
            config_path(&flags, &params.write_to_bytes().unwrap())
        };
        for read in [&before as &dyn Fn(&str, Options) -> Result<Option<String>>, &since] {
            assert_eq!(read(OPTIONS_TYPE, named("/etc/caisson/acme.toml")).unwrap().as_deref(), Some("/etc/caisson/acme.toml"));
            assert!(read(OPTIONS_TYPE, named("acme.toml")).unwrap_err().to_string().contains("\"acme.toml\""));
            let inline = Options { config_body: b"SystemdCgroup = true".to_vec(), ..Options::default() };
            assert!(read(OPTIONS_TYPE, inline).unwrap_err().to_string().contains("ConfigPath"));
            assert_eq!(read(OPTIONS_TYPE, named("")).unwrap(), None);
            assert_eq!(read("containerd.runc.v1.Options", named("/x")).unwrap(), None);
        }
        assert_eq!(config_path(&flags, &[]).unwrap(), None);
        assert!(config_path(&flags, b"nonsense").is_err());
    }
}
