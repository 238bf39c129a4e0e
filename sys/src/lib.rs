//! System calls that no library of ours wraps and that both the shim and the agent make, each as a
//! safe function.

pub mod bpf;
pub mod mounts;
pub mod users;

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

/// The result of a system call that makes a descriptor.
///
/// # Errors
/// The call's.
#[expect(unsafe_code, reason = "a descriptor that a raw system call makes is a number")]
pub fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}
