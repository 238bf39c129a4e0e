//! Processes by handle (pidfd_open(2), Linux 5.3): a process id belongs to another process once it was collected, a
//! handle never does.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, prlimit, waitid};

/// A process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    handle: OwnedFd,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "ended with code {code}"),
            Self::Killed(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by {signal}"),
                // Those for real time have no names.
                Err(_) => write!(f, "was killed by signal {number}"),
            },
        }
    }
}

impl Process {
    /// The process that has this id now. Of a child that nobody else collects, it is that child.
    ///
    /// # Errors
    /// When there is none, or no descriptor is left.
    pub fn open(pid: u32) -> io::Result<Self> {
        let id = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { pid, handle: pidfd_open(id, PidfdFlags::empty())? })
    }

    /// Its id; another process may have it after this one was collected.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// `ESRCH` when it has ended and was collected, and `EPERM` when it is not ours to signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.handle, signal)?)
    }

    /// Kills it; it may be gone.
    pub fn kill(&self) {
        // A process that is gone, or was collected, needs no signal.
        let _ = self.signal(Signal::KILL);
    }

    /// Lets it write files of so many bytes and no longer ones (getrlimit(2), `RLIMIT_FSIZE`).
    ///
    /// # Errors
    /// When it has ended, or is not ours to limit.
    pub fn limit_files(&self, bytes: u64) -> io::Result<()> {
        let id = Pid::from_raw(self.pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
        // prlimit(2) takes an id. One that has ended may be collected, and its id another's.
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&now))? > 0 {
            return Err(Errno::SRCH.into());
        }
        prlimit(Some(id), Resource::Fsize, Rlimit { current: Some(bytes), maximum: None })?;
        Ok(())
    }

    /// Waits for its end and collects it, as its parent.
    ///
    /// # Errors
    /// `ECHILD` when it is not our child, or was collected.
    pub fn collect(&self) -> io::Result<End> {
        loop {
            match waitid(WaitId::PidFd(self.handle.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    return Ok(status.terminating_signal().map_or_else(|| End::Exited(status.exit_status().unwrap_or(0)), End::Killed));
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleep() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn how_a_process_ended_is_told() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        assert_eq!(Process::open(child.id()).unwrap().collect().unwrap(), End::Exited(7));
        // It was collected.
        assert!(child.wait().is_err());
        let process = Process::open(sleep().id()).unwrap();
        process.kill();
        let end = process.collect().unwrap();
        assert_eq!((end, end.to_string().as_str()), (End::Killed(9), "was killed by SIGKILL"));
    }

    /// Starts a process that has a given id; `None` where we may not choose it.
    fn sleep_as(pid: u32) -> Option<Child> {
        for _ in 0..1000 {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
            let mut child = sleep();
            if child.id() == pid {
                return Some(child);
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
        None
    }

    #[test]
    fn a_process_writes_no_longer_files_than_it_is_let_to_until_it_has_ended() {
        let mut child = sleep();
        let process = Process::open(child.id()).unwrap();
        process.limit_files(4096).unwrap();
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max file size")).unwrap();
        assert_eq!(line.split_whitespace().nth(3), Some("4096"), "{line}");
        child.kill().unwrap();
        while process.limit_files(4096).is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert_eq!(process.limit_files(4096).unwrap_err().raw_os_error(), Some(Errno::SRCH.raw_os_error()));
    }

    #[test]
    fn a_process_that_has_the_id_of_one_that_was_collected_is_not_killed() {
        let process = Process::open(sleep().id()).unwrap();
        process.kill();
        process.collect().unwrap();
        assert_eq!(process.signal(Signal::KILL).unwrap_err().raw_os_error(), Some(Errno::SRCH.raw_os_error()));
        // Only root may choose a process id; the line above holds for everybody.
        let Some(mut stranger) = sleep_as(process.id()) else { return };
        process.kill();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(stranger.try_wait().unwrap(), None);
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
