//! What of a file gives rights on the host, and where that is kept: in a container's root file system and in volumes whose
//! files have ids of the pod's own (`fs.mapped_volumes`), and not in other volumes of the host.
//!
//! A container is root over its volumes. A file there that runs as its owner, or has capabilities, would run so for
//! whoever starts it on the host, and a device node would open the host's device. So nodes of devices are refused there,
//! and the others are done and not kept, as on a file system that a client has mounted without set-user-id.
//!
//! Which mount a file is in decides. The server learns the mounts that keep all as the guest finds them by name.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use caisson_protocol::guest::{KEEPS_DIR, MOUNTS_DIR, ROOTFS_DIR, SNAPSHOT_DIR};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use virtiofsd::filesystem::Context;
use virtiofsd::fuse::ROOT_ID;
use virtiofsd::soft_idmap::Id;

use crate::share::Inode;

/// The attribute that gives a program capabilities (capabilities(7)).
pub const CAPABILITIES: &CStr = c"security.capability";

/// The share's folders that the guest knows.
#[derive(Default)]
struct Known {
    /// Those of containers, and of their volumes, by whose they are.
    containers: HashMap<Inode, CString>,
    volumes: HashMap<Inode, CString>,
    /// The roots of mounts that keep all, with the mounts' ids (statx(2), `STATX_MNT_ID`).
    keeping: HashMap<Inode, u64>,
}

/// Which mounts keep what gives rights.
pub struct Volumes {
    known: Mutex<Known>,
    /// Whether all do (`fs.set_id`).
    all: bool,
}

impl Volumes {
    /// Those of a share; with `all` every one keeps it.
    pub fn new(all: bool) -> Self {
        Self { known: Mutex::default(), all }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a file that was found by its name. `mount` asks for its mount's id, and `is_there` looks for a folder of the
    /// share by its path from the root on.
    ///
    /// # Errors
    /// Those of `mount`.
    pub fn found(
        &self,
        parent: Inode,
        name: &CStr,
        inode: Inode,
        mount: impl FnOnce() -> io::Result<u64>,
        is_there: impl FnOnce(&CStr) -> bool,
    ) -> io::Result<()> {
        let mut known = self.known();
        if parent == ROOT_ID {
            known.containers.insert(inode, name.to_owned());
        } else if let Some(container) = known.containers.get(&parent).cloned() {
            match name.to_bytes() {
                name if name == ROOTFS_DIR.as_bytes() || name == SNAPSHOT_DIR.as_bytes() => {
                    known.keeping.insert(inode, mount()?);
                }
                name if name == MOUNTS_DIR.as_bytes() => {
                    known.volumes.insert(inode, container);
                }
                _ => {}
            }
        } else if let Some(container) = known.volumes.get(&parent) {
            let path = [container.to_bytes(), KEEPS_DIR.as_bytes(), name.to_bytes()].join(&b'/');
            if CString::new(path).is_ok_and(|path| is_there(&path)) {
                known.keeping.insert(inode, mount()?);
            }
        }
        Ok(())
    }

    /// Notes that the guest has forgotten a file: its mount may go, and another have its id.
    pub fn forget(&self, inode: Inode) {
        let mut known = self.known();
        known.containers.remove(&inode);
        known.volumes.remove(&inode);
        known.keeping.remove(&inode);
    }

    /// Forgets all files.
    pub fn clear(&self) {
        *self.known() = Known::default();
    }

    /// Whether a mount keeps what gives rights; `mount` asks for its id.
    ///
    /// # Errors
    /// Those of `mount`.
    pub fn keep(&self, mount: impl FnOnce() -> io::Result<u64>) -> io::Result<bool> {
        if self.all {
            return Ok(true);
        }
        let mount = mount()?;
        Ok(self.known().keeping.values().any(|id| *id == mount))
    }
}

/// Whether a mode makes a regular file run as another.
pub const fn gives_rights(mode: u32) -> bool {
    mode & libc::S_ISUID != 0 || mode & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID | libc::S_IXGRP
}

/// The mode without that. A group that may not run the file has its bit for locks (fcntl(2)).
pub const fn without_rights(mode: u32) -> u32 {
    let mode = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP == 0 { mode } else { mode & !libc::S_ISGID }
}

/// Without the right to keep the bits that make others run a file as its owner, for as long as it lives.
pub struct Another(CapabilitySets);

/// Has the kernel take those bits from a file, as it does when the owner is not who writes.
///
/// virtiofsd's own way to do so looks at what it remembers of a thread's rights. That is wrong once the thread has made a
/// file as a user: the bits stay then. So its requests to do so are not passed on to it.
///
/// # Errors
/// When the capability against that cannot be dropped.
pub fn as_another(kill: bool) -> io::Result<Option<Another>> {
    if !kill {
        return Ok(None);
    }
    let before = capabilities(None)?;
    let effective = before.effective - CapabilitySet::FSETID;
    set_capabilities(None, CapabilitySets { effective, ..before })?;
    Ok(Some(Another(before)))
}

impl Drop for Another {
    fn drop(&mut self) {
        // The kernel refuses no one what is permitted; without it files lose bits, and gain none.
        let _ = set_capabilities(None, self.0);
    }
}

/// [`as_another`] for what the guest's kernel asks without saying who is another: everybody but root.
///
/// # Errors
/// When the capability against that cannot be dropped.
pub fn as_user(ctx: Context) -> io::Result<Option<Another>> {
    as_another(ctx.uid.into_inner() != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_keep_all_are_found_by_name() {
        let volumes = Volumes::new(false);
        let find = |parent, name: &CStr, inode, mount: u64| {
            volumes.found(parent, name, inode, || Ok(mount), |path| path == c"web/keeps/mount1").unwrap();
        };
        find(ROOT_ID, c"web", 2, 10);
        find(2, c"rootfs", 3, 11);
        find(2, c"mounts", 4, 10);
        find(4, c"mount0", 5, 12);
        find(4, c"mount1", 6, 13);
        // What a container calls so is its own.
        find(3, c"mounts", 7, 11);
        find(7, c"mount1", 8, 14);
        find(5, c"rootfs", 9, 12);
        let keeps = |mount| volumes.keep(|| Ok(mount)).unwrap();
        assert_eq!([10, 11, 12, 13, 14].map(keeps), [false, true, false, true, false]);
        volumes.forget(3);
        assert!(!keeps(11) && Volumes::new(true).keep(|| Ok(12)).unwrap());
    }

    #[test]
    fn bits_that_run_a_file_as_another_are_told_from_others() {
        assert_eq!([0o4755, 0o2755, 0o2644, 0o1777, 0o755, 0o6711].map(gives_rights), [true, true, false, false, false, true]);
        assert_eq!([0o4755, 0o2755, 0o2644, 0o7644].map(without_rights), [0o755, 0o755, 0o2644, 0o3644]);
    }
}
