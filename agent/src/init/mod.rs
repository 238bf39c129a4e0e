//! A container's first process, from its specification to execve(2), and processes added to it.
//!
//! ```text
//! agent ──spawn──► outer: cgroup, user map ◄──────── agent writes the map
//!                    │    namespaces, fork ────────► Made(pid), and ends; PID 1 adopts the child
//!                    └─ inner: file system, terminal ─► Ready
//!                         waits for the word ◄─────── start
//!                         identity, seccomp, execve: the socket closes, which is the answer
//! ```
//!
//! Two processes because a PID namespace begins with the next child. Both are single-threaded, as
//! unshare(2) and fork(2) want it: the agent, which has threads, starts itself again. The standard
//! streams are the container's; the agent is at descriptor 3.
#![expect(unsafe_code, reason = "fork, and a socket that arrives as a descriptor by number")]

mod identity;
mod inside;
mod mounts;
mod namespaces;
mod program;
mod rootfs;
mod seccomp;
mod terminal;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::SigSet;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{ForkResult, Pid, fork};
use oci_spec::runtime::{LinuxIdMapping, Process, Spec};
use serde::{Deserialize, Serialize};

pub use self::mounts::flags_and_data;
pub use self::namespaces::id_map;
use crate::cgroup::Cgroup;

/// The agent's first argument when it is to become a container's process.
pub const WORD: &str = "container";
/// Descriptor of the socket to the agent, one message a packet.
pub const SOCKET_FD: i32 = 3;
/// The longest message: a sentence about what failed.
pub const MAX_MESSAGE: usize = 8 << 10;

/// The folder with a container's `config.json`, and its execs' processes.
pub fn bundle_dir(container: &str) -> PathBuf {
    Path::new("/run/caisson/bundles").join(container)
}

/// Where a container's specification lies.
pub fn spec_file(container: &str) -> PathBuf {
    bundle_dir(container).join("config.json")
}

/// Where its message lies of the layers that its root file system is made of, if it is.
pub fn layers_file(container: &str) -> PathBuf {
    bundle_dir(container).join("layers")
}

/// Where an exec's process object lies.
pub fn process_file(container: &str, exec: &str) -> PathBuf {
    bundle_dir(container).join(format!("exec-{exec}.json"))
}

/// What the new process tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Its user namespace is there and wants its map.
    MapUsers,
    /// The process exists and has this id.
    Made(i32),
    /// It waits to be started; the terminal's master comes along when it has one.
    Ready,
    /// It failed: one sentence.
    Failed(String),
}

/// The way to the agent.
struct Agent(OwnedFd);

impl Agent {
    fn report(&self, report: &Report, fd: Option<&File>) -> Result<()> {
        let message = serde_json::to_vec(report)?;
        if fd.is_none() {
            // What a container's seccomp profile surely allows.
            return nix::unistd::write(&self.0, &message).context("report to the agent").map(drop);
        }
        let slices = [std::io::IoSlice::new(&message)];
        let fds: Vec<i32> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.0.as_raw_fd(), &slices, &rights, MsgFlags::MSG_NOSIGNAL, None).context("report to the agent")?;
        Ok(())
    }

    /// Waits for the agent's word; false when there will be none.
    fn wait(&self) -> Result<bool> {
        let mut byte = [0];
        Ok(nix::unistd::read(&self.0, &mut byte).context("wait for the agent")? > 0)
    }
}

