//! Folders in which the guest makes, names and removes nothing: those of its containers' snapshots.
//!
//! An overlay of the guest wants what it writes and what it needs besides within one mount, so that mount is of the folder
//! that holds both. The host finds things in there by their names: a guest that could put a link in their place would
//! lead it elsewhere.
//!
//! A request holds the seal until it is done, and no file becomes known meanwhile that might be such a folder: a guest may
//! guess the number that one will have.

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

/// The share's folders.
#[derive(Default)]
pub struct Known {
    /// One a container.
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

    /// Has a file found by its name in a folder; what `find` returns has its number.
    ///
    /// # Errors
    /// Those of `find`, and `EINVAL` for what is no name.
    pub fn find<T>(
        &self,
        parent: Inode,
        name: &CStr,
        find: impl FnOnce() -> io::Result<T>,
        inode: impl FnOnce(&T) -> Inode,
    ) -> io::Result<T> {
        // By this name a file is found again that has become unknown; it is no other.
        if name.to_bytes() == b"." {
            return find();
        }
        check_name(name)?;
        let is_snapshot = name.to_bytes() == SNAPSHOT_DIR.as_bytes();
        if parent != ROOT_ID && !is_snapshot {
            return find();
        }
        let mut known = self.write();
        let found = find()?;
        if parent == ROOT_ID {
            known.containers.insert(inode(&found));
        } else if known.containers.contains(&parent) {
            known.sealed.insert(inode(&found));
        }
        Ok(found)
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

    /// Lets files be changed, or those of names in folders, as long as what is returned is kept: none is asked for another time
    /// meanwhile.
    ///
    /// # Errors
    /// `EPERM` for a folder that is sealed.
    pub fn open(&self, folders: &[Inode]) -> io::Result<RwLockReadGuard<'_, Known>> {
        let known = self.read();
        if folders.iter().any(|folder| known.sealed.contains(folder)) { Err(io::Error::from_raw_os_error(libc::EPERM)) } else { Ok(known) }
    }
}

/// Refuses what is not the name of one file in one folder: no kernel asks for that, and it would lead past a seal.
///
/// # Errors
/// `EINVAL`.
pub fn check_name(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    let is_name = !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/');
    if is_name { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(seal: &Seal, parent: Inode, name: &CStr, inode: Inode) {
        seal.find(parent, name, || Ok(inode), |inode| *inode).unwrap();
    }

    #[test]
    fn the_folder_of_a_containers_snapshot_is_not_changed() {
        let seal = Seal::default();
        learn(&seal, ROOT_ID, c"container", 2);
        learn(&seal, 2, c"rootfs", 3);
        learn(&seal, 2, c"snapshot", 4);
        // What a container calls so is its own.
        learn(&seal, 3, c"snapshot", 5);
        learn(&seal, 4, c"fs", 6);
        learn(&seal, 4, c".", 4);
        assert_eq!([2, 3, 4, 5, 6].map(|inode| seal.open(&[inode]).is_ok()), [true, true, false, true, true]);
        assert_eq!(seal.open(&[6, 4]).err().unwrap().raw_os_error(), Some(libc::EPERM));
        seal.forget(4);
        seal.forget(2);
        learn(&seal, 2, c"snapshot", 7);
        assert!(seal.open(&[4]).is_ok() && seal.open(&[7]).is_ok());
    }

    #[test]
    fn what_leads_elsewhere_is_no_name() {
        for name in [c"", c".", c"..", c"snapshot/fs", c"../evil", c"/"] {
            assert_eq!(check_name(name).unwrap_err().raw_os_error(), Some(libc::EINVAL), "{name:?}");
        }
        assert!([c"...", c".x", c"a b\n", c"..\xff"].iter().all(|name| check_name(name).is_ok()));
        let seal = Seal::default();
        assert!(seal.find(ROOT_ID, c"c/snapshot", || Ok(9), |inode| *inode).is_err());
    }
}
