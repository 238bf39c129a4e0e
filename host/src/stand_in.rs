//! Starts the process that stands on the host for a container (`caisson-stand-in`), in a room of its own.
//!
//! ```text
//! who starts it
//!   └─ a child joins the pod's network namespace, clones, tells the id, ends
//!        └─ the clone is a child of who starts it too: new mount, PID, IPC, UTS and cgroup namespaces
//!             └─ an empty root with a /proc of its own, an own session, no right, the pod's user; caisson-stand-in
//! ```
#![expect(unsafe_code, reason = "what runs between fork and exec has no safe wrapper")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid, setsid};

use crate::control::{CONTROL_FD, pass};
use crate::process::Process;

/// Capabilities are numbered from 0 on; the kernel refuses the first that it does not know.
const MOST_CAPABILITIES: libc::c_ulong = 64;

/// One that was started.
pub struct StandIn {
    /// Its process, a child of ours that nobody else collects.
    pub process: Process,
    /// It reads the code to end with, a byte, and writes the number of each signal that it gets. It does not block.
    pub socket: UnixStream,
}

/// Starts one from an open program, as `user`, in `network` or in a network namespace of its own.
///
/// # Errors
/// The kernel's, of whatever step.
pub fn start(program: &File, user: u32, network: Option<BorrowedFd<'_>>) -> io::Result<StandIn> {
    let (socket, theirs) = UnixStream::pair()?;
    let (mut told, tell) = io::pipe()?;
    // Out of the way of the control socket.
    let aside = |descriptor: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(descriptor, CONTROL_FD + 1);
    let (program, tell) = (aside(program.as_fd())?, aside(tell.as_fd())?);
    let network = network.map(aside).transpose()?;
    // The program is found by its descriptor, as there is no path to it in the room.
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0("caisson-stand-in").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    pass(&mut command, theirs.as_fd());
    let (network, tell_raw) = (network.as_ref().map(AsRawFd::as_raw_fd), tell.as_raw_fd());
    // SAFETY: the closure makes system calls and no other; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            let network = network.map(|network| BorrowedFd::borrow_raw(network));
            hold_signals()?;
            clone_into_room(network, tell_raw)?;
            furnish(user)
        })
    };
    let mut starter = command.spawn()?;
    drop((tell, theirs));
    let mut pid = [0; size_of::<u32>()];
    let read = told.read_exact(&mut pid);
    starter.wait()?;
    read?;
    socket.set_nonblocking(true)?;
    Ok(StandIn { process: Process::open(u32::from_ne_bytes(pid))?, socket })
}

/// Has each signal wait from here on, through exec(2) too, until the program asks for it.
/// The first process of a PID namespace would lose those that come earlier (pid_namespaces(7)).
fn hold_signals() -> io::Result<()> {
    let all = u64::MAX;
    // SAFETY: the call reads a set of signals that lives through it, of the size that the last argument names.
    // The C library's own would leave two of them out.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const all, 0, size_of::<u64>()) };
    Errno::result(result)?;
    Ok(())
}

/// Goes on as a clone in namespaces of its own; who calls ends, having told the clone's id.
fn clone_into_room(network: Option<BorrowedFd<'_>>, tell: i32) -> io::Result<()> {
    let own_network = if network.is_some() { CloneFlags::empty() } else { CloneFlags::CLONE_NEWNET };
    if let Some(network) = network {
        setns(network, CloneFlags::CLONE_NEWNET)?;
    }
    let flags = own_network
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_PARENT;
    let flags = flags.bits() | libc::SIGCHLD;
    // SAFETY: without memory or files in common and without a stack given, the clone goes on as a child of fork(2) does.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
    if pid == 0 {
        return Ok(());
    }
    let pid = (pid as u32).to_ne_bytes();
    // SAFETY: the buffer lives through the call. Who does not hear of the clone sees the pipe end.
    unsafe {
        libc::write(tell, pid.as_ptr().cast(), pid.len());
        libc::_exit(0)
    }
}

/// Makes the room, and gives up all rights.
fn furnish(user: u32) -> io::Result<()> {
    let none = None::<&str>;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    // Any folder serves to mount on; /tmp is on every host.
    mount(Some("empty"), "/tmp", Some("tmpfs"), flags, Some("size=4k,nr_inodes=2,mode=555"))?;
    chdir("/tmp")?;
    nix::unistd::mkdir("proc", nix::sys::stat::Mode::from_bits_truncate(0o555))?;
    mount(Some("proc"), "proc", Some("proc"), flags | MsFlags::MS_RDONLY, none)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    mount(none, "/", none, flags | MsFlags::MS_RDONLY | MsFlags::MS_REMOUNT | MsFlags::MS_BIND, none)?;
    setsid()?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    for capability in 0..MOST_CAPABILITIES {
        // SAFETY: the call takes numbers. It is refused for what the kernel does not know, and for what we do not have.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    setresgid(gid, gid, gid)?;
    // With the last of root's ids the capabilities go (capabilities(7)).
    setresuid(uid, uid, uid)?;
    Ok(nix::sys::prctl::set_no_new_privs()?)
}
