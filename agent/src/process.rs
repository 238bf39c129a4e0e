//! One process of a container: its standard streams, its helper, its exit.
//!
//! ```text
//! container's own:  Created (waits in the helper) -> Running -> exited
//! exec:             Registered -> Running -> exited
//! ```

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use caisson_protocol::agent::Stdio as Ports;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::helper::{self, REPORT_FD, Report};
use crate::streams;

/// How long a helper may take. The shim's own time-out is shorter; this one ends a stuck thread.
const HELPER_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the terminal may take to arrive once the process exists.
const TERMINAL_TIMEOUT_MS: u16 = 10_000;

/// The agent's ends of a process's streams, before they are carried to the host.
enum Ends {
    Terminal(UnixListener),
    Pipes { stdin: Option<File>, stdout: Option<File>, stderr: Option<File> },
}

/// A process that was made.
pub struct Made {
    /// Its id in the guest.
    pub pid: Pid,
    /// The helper, when it waits to be told to start.
    pub helper: Helper,
    /// The terminal's master side.
    pub terminal: Option<File>,
}

/// The way to a running helper.
pub struct Helper(BufReader<UnixStream>);

impl Helper {
    /// Tells the helper of a created container to start it.
    ///
    /// # Errors
    /// What the library could not do.
    pub fn start(mut self) -> Result<()> {
        self.0.get_mut().write_all(b"s").context("tell the helper to start the container")?;
        match self.report()? {
            Report::Started => Ok(()),
            Report::Failed(reason) => bail!("{reason}"),
            Report::Made(_) => bail!("the helper reported twice"),
        }
    }

    fn report(&mut self) -> Result<Report> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("wait for the helper")?;
        if line.is_empty() {
            bail!("the helper ended without a report");
        }
        serde_json::from_str(&line).context("read the helper's report")
    }
}

/// Makes a container's own process (`exec` empty) or an exec, and carries its streams.
///
/// Blocks until the process exists: call it where blocking is allowed.
///
/// # Errors
/// What could not be made, and why, in one sentence.
pub fn make(container: &str, exec: &str, ports: &Ports) -> Result<Made> {
    let (ends, stdio) = prepare(container, exec, ports)?;
    let mut helper = spawn(container, exec, ports.terminal, stdio)?;
    let pid = match helper.report()? {
        Report::Made(pid) => Pid::from_raw(pid),
        Report::Failed(reason) => bail!("{reason}"),
        Report::Started => bail!("the helper started what was not made"),
    };
    match carry(ends, ports) {
        Ok(terminal) => Ok(Made { pid, helper, terminal }),
        Err(error) => {
            // Nobody would hear from it.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            Err(error)
        }
    }
}

/// The ends of the streams: ours, and those that the helper gets as its own.
fn prepare(container: &str, exec: &str, ports: &Ports) -> Result<(Ends, [Stdio; 3])> {
    if ports.terminal {
        let path = helper::console_socket(container, exec);
        let listener = UnixListener::bind(&path).context("make the terminal's socket")?;
        return Ok((Ends::Terminal(listener), [Stdio::null(), Stdio::null(), Stdio::null()]));
    }
    let (stdin, child_stdin) = if ports.stdin == 0 {
        (None, Stdio::null())
    } else {
        let (reader, writer) = std::io::pipe().context("make the pipe of standard input")?;
        (Some(File::from(OwnedFd::from(writer))), reader.into())
    };
    let output = |port: u32| -> Result<(Option<File>, Stdio)> {
        if port == 0 {
            return Ok((None, Stdio::null()));
        }
        let (reader, writer) = std::io::pipe().context("make the pipe of standard output")?;
        Ok((Some(File::from(OwnedFd::from(reader))), writer.into()))
    };
    let (stdout, child_stdout) = output(ports.stdout)?;
    let (stderr, child_stderr) = output(ports.stderr)?;
    Ok((Ends::Pipes { stdin, stdout, stderr }, [child_stdin, child_stdout, child_stderr]))
}

#[expect(unsafe_code, reason = "the report socket must be at a known descriptor after exec")]
fn spawn(container: &str, exec: &str, terminal: bool, [stdin, stdout, stderr]: [Stdio; 3]) -> Result<Helper> {
    let (ours, theirs) = UnixStream::pair().context("make the helper's socket")?;
    ours.set_read_timeout(Some(HELPER_TIMEOUT))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(helper::WORD);
    if exec.is_empty() {
        command.args(["create", container])
    } else {
        command.args(["exec", container, exec])
    };
    command.arg(if terminal { "terminal" } else { "pipes" });
    command.env_clear().current_dir("/").stdin(stdin).stdout(stdout).stderr(stderr);
    let report = theirs.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and `theirs` lives until the child has been started.
    unsafe {
        command.pre_exec(move || {
            if report == REPORT_FD {
                // Already in place: only the close-on-exec flag is in the way.
                libc::fcntl(report, libc::F_SETFD, 0);
            } else if libc::dup2(report, REPORT_FD) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    // The reaper collects it, as it does all children.
    command.spawn().context("start the helper")?;
    Ok(Helper(BufReader::new(ours)))
}

/// Starts to carry the streams; returns the terminal, for resizing.
fn carry(ends: Ends, ports: &Ports) -> Result<Option<File>> {
    match ends {
        Ends::Terminal(listener) => {
            let terminal = receive_terminal(&listener).context("receive the terminal")?;
            if let Ok(address) = listener.local_addr()
                && let Some(path) = address.as_pathname()
            {
                remove(path);
            }
            if ports.stdin != 0 {
                streams::pump_terminal(ports.stdin, terminal.try_clone()?).context("connect the terminal")?;
            }
            Ok(Some(terminal))
        }
        Ends::Pipes { stdin, stdout, stderr } => {
            if let Some(stdin) = stdin {
                streams::pump_in(ports.stdin, stdin).context("connect standard input")?;
            }
            if let Some(stdout) = stdout {
                streams::pump_out(ports.stdout, stdout).context("connect standard output")?;
            }
            if let Some(stderr) = stderr {
                streams::pump_out(ports.stderr, stderr).context("connect standard error")?;
            }
            Ok(None)
        }
    }
}

/// The library sends the terminal's master over the socket as soon as it has made it.
#[expect(unsafe_code, reason = "a descriptor that arrives by SCM_RIGHTS is a raw number that we take ownership of")]
fn receive_terminal(listener: &UnixListener) -> Result<File> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::FromRawFd;

    let wait = |fd: std::os::fd::BorrowedFd<'_>| -> Result<()> {
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(TERMINAL_TIMEOUT_MS))? == 0 {
            bail!("it did not arrive within {TERMINAL_TIMEOUT_MS} ms");
        }
        Ok(())
    };
    wait(listener.as_fd())?;
    let (socket, _) = listener.accept()?;
    wait(socket.as_fd())?;
    let mut buffer = [0; 64];
    let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for cmsg in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = cmsg
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
            return Ok(File::from(unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    bail!("the message carried no descriptor")
}

/// Removes a file that may be gone already.
fn remove(path: &Path) {
    let _ = std::fs::remove_file(path);
}
