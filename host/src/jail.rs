//! The jail that a host process of a pod puts itself into before it meets anything hostile.
//!
//! ```text
//! started by the shim (root, one thread, control socket at fd 3)
//!   └─ unshare: mount, pid, net, ipc, uts, cgroup (and user) namespaces
//!        └─ fork: the child is pid 1 of its namespace; the parent reports its id and ends
//!             └─ pivot into an empty or given root, change user, drop capabilities, no_new_privs; Landlock
//! ```
//!
//! The child is adopted by the shim, which is a child subreaper. Seccomp comes last and by thread:
//! see [`crate::seccomp`].
#![expect(unsafe_code, reason = "fork, close_range and what runs before a program starts have no safe wrapper")]

use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use caisson_sys::mounts::{self, Attributes};
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, fchdir, fork, pivot_root, setgroups, setresgid, setresuid};

use crate::control::CONTROL_FD;
use crate::rights;

/// A step of building the jail that failed.
#[derive(Debug, thiserror::Error)]
#[error("enter the jail: {step}")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

/// Names the step that an error comes from.
trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, JailError> {
        self.map_err(|source| JailError { step, source: source.into() })
    }
}

/// What a jail is like.
#[derive(Debug, Clone)]
pub enum Jail {
    /// An empty root, a user namespace in which only this user and group id exist, no capability.
    Empty {
        /// User and group id.
        id: u32,
    },
    /// The folder that the process was started in as its root, the root user with the capabilities that
    /// a file server for other users needs, and no more.
    CurrentFolder {
        /// Which users and groups of the host it is and acts for, in a user namespace that has no others;
        /// without, it is the host's own root.
        ids: Option<Range<u32>>,
    },
}

/// Threads of the machine's monitor: of its vCPUs, its disks' queues, and a few more.
const MAX_THREADS: u64 = 512;

/// Which process goes on after [`Jail::unshare`].
pub enum Side {
    /// The original process; the child has this id in its PID namespace.
    Outside(Pid),
    /// The child, first process of the new PID namespace.
    Inside(Inside),
}

/// A process in its namespaces, not yet in its root.
pub struct Inside(Jail);

impl Jail {
    /// Makes the namespaces and forks. The process must have one thread.
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn unshare(self) -> Result<Side, JailError> {
        close_others().step("close inherited descriptors")?;
        let namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP;
        match &self {
            Self::Empty { id } => unshare_with_users(namespaces, &format!("{id} {id} 1"))?,
            Self::CurrentFolder { ids: None } => unshare(namespaces).step("unshare namespaces")?,
            Self::CurrentFolder { ids: Some(ids) } => unshare_with_users(namespaces, &format!("0 {} {}", ids.start, ids.len()))?,
        }
        // SAFETY: there is one thread, so the child may go on running any code.
        match unsafe { fork() }.step("fork into the PID namespace")? {
            ForkResult::Parent { child } => Ok(Side::Outside(child)),
            ForkResult::Child => Ok(Side::Inside(Inside(self))),
        }
    }
}

impl Inside {
    /// Leaves the host's files, user and privileges behind.
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn enter(self) -> Result<(), JailError> {
        match self.0 {
            Jail::Empty { id } => {
                forbid_namespaces()?;
                mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).step("make mounts private")?;
                // Any folder serves to mount on; /proc is on every host.
                let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
                mount(Some("empty"), "/proc", Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555")).step("mount the empty root")?;
                chdir("/proc").step("enter the empty root")?;
                pivot_here()?;
                // While it is somebody who may.
                rights::bound(&[]).step("lower the capability bounding set")?;
                become_user(id)?;
                rights::keep_only(&[]).step("give up capabilities")?;
                for (resource, limit) in [(Resource::RLIMIT_NPROC, MAX_THREADS), (Resource::RLIMIT_MEMLOCK, 0)] {
                    setrlimit(resource, limit, limit).step("limit what it may use")?;
                }
                forbid_all().step("restrict it by Landlock")?;
            }
            Jail::CurrentFolder { ids } => {
                if ids.is_some() {
                    forbid_namespaces()?;
                }
                // Slave, not private: what the shim mounts into the share later must appear here.
                mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>).step("make mounts slaves")?;
                // A copy: a mount of another user namespace cannot become the root.
                let root = mounts::open_tree(AT_FDCWD, Path::new("."), true).step("copy the root")?;
                // The folders that the shim mounts on are the shim's: what is served is mounted there later,
                // with rights of its own.
                let read_only = Attributes::set(libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV);
                mounts::set_attributes(&root, read_only, false).step("make the root read-only (Linux 5.12 is needed)")?;
                mounts::move_mount(&root, Path::new(".")).step("mount the root")?;
                fchdir(&root).step("enter the root")?;
                drop(root);
                pivot_here()?;
                if ids.is_some() {
                    become_user(0)?;
                }
                rights::keep_only(rights::FILE_SERVER).step("give up capabilities")?;
            }
        }
        setrlimit(Resource::RLIMIT_CORE, 0, 0).step("forbid core dumps")?;
        nix::sys::prctl::set_dumpable(false).step("forbid tracing")?;
        nix::sys::prctl::set_no_new_privs().step("set no_new_privs")
    }
}