impl Agent {
    /// Closes the socket, which tells the agent that the program has begun.
    fn close(&self) {
        // Nothing will use it: what comes next is the program.
        let _ = nix::sys::socket::shutdown(self.0.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

/// The main of such a process; returns the exit code of what never became a program.
pub fn main(arguments: &[String]) -> i32 {
    // SAFETY: the agent started us with the socket at this descriptor, and nothing else owns it.
    let agent = Agent(unsafe { OwnedFd::from_raw_fd(SOCKET_FD) });
    match run(arguments, &agent) {
        Ok(()) => 0,
        Err(error) => {
            let mut sentence = format!("{error:#}").replace('\n', " ");
            sentence.truncate(sentence.floor_char_boundary(MAX_MESSAGE / 2));
            let _ = agent.report(&Report::Failed(sentence), None);
            1
        }
    }
}

fn run(arguments: &[String], agent: &Agent) -> Result<()> {
    // The container must not inherit the socket.
    nix::fcntl::fcntl(&agent.0, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).context("prepare the socket")?;
    // The agent's threads block all signals, and a program keeps the mask that it is started with.
    SigSet::empty().thread_set_mask().context("unblock signals")?;
    // What is in the container already must not reach through us to the agent's program or memory.
    nix::sys::prctl::set_dumpable(false).context("become undumpable")?;
    match arguments {
        [verb, id] if verb == "create" => create(id, agent),
        [verb, id, exec, pid] if verb == "exec" => execute(id, exec, Pid::from_raw(pid.parse().context("read the process id")?), agent),
        _ => bail!("started with arguments that it does not know"),
    }
}

fn create(id: &str, agent: &Agent) -> Result<()> {
    let spec = read_spec(id)?;
    let process = spec.process().as_ref().context("the specification has no process")?;
    Cgroup::of(id).enter()?;
    identity::set_limits(process)?;
    rootfs::set_network_sysctls(&spec)?;
    terminal::give_streams(guests_id(&spec, process.user().uid()))?;
    namespaces::make(&spec, || {
        agent.report(&Report::MapUsers, None)?;
        ensure!(agent.wait()?, "the user namespace was not mapped");
        Ok(())
    })?;
    in_child(agent, || {
        rootfs::enter(id, &spec)?;
        let console = wanted_terminal(process)?;
        if let Some(console) = &console {
            rootfs::add_console(console)?;
        }
        rootfs::seal(&spec)?;
        finish(id, process, &spec, console, agent, !program::is_of_a_pod(&spec))
    })
}

fn execute(id: &str, exec: &str, target: Pid, agent: &Agent) -> Result<()> {
    let spec = read_spec(id)?;
    let file = process_file(id, exec);
    let process: Process = serde_json::from_slice(&std::fs::read(&file).with_context(|| format!("read {}", file.display()))?)
        .context("read the exec's process")?;
    Cgroup::of(id).enter()?;
    identity::set_limits(&process)?;
    terminal::give_streams(guests_id(&spec, process.user().uid()))?;
    namespaces::join(&spec, target)?;
    in_child(agent, || {
        let console = wanted_terminal(&process)?;
        finish(id, &process, &spec, console, agent, false)
    })
}

/// The guest's id of a user of the container: another one when that has users of its own. What is to be theirs is
/// given to them before, as within their namespace nobody owns it.
fn guests_id(spec: &Spec, user: u32) -> u32 {
    let mappings = spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_ref()).map(Vec::as_slice).unwrap_or_default();
    let mapped = |range: &LinuxIdMapping| {
        let offset = user.checked_sub(range.container_id()).filter(|offset| *offset < range.size())?;
        range.host_id().checked_add(offset)
    };
    mappings.iter().find_map(mapped).unwrap_or(user)
}

fn wanted_terminal(process: &Process) -> Result<Option<terminal::Terminal>> {
    process.terminal().unwrap_or_default().then(terminal::open).transpose()
}

fn read_spec(id: &str) -> Result<Spec> {
    let file = spec_file(id);
    let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_slice(&text).context("read the container's specification")
}

/// Goes on in a child, which is in the new PID namespace, and reports it.
fn in_child(agent: &Agent, work: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: this process has one thread, so the child may do whatever the parent may.
    match unsafe { fork() }.context("fork the container's process")? {
        ForkResult::Parent { child } => agent.report(&Report::Made(child.as_raw()), None),
        ForkResult::Child => work(),
    }
}

/// Waits for the word and becomes the program; returns only with an error.
///
/// A container of its own is run as from a shell, where a program that is not there is exit code
/// 127; a container of a pod, or an exec, then fails to start.
fn finish(id: &str, process: &Process, spec: &Spec, console: Option<terminal::Terminal>, agent: &Agent, as_shell: bool) -> Result<()> {
    nix::unistd::setsid().context("start a session")?;
    identity::join_keyring(id);
    let master = console.map(|console| console.attach(process)).transpose()?;
    agent.report(&Report::Ready, master.as_ref())?;
    drop(master);
    if !program::is_pause(process, spec) {
        program::read_ahead(process);
    }
    if !agent.wait()? {
        // Deleted before it was started.
        return Ok(());
    }
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let environment = program::environment(process)?;
    // The image's owner may keep the folder from the process's user, and may not.
    let entered = program::enter_folder(process);
    identity::assume(process, seccomp)?;
    if entered.is_err() {
        program::enter_folder(process)?;
    }
    if program::is_pause(process, spec) {
        // As execve would.
        agent.close();
        return program::pause();
    }
    program::execute(process, &environment, as_shell)
}
