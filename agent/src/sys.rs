//! System calls that have no safe wrapper, each as one safe function.
#![expect(unsafe_code, reason = "raw system calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::Pid;

/// kill(2) with a number that may be a real-time signal.
pub fn kill(pid: Pid, signal: i32) -> nix::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// Sets a terminal's size in characters.
pub fn set_terminal_size(terminal: &File, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Ok(Errno::result(result).map(drop)?)
}

/// Puts an interface's name where the kernel reads it, ended by a zero.
fn fill_name(target: &mut [libc::c_char; libc::IFNAMSIZ], name: &str) -> io::Result<()> {
    if name.is_empty() || name.len() >= target.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    target.fill(0);
    target.iter_mut().zip(name.bytes()).for_each(|(slot, byte)| *slot = byte.cast_signed());
    Ok(())
}

/// Gives a network interface of the calling thread's namespace, which is down, another name.
pub fn rename_interface(socket: &OwnedFd, name: &str, new_name: &str) -> io::Result<()> {
    // SAFETY: an ifreq of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    fill_name(&mut request.ifr_name, name)?;
    let mut new = [0; libc::IFNAMSIZ];
    fill_name(&mut new, new_name)?;
    request.ifr_ifru.ifru_newname = new;
    // SAFETY: SIOCSIFNAME reads the two names, which end in a zero.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNAME, &raw const request) })?;
    Ok(())
}

/// Brings a network interface of the calling thread's namespace up.
pub fn interface_up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    // SAFETY: an ifreq of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    fill_name(&mut request.ifr_name, name)?;
    // SAFETY: SIOCGIFFLAGS reads the name, which ends in a zero, and fills the flags of our ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the flags were filled by the call before.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16 };
    // SAFETY: SIOCSIFFLAGS reads the name and the flags of our ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// One instruction of a BPF program (Linux `Documentation/bpf/instruction-set.rst`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source in the high ones.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The part of `union bpf_attr` that loading reads.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that attaching reads.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Loads a device program and attaches it to a cgroup, for as long as the cgroup lives.
pub fn attach_device_program(cgroup: &File, program: &[Instruction]) -> io::Result<()> {
    let load = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the attributes and the program that they point to live through the call, and the size is theirs.
    let loaded = descriptor(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<LoadAttributes>()) })?;
    let attach = AttachAttributes {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: loaded.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes live through the call, and the size is theirs.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<AttachAttributes>()) })?;
    Ok(())
}

/// Opens a descriptor that stands for a process.
pub fn open_pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// The result of a system call that makes a descriptor.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the domain name of the calling process's UTS namespace.
pub fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: the bytes live through the call and the length is theirs.
    Ok(Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)?)
}

/// Sets a resource limit by its number: the kernel knows more of them than any library.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: setrlimit reads one rlimit, which lives through the call.
    Ok(Errno::result(unsafe { libc::setrlimit(resource, &raw const limit) }).map(drop)?)
}

/// `KEYCTL_JOIN_SESSION_KEYRING` of linux/keyctl.h.
const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;

/// Replaces the process's session keyring by one of this name, made when there is none.
pub fn join_session_keyring(name: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the name ends in a zero and lives through the call.
    Ok(Errno::result(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) }).map(drop)?)
}

/// Opens the other end of a terminal, without a path that somebody else could have put there.
pub fn open_terminal_peer(master: &File) -> io::Result<File> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which lives through the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    // SAFETY: TIOCGPTPEER takes the flags as a number.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    Ok(descriptor(libc::c_long::from(fd))?.into())
}

/// Makes a terminal the controlling one of our session.
pub fn control_terminal(terminal: &File) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    Ok(Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)?)
}

/// Attributes of a mount to set and to clear (`MOUNT_ATTR_*` of mount_setattr(2)).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// To set.
    pub set: u64,
    /// To clear first.
    pub clear: u64,
}

/// A copy of the mount at `path` below `folder`, with all below it or without, not attached anywhere.
pub fn open_tree(folder: impl AsFd, path: &Path, below: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | if below { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    // SAFETY: the path ends in a zero and lives through the call.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, folder.as_fd().as_raw_fd(), path.as_ptr(), flags) })
}

/// A copy of the mount of an open file, not attached anywhere.
pub fn clone_mount_of(file: &File) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the path is an empty string with its zero.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, file.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a mount that is not attached yet.
pub fn move_mount(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS | libc::MOVE_MOUNT_T_AUTOMOUNTS;
    // SAFETY: both paths end in a zero and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, target.as_ptr(), flags) };
    Ok(Errno::result(result).map(drop)?)
}

/// Changes the attributes of a mount, or of all mounts from it on.
pub fn set_mount_attributes(mount: &impl AsFd, attributes: Attributes, below: bool) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes.set, attr_clr: attributes.clear, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if below { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the attributes and the empty path live through the call, and the size is theirs.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