/// Lets nobody make a user namespace in our own: who does is root in it, and reaches more of the kernel than anybody here
/// needs. A filter cannot tell it from a thread's start, whose flags lie in memory (clone3(2)).
fn forbid_namespaces() -> Result<(), JailError> {
    std::fs::write("/proc/sys/user/max_user_namespaces", "0").step("forbid user namespaces")
}

/// Has the kernel refuse every access to files by path, TCP connections, abstract sockets and signals to others: a second
/// wall behind namespaces and an empty root, as far as the host's kernel knows it (landlock(7), Linux 5.13 and later).
fn forbid_all() -> io::Result<()> {
    let restrict = || {
        let known = ABI::V6;
        let ruleset = Ruleset::default().handle_access(AccessFs::from_all(known))?.handle_access(AccessNet::from_all(known))?;
        ruleset.scope(Scope::from_all(known))?.create()?.restrict_self()
    };
    restrict().map(drop).map_err(|error: RulesetError| io::Error::other(error))
}

/// Closes everything above the control socket: a jail inherits nothing by accident.
fn close_others() -> io::Result<()> {
    // SAFETY: nothing in this program owns a descriptor above the control socket yet.
    let result = unsafe { libc::syscall(libc::SYS_close_range, CONTROL_FD as libc::c_uint + 1, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Becomes a user and group of the own user namespace, and nobody else.
fn become_user(id: u32) -> Result<(), JailError> {
    setgroups(&[]).step("drop supplementary groups")?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setresgid(group, group, group).step("change group")?;
    setresuid(user, user, user).step("change user")
}

/// Unshares with a user namespace that has the users and groups of one line of its maps.
///
/// The map must be written by a process outside (user_namespaces(7)), so a helper is forked first.
fn unshare_with_users(namespaces: CloneFlags, line: &str) -> Result<(), JailError> {
    let parent = nix::unistd::getpid();
    let (mut ready, mut signal) = io::pipe().step("make a pipe")?;
    // SAFETY: there is one thread, so the child may go on running any code.
    match unsafe { fork() }.step("fork the helper that maps user ids")? {
        ForkResult::Child => {
            drop(signal);
            let mut byte = [0];
            let mapped = ready.read_exact(&mut byte).and_then(|()| {
                std::fs::write(format!("/proc/{parent}/uid_map"), line)?;
                std::fs::write(format!("/proc/{parent}/gid_map"), line)
            });
            std::process::exit(mapped.map_or_else(|error| error.raw_os_error().unwrap_or(255), |()| 0));
        }
        ForkResult::Parent { child } => {
            drop(ready);
            unshare(CloneFlags::CLONE_NEWUSER | namespaces).step("unshare namespaces")?;
            signal.write_all(&[0]).step("signal the helper that maps user ids")?;
            match waitpid(child, None).step("wait for the helper that maps user ids")? {
                nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
                nix::sys::wait::WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)).step("map user ids"),
                _ => Err(io::Error::other("the helper was killed")).step("map user ids"),
            }
        }
    }
}

/// Makes the current folder, a mount point, the root, and forgets the old root.
fn pivot_here() -> Result<(), JailError> {
    pivot_root(".", ".").step("pivot into the root")?;
    umount2(".", MntFlags::MNT_DETACH).step("detach the old root")?;
    chdir(Path::new("/")).step("enter the root")
}

/// Has a jailed process, whose standard error nobody sees, hand a panic's place and message in one
/// line to `end`, before it dies of it.
pub fn on_panic(end: impl Fn(String) + Send + Sync + 'static) {
    std::panic::set_hook(Box::new(move |panic| end(panic.to_string().replace('\n', " "))));
}

/// Lets a program that `command` starts have so many descriptors at most.
pub fn limit_descriptors(command: &mut Command, most: u64) {
    // SAFETY: setrlimit is async-signal-safe, and touches no memory.
    unsafe {
        command.pre_exec(move || {
            let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?;
            let limit = most.min(hard);
            Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)
        });
    }
}

/// Raises the limit of open descriptors to `wanted` or to what the host allows, whichever is less.
///
/// # Errors
/// When the host refuses even its own limit.
pub fn raise_descriptor_limit(wanted: u64) -> io::Result<u64> {
    let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = wanted.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard)?;
    Ok(limit)
}
