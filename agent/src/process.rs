//! One process of a container, as the agent sees it: its standard streams, its way into life.
//!
//! ```text
//! container's own:  Created (waits in `init`) -> Running -> exited
//! exec:             Registered -> Running -> exited
//! ```

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use caisson_protocol::agent::Stdio as Ports;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, setsockopt, socketpair, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;

use crate::init::{self, Report, SOCKET_FD};
use crate::streams;

/// How long a new process may take for one step. The shim's own time-out is shorter; this one ends
/// a stuck thread.
const STEP_TIMEOUT_S: i64 = 120;

/// A process that was made and waits to be started.
pub struct Made {
    /// Its id in the guest.
    pub pid: Pid,
    /// The way to it.
    pub starter: Starter,
    /// The terminal's master side.
    pub terminal: Option<File>,
}

/// The socket to a process that is not a program yet.
pub struct Starter(OwnedFd);

impl Starter {
    /// Lets the process become its program.
    ///
    /// # Errors
    /// What the process could not do before it was its program.
    pub fn start(self) -> Result<()> {
        self.go()?;
        match self.receive()? {
            // The program has begun: the socket was closed with it.
            None => Ok(()),
            Some((Report::Failed(reason), _)) => bail!("{reason}"),
            Some((report, _)) => bail!("the new process said {report:?} when it was started"),
        }
    }

    /// Waits until the process exists and is ready; returns its id and its terminal's master side.
    ///
    /// Two processes report: which of them is heard first is chance.
    fn hear(&self, map_users: impl Fn() -> Result<()>) -> Result<(Pid, Option<File>)> {
        let (mut pid, mut ready, mut terminal) = (None, false, None);
        loop {
            match self.receive()? {
                Some((Report::MapUsers, _)) => {
                    map_users()?;
                    self.go()?;
                }
                Some((Report::Made(number), _)) => pid = Some(Pid::from_raw(number)),
                Some((Report::Ready, master)) => (ready, terminal) = (true, master),
                Some((Report::Failed(reason), _)) => bail!("{reason}"),
                None => bail!("the new process was killed before it could be started"),
            }
            if let Some(pid) = pid
                && ready
            {
                return Ok((pid, terminal));
            }
        }
    }

    fn go(&self) -> Result<()> {
        nix::unistd::write(&self.0, b"s").context("give the new process its word").map(drop)
    }

    /// The next report; `None` when the process has closed the socket.
    #[expect(unsafe_code, reason = "a descriptor that arrives by SCM_RIGHTS is a raw number that we take ownership of")]
    fn receive(&self) -> Result<Option<(Report, Option<File>)>> {
        let mut buffer = vec![0; init::MAX_MESSAGE];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message = loop {
            match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => break message,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => bail!("the new process did not answer within {STEP_TIMEOUT_S} s"),
                // It was killed with our word unread.
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(errno).context("hear from the new process"),
            }
        };
        let mut file = None;
        for cmsg in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = cmsg {
                // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                file = fds.into_iter().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })).next();
            }
        }
        let size = message.bytes;
        if size == 0 {
            return Ok(None);
        }
        let report = serde_json::from_slice(&buffer[..size]).context("read the new process's report")?;
        Ok(Some((report, file)))
    }
}

/// Makes a container's own process; its bundle and cgroup are there.
///
/// Blocks until it waits to be started: call it where blocking is allowed.
///
/// # Errors
/// What could not be made, and why, in one sentence.
pub fn make_container(container: &str, spec: &Spec, ports: &Ports) -> Result<Made> {
    make(&["create", container], ports, Some(spec))
}

/// Makes a process in a running container, whose own process is `target`.
///
/// # Errors
/// As [`make_container`].
pub fn make_exec(container: &str, exec: &str, target: Pid, ports: &Ports) -> Result<Made> {
    make(&["exec", container, exec, &target.to_string()], ports, None)
}

fn make(arguments: &[&str], ports: &Ports, spec: Option<&Spec>) -> Result<Made> {
    let (pipes, stdio) = Pipes::make(ports)?;
    let (starter, outer) = spawn(arguments, stdio)?;
    let (pid, terminal) = starter.hear(|| write_user_map(outer, spec.context("an exec asked for a user map")?))?;
    // Dropping the starter ends the process: it waits for a word that will not come.
    pipes.carry(ports, terminal.as_ref())?;
    Ok(Made { pid, starter, terminal })
}

