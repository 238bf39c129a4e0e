//! A process's terminal: a pair in the container's own devpts.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::unistd::{Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchown};
use oci_spec::runtime::Process;

use crate::sys;

/// A new terminal.
pub struct Terminal {
    master: File,
    slave: File,
}

/// Opens a terminal of the mount namespace that we are in.
///
/// # Errors
/// When the container has no devpts.
pub fn open() -> Result<Terminal> {
    let open = |path: &str| File::options().read(true).write(true).open(path);
    let master = open("/dev/pts/ptmx").or_else(|_| open("/dev/ptmx")).context("open a terminal (/dev/pts/ptmx)")?;
    let slave = sys::open_terminal_peer(&master).context("open the terminal's other end")?;
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// The process's end.
    pub fn slave(&self) -> &File {
        &self.slave
    }

    /// Makes it the standard streams and the controlling terminal of our session; returns the master.
    ///
    /// # Errors
    /// When the session has another one.
    pub fn attach(self, process: &Process) -> Result<File> {
        if let Some(size) = process.console_size() {
            let limit = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
            sys::set_terminal_size(&self.master, limit(size.width()), limit(size.height())).context("set the terminal's size")?;
        }
        sys::control_terminal(&self.slave).context("make the terminal the session's")?;
        dup2_stdin(&self.slave).context("attach the terminal")?;
        dup2_stdout(&self.slave).context("attach the terminal")?;
        dup2_stderr(&self.slave).context("attach the terminal")?;
        Ok(self.master)
    }
}

/// Gives the standard streams to the user that will use them: programs open `/dev/stderr` again.
///
/// # Errors
/// When the kernel refuses for another reason than that a stream cannot be given away.
pub fn give_streams(uid: u32) -> Result<()> {
    let null = nix::sys::stat::stat(Path::new("/dev/null")).map(|stat| stat.st_rdev).ok();
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let stat = nix::sys::stat::fstat(stream).context("look at a standard stream")?;
        if Some(stat.st_rdev) == null || stat.st_uid == uid {
            continue;
        }
        match fchown(stream, Some(Uid::from_raw(uid)), None::<Gid>) {
            // Of a user or a file system that knows no owner of ours.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EPERM | nix::errno::Errno::EROFS) => {}
            Err(errno) => return Err(errno).context("give a standard stream to its user"),
        }
    }
    Ok(())
}
