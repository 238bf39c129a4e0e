//! System calls that have no safe wrapper, each as one safe function.
#![expect(unsafe_code, reason = "raw system calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use caisson_sys::descriptor;
use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

/// A request about a network interface of the calling thread's namespace.
fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    fill_name(&mut request.ifr_name, name)?;
    Ok(request)
}

/// Gives an interface, which is down, another name.
pub fn rename_interface(socket: &OwnedFd, name: &str, new_name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    let mut new = [0; libc::IFNAMSIZ];
    fill_name(&mut new, new_name)?;
    request.ifr_ifru.ifru_newname = new;
    // SAFETY: SIOCSIFNAME reads the two names, which end in a zero.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNAME, &raw const request) })?;
    Ok(())
}

/// Sets an interface's MTU.
pub fn set_mtu(socket: &OwnedFd, name: &str, mtu: i32) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_mtu = mtu;
    // SAFETY: SIOCSIFMTU reads the name, which ends in a zero, and the MTU of our ifreq.
    Ok(Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw const request) }).map(drop)?)
}

/// Sets an interface's Ethernet address.
pub fn set_mac(socket: &OwnedFd, name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = interface_request(name)?;
    let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    address.sa_data.iter_mut().zip(mac).for_each(|(slot, byte)| *slot = byte.cast_signed());
    request.ifr_ifru.ifru_hwaddr = address;
    // SAFETY: SIOCSIFHWADDR reads the name, which ends in a zero, and the address of our ifreq.
    Ok(Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) }).map(drop)?)
}

/// Brings an interface up or down.
pub fn set_interface_up(socket: &OwnedFd, name: &str, up: bool) -> io::Result<()> {
    let mut request = interface_request(name)?;
    // SAFETY: SIOCGIFFLAGS reads the name, which ends in a zero, and fills the flags of our ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the flags were filled by the call before.
    let flags = unsafe { &mut request.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as i16;
    *flags = if up { *flags | bit } else { *flags & !bit };
    // SAFETY: SIOCSIFFLAGS reads the name and the flags of our ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// Opens a descriptor that stands for a process.
pub fn open_pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// Has a write to a closed pipe end the process, as programs expect it: the Rust runtime ignores
/// SIGPIPE, and execve(2) keeps that.
pub fn restore_sigpipe() {
    // SAFETY: the default action is no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Waits for a file's exceptional events, as those of cgroup and proc files are.
pub fn watch_exceptions(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a File's descriptor is its own and stays open as long as it lives, which is in there.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(Into::into)
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

/// `BLKPG` of linux/blkpg.h, what it can do, and what it is told.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;

#[repr(C)]
struct BlkpgPartition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgArgument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *mut BlkpgPartition,
}

/// Makes a part of a disk, in bytes, a device of its own.
pub fn add_partition(disk: &File, number: i32, start: u64, length: u64) -> io::Result<()> {
    let bytes = |value: u64| i64::try_from(value).map_err(io::Error::other);
    change_partition(disk, BLKPG_ADD_PARTITION, number, bytes(start)?, bytes(length)?)
}

/// Removes the device of a part of a disk.
pub fn remove_partition(disk: &File, number: i32) -> io::Result<()> {
    change_partition(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

fn change_partition(disk: &File, operation: i32, number: i32, start: i64, length: i64) -> io::Result<()> {
    let mut partition = BlkpgPartition { start, length, number, device_name: [0; 64], volume_name: [0; 64] };
    let argument = BlkpgArgument { operation, flags: 0, length: size_of::<BlkpgPartition>() as libc::c_int, data: &raw mut partition };
    // SAFETY: BLKPG reads the argument, and the partition that it points to; both live through the call.
    Ok(Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) }).map(drop)?)
}
