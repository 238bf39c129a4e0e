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

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use caisson_sys::mounts;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
    path_beneath_rules,
};
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, fork, pivot_root, setgroups, setresgid, setresuid};

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

/// The monitor's jail: an empty root, a user namespace in which only this user and group id exist, no capability.
pub struct Empty {
    /// User and group id.
    pub id: u32,
}

/// The file server's jail: the pod's share as its root, the root user with the capabilities that a file server for other
/// users needs, and no more.
pub struct Share {
    /// The mount that becomes the root, attached nowhere yet.
    pub root: OwnedFd,
    /// Which users and groups of the host it is and acts for, in a user namespace that has no others;
    /// without, it is the host's own root.
    pub ids: Option<Range<u32>>,
}

/// Threads of the machine's monitor: of its vCPUs, its disks' queues, and a few more.
const MAX_THREADS: u64 = 512;

/// Which process goes on after the namespaces were made.
pub enum Side<J> {
    /// The original process; the child has this id in its PID namespace.
    Outside(Pid),
    /// The child, first process of the new PID namespace.
    Inside(Inside<J>),
}

/// A process in its namespaces, not yet in its root.
pub struct Inside<J>(J);

/// What the file server keeps when it has entered its jail.
pub struct Kept {
    /// `/proc/self/fd`, a mount of its own: nothing is above it, and nothing but the server's descriptors is in it.
    pub descriptors: OwnedFd,
    /// The mount namespace, for the shim to mount into.
    pub namespace: File,
}

const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWCGROUP);

impl Empty {
    /// Makes the namespaces and forks. The process must have one thread.
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn unshare(self) -> Result<Side<Self>, JailError> {
        close_inherited()?;
        unshare_with_users(&format!("{0} {0} 1", self.id))?;
        fork_into(self)
    }
}

impl Share {
    /// Makes the namespaces and forks. The process must have one thread, and have called [`close_inherited`].
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn unshare(self) -> Result<Side<Self>, JailError> {
        match &self.ids {
            None => unshare(NAMESPACES).step("unshare namespaces")?,
            Some(ids) => unshare_with_users(&format!("0 {} {}", ids.start, ids.len()))?,
        }
        fork_into(self)
    }
}

fn fork_into<J>(jail: J) -> Result<Side<J>, JailError> {
    // SAFETY: there is one thread, so the child may go on running any code.
    match unsafe { fork() }.step("fork into the PID namespace")? {
        ForkResult::Parent { child } => Ok(Side::Outside(child)),
        ForkResult::Child => Ok(Side::Inside(Inside(jail))),
    }
}

impl Inside<Empty> {
    /// Leaves the host's files, user and privileges behind.
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn enter(self) -> Result<(), JailError> {
        forbid_namespaces()?;
        part_from_host()?;
        // Any folder serves to mount on; /proc is on every host.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
        mount(Some("empty"), "/proc", Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555")).step("mount the empty root")?;
        pivot_into("/proc")?;
        // While it is somebody who may.
        rights::bound(&[]).step("lower the capability bounding set")?;
        become_user(self.0.id)?;
        rights::keep_only(&[]).step("give up capabilities")?;
        for (resource, limit) in [(Resource::RLIMIT_NPROC, MAX_THREADS), (Resource::RLIMIT_MEMLOCK, 0)] {
            setrlimit(resource, limit, limit).step("limit what it may use")?;
        }
        // Until it has a disk; the shim sets how large a file it may write. Its filters keep it from that.
        setrlimit(Resource::RLIMIT_FSIZE, 0, RLIM_INFINITY).step("limit what it may write")?;
        forbid_all().step("restrict it by Landlock")?;
        seal()
    }
}

impl Inside<Share> {
    /// Leaves the host's files and privileges behind; nothing of the host is connected with what the process has open
    /// then.
    ///
    /// # Errors
    /// The step that failed; the process is then of no use.
    pub fn enter(self) -> Result<Kept, JailError> {
        let Share { root, ids } = self.0;
        let namespace = File::open("/proc/self/ns/mnt").step("open the mount namespace")?;
        if ids.is_some() {
            forbid_namespaces()?;
        }
        part_from_host()?;
        // One that knows this PID namespace alone, over the host's.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
        mount(Some("proc"), "/proc", Some("proc"), flags, Some("subset=pid")).step("mount /proc (Linux 5.8 is needed)")?;
        let descriptors = mounts::open_tree(AT_FDCWD, Path::new("/proc/self/fd"), false).step("take /proc/self/fd out of it")?;
        mounts::move_mount(&root, Path::new("/proc")).step("mount the root")?;
        drop(root);
        pivot_into("/proc")?;
        if ids.is_some() {
            become_user(0)?;
        }
        rights::keep_only(rights::FILE_SERVER).step("give up capabilities")?;
        keep_below(Path::new("/"), ABI::V6).step("restrict it by Landlock")?;
        seal()?;
        Ok(Kept { descriptors, namespace })
    }
}

/// What a process of either kind gives up last.
fn seal() -> Result<(), JailError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).step("forbid core dumps")?;
    nix::sys::prctl::set_dumpable(false).step("forbid tracing")?;
    nix::sys::prctl::set_no_new_privs().step("set no_new_privs")
}

