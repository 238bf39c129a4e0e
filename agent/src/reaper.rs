//! Collects every child that exits: PID 1 is the parent of all orphans.
//!
//! A process is asked for while it waits to be started, so its exit is never collected before; the
//! exits of all others are forgotten, and a number that the kernel gives out again means nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0-255; 128 + signal for a killed process.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at_ns: u64,
}

impl Exit {
    fn now(status: u32) -> Self {
        let at_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        Self { status, at_ns }
    }
}

/// The collector of exits.
#[derive(Clone)]
pub struct Reaper(Arc<Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>>);

impl Reaper {
    /// Starts collecting, on the current runtime.
    ///
    /// # Errors
    /// When signals cannot be watched.
    pub fn start() -> std::io::Result<Self> {
        let reaper = Self(Arc::default());
        let mut children = signal(SignalKind::child())?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                collector.collect();
            }
        });
        Ok(reaper)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exit of a process that waits to be started. Called where exits are collected, on the
    /// runtime's one thread.
    pub fn watch(&self, pid: Pid) -> watch::Receiver<Option<Exit>> {
        let (sender, receiver) = watch::channel(None);
        if sys::kill(pid, 0) == Err(Errno::ESRCH) {
            // Somebody killed it while it waited, and it was collected.
            sender.send_replace(Some(Exit::now(128 + libc::SIGKILL.unsigned_abs())));
        } else {
            self.lock().insert(pid.as_raw(), sender);
        }
        receiver
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code.unsigned_abs() & 0xff),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + (signal as i32).unsigned_abs()),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(_) => continue,
            };
            if let Some(sender) = self.lock().remove(&pid.as_raw()) {
                sender.send_replace(Some(Exit::now(status)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "the reaper collects it")]
    async fn a_watched_child_is_collected_and_one_that_is_gone_was_killed() {
        let reaper = Reaper::start().unwrap();
        let mut child =
            std::process::Command::new("sh").args(["-c", "read line; exit 3"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut exit = reaper.watch(pid);
        drop(child.stdin.take());
        assert_eq!(exit.wait_for(Option::is_some).await.unwrap().unwrap().status, 3);
        assert_eq!(reaper.watch(pid).borrow().unwrap().status, 137);
    }
}
