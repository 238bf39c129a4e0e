//! Mounts by descriptor: open_tree(2), mount_setattr(2), move_mount(2) (Linux 5.12).
#![expect(unsafe_code, reason = "raw system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

use crate::descriptor;

/// What to change of a mount (mount_setattr(2)).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear first.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`; 0 leaves it.
    pub propagation: u64,
}

impl Attributes {
    /// Attributes to set and nothing else.
    pub const fn set(set: u64) -> Self {
        Self { set, clear: 0, propagation: 0 }
    }
}

/// Has the owners of files in a mount that is not attached yet seen through a user namespace.
///
/// # Errors
/// The kernel's; EINVAL when the file system cannot do that, or is mapped already.
pub fn map_owners(mount: &impl AsFd, namespace: &impl AsFd, below: bool) -> io::Result<()> {
    let userns_fd = namespace.as_fd().as_raw_fd().try_into().map_err(io::Error::other)?;
    set(mount, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd }, below)
}

/// A copy of the mount at `path` below `folder`, with all below it or without, not attached anywhere.
///
/// # Errors
/// The kernel's.
pub fn open_tree(folder: impl AsFd, path: &Path, below: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | if below { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    // SAFETY: the path ends in a zero and lives through the call.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, folder.as_fd().as_raw_fd(), path.as_ptr(), flags) })
}

/// A copy of the mount of an open file, not attached anywhere.
///
/// # Errors
/// The kernel's.
pub fn clone_mount_of(file: &File) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the path is an empty string with its zero.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, file.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a mount that is not attached yet.
///
/// # Errors
/// The kernel's.
pub fn move_mount(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS | libc::MOVE_MOUNT_T_AUTOMOUNTS;
    // SAFETY: both paths end in a zero and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, target.as_ptr(), flags) };
    Ok(Errno::result(result).map(drop)?)
}

/// Attaches a mount that is not attached yet to what is open.
///
/// # Errors
/// The kernel's.
pub fn move_mount_onto(tree: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are empty strings with their zero.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags) };
    Ok(Errno::result(result).map(drop)?)
}

/// Changes a mount, or all mounts from it on.
///
/// # Errors
/// The kernel's.
pub fn set_attributes(mount: &impl AsFd, attributes: Attributes, below: bool) -> io::Result<()> {
    let Attributes { set: attr_set, clear: attr_clr, propagation } = attributes;
    set(mount, &libc::mount_attr { attr_set, attr_clr, propagation, userns_fd: 0 }, below)
}

fn set(mount: &impl AsFd, attr: &libc::mount_attr, below: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if below { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the attributes and the empty path live through the call, and the size is theirs.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
