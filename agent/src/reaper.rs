//! Collects every child that exits: PID 1 is the parent of all orphans.
//!
//! A process is often known only after it has exited (its helper reports its id late), so the
//! exits of processes that nobody has asked for yet are kept for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Exits of unknown processes that are kept.
const KEPT: usize = 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0-255; 128 + signal for a killed process.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at_ns: u64,
}

#[derive(Default)]
struct State {
    waiting: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: VecDeque<(i32, Exit)>,
}

/// The collector of exits.
#[derive(Clone)]
pub struct Reaper(Arc<Mutex<State>>);

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

    /// The exit of a process, now or when it comes.
    pub fn watch(&self, pid: Pid) -> watch::Receiver<Option<Exit>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.unclaimed.iter().position(|(other, _)| *other == pid.as_raw()).and_then(|index| state.unclaimed.remove(index));
        let (sender, receiver) = watch::channel(known.map(|(_, exit)| exit));
        if known.is_none() {
            state.waiting.insert(pid.as_raw(), sender);
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
            let at_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            self.record(pid, Exit { status, at_ns });
        }
    }

    fn record(&self, pid: Pid, exit: Exit) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = state.waiting.remove(&pid.as_raw()) {
            sender.send_replace(Some(exit));
            return;
        }
        if state.unclaimed.len() == KEPT {
            state.unclaimed.pop_front();
        }
        state.unclaimed.push_back((pid.as_raw(), exit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exit_is_found_before_and_after_it_is_asked_for() {
        let reaper = Reaper(Arc::default());
        let exit = Exit { status: 3, at_ns: 1 };
        reaper.record(Pid::from_raw(10), exit);
        assert_eq!(*reaper.watch(Pid::from_raw(10)).borrow(), Some(exit));
        let mut later = reaper.watch(Pid::from_raw(11));
        reaper.record(Pid::from_raw(11), exit);
        assert_eq!(*later.wait_for(Option::is_some).await.unwrap(), Some(exit));
    }

    #[test]
    fn exits_that_nobody_asks_for_are_bounded() {
        let reaper = Reaper(Arc::default());
        for pid in 0..2 * KEPT as i32 {
            reaper.record(Pid::from_raw(pid), Exit { status: 0, at_ns: 0 });
        }
        assert_eq!(reaper.0.lock().unwrap().unclaimed.len(), KEPT);
    }
}