/// Keeps what is done with mounts here from the host, and what is done there from here.
fn part_from_host() -> Result<(), JailError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).step("make mounts private")
}

/// Has the kernel refuse every access to files that are not below `root`, TCP connections, abstract sockets and signals to
/// others: a second wall, as far as the host's kernel knows it, up to `known` (landlock(7)).
///
/// The first kernels that know it (Linux 5.13 to 5.18) would refuse to move and link files from folder to folder, which
/// no rule of theirs allows: there is no second wall there.
fn keep_below(root: &Path, known: ABI) -> io::Result<()> {
    let restrict = || {
        // It is an error where the kernel does not know it, or is not to be asked for it.
        let refer = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
        if known < ABI::V2 || refer.and_then(Ruleset::create).is_err() {
            return Ok(());
        }
        let all = AccessFs::from_all(known);
        let mut ruleset = Ruleset::default().handle_access(all)?;
        if known >= ABI::V6 {
            ruleset = ruleset.handle_access(AccessNet::from_all(known))?.scope(Scope::from_all(known))?;
        }
        ruleset.create()?.add_rules(path_beneath_rules([root], all))?.restrict_self().map(drop)
    };
    restrict().map_err(|error: RulesetError| io::Error::other(error))
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

/// Closes everything above the control socket: a jail inherits nothing by accident. To be called first thing in `main`.
///
/// # Errors
/// When the kernel does not know how (Linux 5.9 is needed).
pub fn close_inherited() -> Result<(), JailError> {
    // SAFETY: nothing in this program owns a descriptor above the control socket yet.
    let result = unsafe { libc::syscall(libc::SYS_close_range, CONTROL_FD as libc::c_uint + 1, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).step("close inherited descriptors") }
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
fn unshare_with_users(line: &str) -> Result<(), JailError> {
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
            unshare(CloneFlags::CLONE_NEWUSER | NAMESPACES).step("unshare namespaces")?;
            signal.write_all(&[0]).step("signal the helper that maps user ids")?;
            match waitpid(child, None).step("wait for the helper that maps user ids")? {
                nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
                nix::sys::wait::WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)).step("map user ids"),
                _ => Err(io::Error::other("the helper was killed")).step("map user ids"),
            }
        }
    }
}

/// Makes a mount point the root, and forgets the old root.
fn pivot_into(point: &str) -> Result<(), JailError> {
    chdir(point).step("enter the root")?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What may be done in a folder by a thread that is kept below it, with Landlock as of `known`.
    fn within(known: ABI) -> (bool, bool, bool) {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("inside"), folder.path().join("outside"));
        std::fs::create_dir_all(inside.join("other")).unwrap();
        std::fs::write(inside.join("file"), "").unwrap();
        std::fs::write(&outside, "").unwrap();
        let tries = std::thread::spawn(move || {
            keep_below(&inside, known).unwrap();
            let (file, link) = (inside.join("file"), inside.join("other/link"));
            let linked = std::fs::hard_link(&file, link).is_ok();
            (linked, std::fs::rename(file, inside.join("other/file")).is_ok(), File::open(outside).is_ok())
        });
        tries.join().unwrap()
    }

    #[test]
    fn files_go_from_folder_to_folder_whatever_landlock_the_host_has() {
        // The first kernels with Landlock refuse that, so there is none there.
        assert_eq!(within(ABI::V1), (true, true, true));
        let seen = [ABI::V2, ABI::V3, ABI::V6].map(within);
        assert!(seen.iter().all(|(linked, renamed, out)| *linked && *renamed && *out == seen[0].2), "{seen:?}");
        let says = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
        assert!(!says.contains("landlock") || !seen[0].2, "{seen:?}");
    }
}
