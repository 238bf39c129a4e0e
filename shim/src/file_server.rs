//! The pod's virtio-fs server, as the shim starts and hears it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use caisson_protocol::fs::{self, FsConfig};
use caisson_sys::users::as_user;
use rustix::fs::inotify;
use tokio::sync::Notify;

use crate::errors::one_line;
use crate::vmm::Jailed;

/// From one word of a virtio-fs server to the next that is listened to.
const BETWEEN_WORDS: Duration = Duration::from_millis(2);

/// Why the virtio-fs server ended.
pub enum FsEnd {
    /// It said what it could not do.
    Failed(String),
    /// It was killed, or there was nobody to serve any more.
    Gone(String),
}

/// Starts the virtio-fs server for the share of which `root` is the root, and returns its mount namespace besides;
/// `on_end` hears when it dies, and who waits for `crowded` when the guest had better forget files. The kernel counts
/// what it watches for the pod's `user`.
///
/// # Errors
/// When it cannot be started.
pub async fn start_fs<F: Future<Output = ()> + Send>(
    program: &Path,
    user: u32,
    config: &FsConfig,
    root: OwnedFd,
    socket: OwnedFd,
    crowded: Arc<Notify>,
    on_end: impl FnOnce(FsEnd) -> F + Send + 'static,
) -> Result<(Arc<Jailed>, OwnedFd)> {
    let pid_of = |event: fs::Event| match event {
        fs::Event::Jailed { pid } => Ok(pid),
        fs::Event::Failed(reason) => Err(reason),
        other => Err(format!("the virtio-fs server said {other:?} first")),
    };
    // A user has few of these (fs.inotify.max_user_instances), and root's are the host's own.
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watches = as_user(user, || inotify::init(flags)).and_then(|made| Ok(made?)).context("make an inotify instance")?;
    let descriptors = [root.as_fd(), socket.as_fd(), watches.as_fd()];
    let server = Arc::new(Jailed::start(program, &[], Some((config, &descriptors)), pid_of).await?);
    drop((root, socket, watches));
    let entered = server.receive::<fs::Event>().await;
    let namespace = match entered {
        Ok(Some((fs::Event::Entered, namespace))) => namespace.into_iter().next().context("the virtio-fs server hands over no namespace"),
        Ok(Some((fs::Event::Failed(reason), _))) => Err(anyhow::anyhow!("the virtio-fs server failed: {}", one_line(&reason))),
        Ok(other) => Err(anyhow::anyhow!("the virtio-fs server said {other:?} instead that it is in its jail")),
        Err(error) => Err(error).context("hear from the virtio-fs server"),
    };
    if namespace.is_err() {
        server.collect().await;
    }
    let namespace = namespace?;
    let watched = Arc::clone(&server);
    tokio::spawn(async move {
        let failure = failure(&watched, &crowded).await;
        let ended = watched.collect().await;
        on_end(failure.map_or_else(|| FsEnd::Gone(format!("the virtio-fs server {ended}")), FsEnd::Failed)).await;
    });
    Ok((server, namespace))
}

/// Waits for the last word of a virtio-fs server, if it has one, and passes on until then when it is crowded.
async fn failure(server: &Jailed, crowded: &Notify) -> Option<String> {
    loop {
        match server.receive::<fs::Event>().await {
            Ok(Some((fs::Event::Failed(reason), _))) => return Some(format!("the virtio-fs server failed: {}", one_line(&reason))),
            Ok(Some((fs::Event::Crowded, _))) => {
                crowded.notify_one();
                // One that was taken over says it as often as it likes.
                tokio::time::sleep(BETWEEN_WORDS).await;
            }
            _ => return None,
        }
    }
}
