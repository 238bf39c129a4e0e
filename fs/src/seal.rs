//! Folders in which the guest makes, names and removes nothing: those of its containers' snapshots.
//!
//! An overlay of the guest wants what it writes and what it needs besides within one mount, so that mount is of the folder
//! that holds both. The host finds things in there by their names: a guest that could put a link in their place would
//! lead it elsewhere.

use std::collections::HashSet;
use std::ffi::CStr;
use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use caisson_protocol::guest::SNAPSHOT_DIR;
use virtiofsd::fuse::ROOT_ID;

type Inode = u64;

/// Which files that the guest knows are such folders.
#[derive(Default)]
pub struct Seal(RwLock<Known>);

#[derive(Default)]
struct Known {
    /// The share's folders, one a container.
    containers: HashSet<Inode>,
    sealed: HashSet<Inode>,
}

impl Seal {
    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the guest was told of a file.
    pub fn learn(&self, parent: Inode, name: &CStr, inode: Inode) {
        if parent == ROOT_ID {
            self.write().containers.insert(inode);
        } else if name.to_bytes() == SNAPSHOT_DIR.as_bytes() && self.read().containers.contains(&parent) {
            self.write().sealed.insert(inode);
        }
    }

    /// Notes that the guest has forgotten a file: its number will not be another one's.
    pub fn forget(&self, inode: Inode) {
        let known = self.read();
        let has = known.containers.contains(&inode) || known.sealed.contains(&inode);
        drop(known);
        if has {
            let mut known = self.write();
            known.containers.remove(&inode);
            known.sealed.remove(&inode);
        }
    }

    /// Whether a folder may be changed.
    ///
    /// # Errors
    /// `EPERM` when it may not.
    pub fn check(&self, folder: Inode) -> io::Result<()> {
        if self.read().sealed.contains(&folder) { Err(io::Error::from_raw_os_error(libc::EPERM)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_containers_snapshot_is_not_changed() {
        let seal = Seal::default();
        seal.learn(ROOT_ID, c"container", 2);
        seal.learn(2, c"rootfs", 3);
        seal.learn(2, c"snapshot", 4);
        // What a container calls so is its own.
        seal.learn(3, c"snapshot", 5);
        seal.learn(4, c"fs", 6);
        assert_eq!([2, 3, 4, 5, 6].map(|inode| seal.check(inode).is_ok()), [true, true, false, true, true]);
        assert_eq!(seal.check(4).unwrap_err().raw_os_error(), Some(libc::EPERM));
        seal.forget(4);
        seal.forget(2);
        seal.learn(2, c"snapshot", 7);
        assert!(seal.check(4).is_ok() && seal.check(7).is_ok());
    }
}
