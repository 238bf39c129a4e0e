//! Tries from inside what the file server's jail and its filter forbid, and prints what came of each attempt:
//! `WHERE: ATTEMPT: OUTCOME`. A node test reads that; nothing installs this program.
//!
//! `share-probe PID [ID]`: a process outside of the jail, and the first of the pod's own ids if it is to have some.
#![expect(unsafe_code, reason = "system calls as somebody makes them who has taken the file server over")]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail};
use caisson_fs::filter;
use caisson_host::jail::{self, Kept, Side};
use caisson_sys::mounts::open_tree;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, open, openat, openat2};

/// More descriptors than the probe has.
const DESCRIPTORS: RawFd = 64;
/// Folders that `..` is followed through.
const CLIMB: usize = 64;

/// What is tried from the server's descriptors and with a process outside.
type Attempt = (&'static str, fn(BorrowedFd<'_>, Pid) -> io::Result<()>);

/// Each is a hole when it ends well.
const ATTEMPTS: &[Attempt] = &[
    ("open /proc", |_, _| File::open("/proc").map(drop)),
    ("open the host's files by its first process", |_, _| File::open("/proc/1/root/etc/passwd").map(drop)),
    ("leave the share by its root", |_, _| File::open("/../../etc/passwd").map(drop)),
    ("leave the descriptors by ..", |own, _| look(own, "../status")),
    ("find the program by the descriptors", |own, _| look(own, "../exe")),
    ("find the root by the descriptors", |own, _| look(own, "../root/etc/passwd")),
    ("find the kernel's settings by the descriptors", |own, _| look(own, "../../sys/kernel/core_pattern")),
    ("find another process by the descriptors", |own, _| look(own, "../../1/status")),
    ("make a file in the share's own folder", |_, _| File::create("/file").map(drop)),
    ("make the share writable", |_, _| Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_BIND, None::<&str>)?)),
    ("mount", |_, _| Ok(mount(Some("x"), "/", Some("tmpfs"), MsFlags::empty(), None::<&str>)?)),
    ("enter another root", |_, _| Ok(nix::unistd::chroot("/")?)),
    ("make a mount namespace", |_, _| Ok(unshare(CloneFlags::CLONE_NEWNS)?)),
    ("connect to the host", |_, _| TcpStream::connect("127.0.0.1:22").map(drop)),
    ("listen", |_, _| TcpListener::bind("0.0.0.0:80").map(drop)),
    ("connect to an abstract socket", |_, _| UnixStream::connect_addr(&SocketAddr::from_abstract_name("share-probe")?).map(drop)),
    ("signal a process outside", |_, outside| Ok(kill(outside, None)?)),
    ("trace a process outside", |_, outside| Ok(nix::sys::ptrace::attach(outside)?)),
    ("hold a process outside", |_, outside| caisson_host::process::Process::open(outside.as_raw().unsigned_abs()).map(drop)),
    ("open a file by its handle", |_, _| by_handle()),
    ("load a program into the kernel", |_, _| call(libc::SYS_bpf, [5, 0, 0])),
    ("clear the kernel's log", |_, _| call(libc::SYS_syslog, [5, 0, 0])),
    ("restart the host", |_, _| call(libc::SYS_reboot, [0, 0, 0])),
];

/// System calls with arguments that the filter ends the process for.
const CALLS: &[(&str, libc::c_long, [libc::c_long; 3])] = &[
    ("fork", libc::SYS_fork, [0; 3]),
    ("clone a process", libc::SYS_clone, [libc::SIGCHLD as libc::c_long, 0, 0]),
    ("clone into namespaces", libc::SYS_clone, [libc::CLONE_NEWUSER as libc::c_long, 0, 0]),
    ("execve", libc::SYS_execve, [0; 3]),
    ("socket", libc::SYS_socket, [1, 1, 0]),
    ("connect", libc::SYS_connect, [0; 3]),
    ("kill", libc::SYS_kill, [0; 3]),
    ("pidfd_open", libc::SYS_pidfd_open, [1, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [0; 3]),
    ("mount", libc::SYS_mount, [0; 3]),
    ("open_tree", libc::SYS_open_tree, [0; 3]),
    ("move_mount", libc::SYS_move_mount, [0; 3]),
    ("fsopen", libc::SYS_fsopen, [0; 3]),
    ("chroot", libc::SYS_chroot, [0; 3]),
    ("pivot_root", libc::SYS_pivot_root, [0; 3]),
    ("setns", libc::SYS_setns, [0; 3]),
    ("unshare users", libc::SYS_unshare, [libc::CLONE_NEWUSER as libc::c_long, 0, 0]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, [0; 3]),
    ("bpf", libc::SYS_bpf, [0; 3]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 3]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 3]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [0; 3]),
    ("memfd_create", libc::SYS_memfd_create, [0; 3]),
    ("mmap to execute", libc::SYS_mmap, [0, 4096, 5]),
    ("mprotect to execute", libc::SYS_mprotect, [0, 4096, 5]),
];

