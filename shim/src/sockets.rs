//! Sockets of the host among a container's mounts, with `fs.sockets = "carry"`: the guest's agent listens on one in
//! the container, and for each connection to it the shim makes one to the host's socket.
//!
//! What a program of the host sees there is a connection of the shim's: its user is the shim's, and descriptors
//! cannot be sent over it.

use std::fs::{File, Metadata};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use caisson_protocol::agent::HostSocket;
use caisson_protocol::guest::{SOCKETS_DIR, shared_mount};
use log::Level;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::container::Container;
use crate::machine::Machine;
use crate::sandbox::Sandbox;
use crate::spec::Bind;

/// Connections at a time to one socket; more wait to be accepted.
const MAX_CONNECTIONS: usize = 256;
/// For a program of the host whose backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A socket of the host.
struct Socket {
    /// The file that was there when the container was made, as a bind mount would keep it: whoever may write its folder
    /// cannot have the shim connect to another.
    file: File,
    path: PathBuf,
    name: String,
    meta: Metadata,
    /// Whether the log says that it could not be reached: a container may try as often as it likes.
    failed: AtomicBool,
}

/// Those of a container.
#[derive(Default)]
pub struct Sockets(Vec<Socket>);

impl Sockets {
    /// Takes the sockets out of a container's bind mounts, and points its specification at the guest's.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn take(container: &str, binds: &mut Vec<Bind>, spec: &mut Value) -> Result<Self> {
        let mut sockets = Vec::new();
        for bind in std::mem::take(binds) {
            let path = &bind.source;
            let open = || {
                let file = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
                let meta = file.metadata()?;
                std::io::Result::Ok((file, meta))
            };
            let (file, meta) = open().with_context(|| format!("bind mount of {}", path.display()))?;
            if !meta.file_type().is_socket() {
                binds.push(bind);
                continue;
            }
            let shared = shared_mount(container, &bind.name);
            for mount in spec["mounts"].as_array_mut().into_iter().flatten().filter(|mount| mount["source"] == shared) {
                mount["source"] = json!(format!("{SOCKETS_DIR}/{container}/{}", bind.name));
            }
            sockets.push(Socket { file, path: bind.source, name: bind.name, meta, failed: AtomicBool::new(false) });
        }
        Ok(Self(sockets))
    }

    /// What the guest has to make for them.
    pub fn requests(&self) -> Vec<HostSocket> {
        let request = |Socket { name, meta, .. }: &Socket| HostSocket {
            name: name.clone(),
            user: meta.uid(),
            group: meta.gid(),
            mode: meta.mode() & 0o777,
            ..HostSocket::default()
        };
        self.0.iter().map(request).collect()
    }

    /// Carries connections for as long as the container runs.
    pub fn follow(self, machine: &Arc<Machine>, container: &Arc<Container>) {
        for socket in self.0 {
            tokio::spawn(serve(Arc::new(socket), Arc::clone(&machine.sandbox), container.id.clone()));
        }
    }
}

async fn serve(socket: Arc<Socket>, sandbox: Arc<Sandbox>, container: String) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        // Ends with the container or the machine, or with an answer that is none.
        let Ok(connection) = sandbox.agent.accept_socket(&container, &socket.name).await else { return };
        let (socket, sandbox) = (Arc::clone(&socket), Arc::clone(&sandbox));
        tokio::spawn(async move {
            if let Err(error) = carry(&socket, &sandbox, connection).await {
                let level = if socket.failed.swap(true, Ordering::AcqRel) { Level::Debug } else { Level::Warn };
                log::log!(level, "carry a connection to {}: {error:#}", socket.path.display());
            }
            drop(permit);
        });
    }
}

/// Connects a connection of the guest with the host's socket, and waits for its end.
async fn carry(socket: &Socket, sandbox: &Sandbox, connection: u64) -> Result<()> {
    let path = format!("/proc/self/fd/{}", socket.file.as_raw_fd());
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await;
    let ours = match connected.context("nobody accepts it").and_then(|stream| Ok(stream?.into_std()?)) {
        Ok(stream) => OwnedFd::from(stream),
        Err(error) => {
            sandbox.agent.carry_socket(connection, 0).await?;
            return Err(error);
        }
    };
    Ok(sandbox.carry(ours, |port| sandbox.agent.carry_socket(connection, port)).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::How;

    #[test]
    fn sockets_are_told_from_other_mounts() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, file) = (folder.path().join("socket"), folder.path().join("file"));
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::fs::write(&file, "").unwrap();
        let bind = |source: &PathBuf, name: &str| Bind {
            source: source.clone(),
            destination: PathBuf::new(),
            how: How::default(),
            name: name.into(),
        };
        let mut binds = vec![bind(&socket, "0"), bind(&file, "1")];
        let mut spec = json!({"mounts": [{"source": shared_mount("c", "0")}, {"source": shared_mount("c", "1")}]});
        let sockets = Sockets::take("c", &mut binds, &mut spec).unwrap();
        assert_eq!((binds.len(), binds[0].name.as_str()), (1, "1"));
        assert_eq!(sockets.requests().iter().map(|socket| socket.name.as_str()).collect::<Vec<_>>(), ["0"]);
        assert_eq!(spec["mounts"][0]["source"], "/run/caisson/sockets/c/0");
        assert_eq!(spec["mounts"][1]["source"], shared_mount("c", "1"));
        assert!(Sockets::take("c", &mut vec![bind(&folder.path().join("nothing"), "2")], &mut spec).is_err());
    }
}
