//! The process that stands on the host for a container, as the shim knows it: what containerd is told as the container's
//! process id.
//!
//! A signal that it gets is the container's, and so is its death. It ends when the container has, with its code.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, Result};
use caisson_host::process::Process;
use caisson_host::stand_in;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::pod::{Pod, SIGKILL, lock};

/// The most that a process can end with.
const MAX_CODE: u32 = 255;

/// One of a container.
pub struct StandIn {
    pid: u32,
    /// Its socket is closed with this, and it ends then.
    tells: Mutex<Option<OwnedWriteHalf>>,
}

impl StandIn {
    /// Starts one for a container, as the pod's `user`, in `network` or in a network namespace of its own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(program: &Path, user: u32, network: Option<Arc<File>>, pod: Weak<Pod>, container: &str) -> Result<Self> {
        let opened = File::open(program).with_context(|| format!("open {} (task.path)", program.display()))?;
        let start = move || stand_in::start(&opened, user, network.as_ref().map(|network| network.as_fd()));
        let started = tokio::task::spawn_blocking(start).await.context("start a process")?;
        let stand_in::StandIn { process, socket } = started.with_context(|| format!("start {}", program.display()))?;
        let (hears, tells) = UnixStream::from_std(socket).context("watch a socket")?.into_split();
        let pid = process.id();
        tokio::spawn(follow(process, hears, pod, container.to_owned()));
        Ok(Self { pid, tells: Mutex::new(Some(tells)) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it end with a code, as the container has.
    pub fn end(&self, code: u32) {
        if let Some(tells) = lock(&self.tells).take() {
            // A byte fits, unless it is gone.
            let _ = tells.try_write(&[code.min(MAX_CODE) as u8]);
        }
    }
}

/// Passes its signals on until it ends, and collects it.
async fn follow(process: Process, mut hears: OwnedReadHalf, pod: Weak<Pod>, container: String) {
    let pass_on = async |signal: u32| {
        let Some(pod) = pod.upgrade() else { return };
        // The container may have ended itself meanwhile, or not be there yet.
        if pod.container(&container).is_ok_and(|container| container.init.exited().is_none())
            && let Err(error) = pod.kill(&container, "", signal, false).await
        {
            log::debug!("container {container}: signal {signal} of its process on the host: {error}");
        }
    };
    while let Ok(signal) = hears.read_u8().await {
        pass_on(signal.into()).await;
    }
    // It has ended, or does with its socket.
    let collected = tokio::task::spawn_blocking(move || process.collect()).await;
    log::debug!("container {container}: its process on the host: {collected:?}");
    pass_on(SIGKILL).await;
}
