//! `start`: leaves a daemon behind and tells containerd its address.
//!
//! containerd runs us in the container's bundle. The daemon is this program again, with the
//! listening socket at a known descriptor. A container of an existing pod gets no daemon: it is
//! served by its pod's.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use caisson_host::control;
use sha2::{Digest, Sha256};

use crate::flags::Flags;
use crate::spec;

/// Where containerd's shims have their sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
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
        spawn_daemon(flags, &bundle, &socket)?;
    } else if UnixStream::connect(&socket).is_err() {
        bail!("container {} belongs to pod {pod}, whose shim does not run", flags.id);
    }
    let address = format!("unix://{}", socket.display());
    std::fs::write(bundle.join(ADDRESS_FILE), &address).with_context(|| format!("write {ADDRESS_FILE} in the bundle"))?;
    print!("{address}");
    std::io::stdout().flush().context("print the address")
}

fn spawn_daemon(flags: &Flags, bundle: &Path, socket: &Path) -> Result<()> {
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
