//! Sockets that stand for sockets of the host: a program of the container connects to one here, and the shim to the host's.
//!
//! ```text
//! listens, with its container -> somebody connects; the shim hears of it -> carried to a port of the host, or broken
//! ```

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use caisson_protocol::agent::HostSocket;
use caisson_protocol::guest::SOCKETS_DIR;
use tokio::net::UnixStream;

use crate::names::check_file_name;
use crate::streams;

/// After a connection that could not be accepted, for want of descriptors say.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The sockets of all containers.
#[derive(Default)]
pub struct Sockets {
    /// By container and name.
    listeners: Mutex<HashMap<(String, String), Arc<tokio::net::UnixListener>>>,
    /// Connections of which the shim has heard, with their containers.
    accepted: Mutex<HashMap<u64, (String, UnixStream)>>,
    next: AtomicU64,
}

/// Listens on the sockets of a container that is being made.
///
/// # Errors
/// When a name is no plain name, or a socket cannot be made.
pub fn listen(container: &str, sockets: &[HostSocket]) -> Result<Vec<(String, UnixListener)>> {
    sockets.iter().map(|socket| Ok((socket.name.clone(), listen_on(container, socket).context("make a socket")?))).collect()
}

fn listen_on(container: &str, socket: &HostSocket) -> Result<UnixListener> {
    check_file_name(&socket.name)?;
    let folder = Path::new(SOCKETS_DIR).join(container);
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    // A socket's path is short (108 bytes), a container's id may be long.
    let opened = File::open(&folder).context("open its folder")?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{}", opened.as_raw_fd(), socket.name)).context("bind it")?;
    let path = folder.join(&socket.name);
    chown(&path, Some(socket.user), Some(socket.group)).context("give it its owner")?;
    std::fs::set_permissions(&path, Permissions::from_mode(socket.mode & 0o777)).context("give it its mode")?;
    listener.set_nonblocking(true).context("prepare it")?;
    Ok(listener)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sockets {
    /// Takes over what [`listen`] made.
    ///
    /// # Errors
    /// When a socket cannot be watched.
    pub fn add(&self, container: &str, listeners: Vec<(String, UnixListener)>) -> Result<()> {
        for (name, listener) in listeners {
            let listener = tokio::net::UnixListener::from_std(listener).context("watch a socket")?;
            lock(&self.listeners).insert((container.to_owned(), name), Arc::new(listener));
        }
        Ok(())
    }

    /// Waits for a connection; `None` when there is no such socket.
    pub async fn accept(&self, container: &str, name: &str) -> Option<u64> {
        let key = (container.to_owned(), name.to_owned());
        let listener = lock(&self.listeners).get(&key).cloned()?;
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(_) => tokio::time::sleep(RETRY_DELAY).await,
            }
        };
        let connection = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.accepted).insert(connection, (key.0, stream));
        Some(connection)
    }

    /// Connects an accepted connection with a port of the host, or breaks it when that is 0; false when there is none.
    ///
    /// # Errors
    /// When the host does not take it.
    pub fn carry(&self, connection: u64, port: u32) -> Result<bool> {
        let Some((_, mut inside)) = lock(&self.accepted).remove(&connection) else { return Ok(false) };
        if port != 0 {
            let mut outside = streams::connect(port).and_then(streams::into_async).context("connect to the host")?;
            tokio::spawn(async move {
                // Either side may break off; the other hears of it by its connection's end.
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
            });
        }
        Ok(true)
    }

    /// Forgets those of a container, and what has not been carried yet.
    pub fn remove(&self, container: &str) {
        lock(&self.listeners).retain(|(other, _), _| other != container);
        lock(&self.accepted).retain(|_, (other, _)| other != container);
        // Most have none.
        let _ = std::fs::remove_dir_all(Path::new(SOCKETS_DIR).join(container));
    }
}