/// Writes the map of a process's new user namespace, which its parent's root must do.
fn write_user_map(pid: u32, spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref().context("the specification has no linux section")?;
    for (file, mappings) in [("gid_map", linux.gid_mappings()), ("uid_map", linux.uid_mappings())] {
        let map = init::id_map(mappings.as_deref().unwrap_or_default());
        std::fs::write(format!("/proc/{pid}/{file}"), &map).with_context(|| format!("write the user namespace's {file} {map:?}"))?;
    }
    Ok(())
}

/// The agent's ends of a process's pipes.
struct Pipes {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Pipes {
    /// Our ends, and those that the process gets as its own. A terminal comes later, from within.
    fn make(ports: &Ports) -> Result<(Self, [Stdio; 3])> {
        if ports.terminal {
            return Ok((Self { stdin: None, stdout: None, stderr: None }, [Stdio::null(), Stdio::null(), Stdio::null()]));
        }
        let (stdin, child_stdin) = if ports.stdin == 0 {
            (None, Stdio::null())
        } else {
            let (reader, writer) = io::pipe().context("make the pipe of standard input")?;
            (Some(File::from(OwnedFd::from(writer))), reader.into())
        };
        let output = |port: u32| -> Result<(Option<File>, Stdio)> {
            if port == 0 {
                return Ok((None, Stdio::null()));
            }
            let (reader, writer) = io::pipe().context("make the pipe of standard output")?;
            Ok((Some(File::from(OwnedFd::from(reader))), writer.into()))
        };
        let (stdout, child_stdout) = output(ports.stdout)?;
        let (stderr, child_stderr) = output(ports.stderr)?;
        Ok((Self { stdin, stdout, stderr }, [child_stdin, child_stdout, child_stderr]))
    }

    /// Starts to carry the streams to and from the host.
    fn carry(self, ports: &Ports, terminal: Option<&File>) -> Result<()> {
        if let Some(terminal) = terminal.filter(|_| ports.stdin != 0) {
            streams::pump_terminal(ports.stdin, terminal.try_clone()?).context("connect the terminal")?;
        }
        if let Some(stdin) = self.stdin {
            streams::pump_in(ports.stdin, stdin).context("connect standard input")?;
        }
        if let Some(stdout) = self.stdout {
            streams::pump_out(ports.stdout, stdout).context("connect standard output")?;
        }
        if let Some(stderr) = self.stderr {
            streams::pump_out(ports.stderr, stderr).context("connect standard error")?;
        }
        Ok(())
    }
}

/// Starts the agent's program as a container's process; returns the way to it and its id.
#[expect(unsafe_code, reason = "the socket must be at a known descriptor after exec")]
fn spawn(arguments: &[&str], [stdin, stdout, stderr]: [Stdio; 3]) -> Result<(Starter, u32)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).context("make the new process's socket")?;
    setsockopt(&ours, ReceiveTimeout, &TimeVal::seconds(STEP_TIMEOUT_S)).context("bound the wait for the new process")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(init::WORD).args(arguments).env_clear().current_dir("/").stdin(stdin).stdout(stdout).stderr(stderr);
    let socket = theirs.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe, and `theirs` lives until the child has been started.
    unsafe {
        command.pre_exec(move || {
            if socket == SOCKET_FD {
                // Already in place: only the close-on-exec flag is in the way.
                libc::fcntl(socket, libc::F_SETFD, 0);
            } else if libc::dup2(socket, SOCKET_FD) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    // The reaper collects it, as it does all children.
    let child = command.spawn().context("start the new process")?;
    Ok((Starter(ours), child.id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_heard_of_in_whichever_order_it_reports() {
        let (made, ready) = (Report::Made(7), Report::Ready);
        for reports in [[&made, &ready], [&ready, &made]] {
            let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
            for report in reports {
                nix::unistd::write(&theirs, &serde_json::to_vec(report).unwrap()).unwrap();
            }
            drop(theirs);
            let (pid, terminal) = Starter(ours).hear(|| bail!("not asked for")).unwrap();
            assert!(pid == Pid::from_raw(7) && terminal.is_none());
        }
    }
}