fn main() -> Result<()> {
    jail::close_inherited()?;
    let mut arguments = std::env::args().skip(1).map(|word| word.parse::<u32>());
    let outside = arguments.next().context("the process is missing")??;
    let first = arguments.next().transpose()?;
    let root = empty_share()?;
    let inside = match (jail::Share { root, ids: first.map(|first| first..first + 65_536) }).unshare()? {
        Side::Outside(child) => {
            return match waitpid(child, None)? {
                WaitStatus::Exited(_, 0) => Ok(()),
                other => bail!("the probe ended with {other:?}"),
            };
        }
        Side::Inside(inside) => inside,
    };
    let Kept { descriptors, namespace } = inside.enter()?;
    // As the server has it: the namespace is the shim's.
    drop(namespace);
    (0..DESCRIPTORS).for_each(climb);
    for (name, attempt) in ATTEMPTS {
        let outcome = attempt(descriptors.as_fd(), Pid::from_raw(outside.cast_signed()));
        println!("jail: {name}: {}", outcome.map_or_else(|error| format!("refused, {error}"), |()| "DONE".into()));
    }
    for (name, call, arguments) in CALLS {
        println!("filter: {name}: {}", filtered(*call, arguments)?);
    }
    Ok(())
}

/// A share's root as the shim makes it, with nothing in it.
fn empty_share() -> Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_RDONLY;
    mount(Some("share"), "/tmp", Some("tmpfs"), flags, Some("size=64k"))?;
    Ok(open_tree(AT_FDCWD, Path::new("/tmp"), false)?)
}

/// Follows `..` from a descriptor as far as it leads, in all the ways that the kernel has for that.
fn climb(descriptor: RawFd) {
    // SAFETY: the descriptor is only borrowed, to see what is open there.
    let own = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    if fstat(own).is_err() {
        return;
    }
    let Ok(mut folder) = openat(own, ".", flags, Mode::empty()) else {
        println!("jail: climb from descriptor {descriptor}: refused, it is no folder");
        return;
    };
    let ways = [ResolveFlags::empty(), ResolveFlags::NO_SYMLINKS, ResolveFlags::NO_XDEV, ResolveFlags::IN_ROOT, ResolveFlags::BENEATH];
    for how in ways {
        for _ in 0..CLIMB {
            match openat2(&folder, "..", flags, Mode::empty(), how) {
                Ok(above) => folder = above,
                Err(_) => break,
            }
        }
        let leads = ["etc/passwd", "sys/kernel/core_pattern", "1/root", "proc"];
        let led = leads.iter().find(|name| openat(&folder, **name, flags, Mode::empty()).is_ok());
        let outcome = led.map_or("refused, there is nothing above".into(), |name| format!("DONE, to {name}"));
        println!("jail: climb from descriptor {descriptor} {how:?}: {outcome}");
    }
}

fn look(own: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    Ok(openat(own, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(drop)?)
}

/// Opens the share's root by its handle, by which any file of a file system is opened that somebody may look for so.
fn by_handle() -> io::Result<()> {
    /// Bytes of a handle that follow its own two numbers.
    const BYTES: u32 = 128;
    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut handle = [0_u32; 2 + BYTES as usize / 4];
    handle[0] = BYTES;
    let mut mount = 0_i32;
    // SAFETY: the handle has room for as many bytes as it says, and all arguments live through the calls.
    let opened = unsafe {
        let path = c"".as_ptr();
        if libc::syscall(libc::SYS_name_to_handle_at, root.as_raw_fd(), path, handle.as_mut_ptr(), &raw mut mount, libc::AT_EMPTY_PATH) < 0
        {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), handle.as_mut_ptr(), libc::O_RDONLY)
    };
    if opened < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn call(number: libc::c_long, [first, second, third]: [libc::c_long; 3]) -> io::Result<()> {
    // SAFETY: no argument is an address that anything could be written to.
    let result = unsafe { libc::syscall(number, first, second, third, 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What becomes of a process that makes a system call behind the server's filter.
fn filtered(number: libc::c_long, arguments: &[libc::c_long; 3]) -> Result<String> {
    // SAFETY: there is one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            if filter::install().is_err() {
                std::process::exit(2);
            }
            let _ = call(number, *arguments);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => Ok(match waitpid(child, None)? {
            WaitStatus::Signaled(_, Signal::SIGSYS, _) => "killed".into(),
            other => format!("DONE ({other:?})"),
        }),
    }
}
