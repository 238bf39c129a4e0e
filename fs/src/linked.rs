//! Files of an overlay of the host that have several names there.
//!
//! Two names of one file in a lower layer are two files for Linux: what is written by one name is copied up under
//! that name alone. Yet overlayfs gives both one inode number until then, so a server that knows files by their
//! numbers takes them for one, and writes to the name that it met first. Two names that were made in the upper
//! layer are one file. No number tells the two cases apart.
//!
//! So such a file is known by the inode that the host's kernel has for it. inotify(7) tells inodes apart: adding a
//! watch for an inode that is watched already returns the same watch, whichever name it was found by. The watches
//! ask for no event.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify::{WatchFlags, add_watch, remove_watch};
use rustix::fs::{FsWord, Mode, OFlags, fstatfs, openat};
use rustix::io::Errno;
use rustix::process::fchdir;
use virtiofsd::passthrough::stat::{StatExt, statx};

use crate::share::Inode;

/// overlayfs's magic number (linux/magic.h).
const OVERLAYFS: FsWord = 0x794c_7630;
/// Bytes of events that are read at a time.
const EVENTS: usize = 4096;

/// By which a file is known: its watch, and the mount through which the guest sees it (`STATX_MNT_ID` of statx(2)).
/// Two mounts of one file system may have other rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    watch: i32,
    mount: u64,
}

/// The files that the guest knows.
#[derive(Default)]
struct Known {
    files: HashMap<Identity, Inode>,
    /// Files by watch: so many mounts show one.
    mounts: HashMap<i32, usize>,
    /// Inode numbers that such files have or have had, with how many files.
    numbers: HashMap<u64, usize>,
}

/// What tells them apart.
pub struct Linked {
    /// An inotify instance.
    watches: OwnedFd,
    known: Mutex<Known>,
}

/// A file that was found.
pub struct Found {
    /// Opened with `O_PATH`.
    pub file: OwnedFd,
    /// What it is like.
    pub stat: StatExt,
    /// By which it is known.
    pub identity: Identity,
}

impl Linked {
    /// Files that an inotify instance, which reads without waiting, tells apart.
    pub fn new(watches: OwnedFd) -> Self {
        Self { watches, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a file with so many names and this number may be one of these.
    pub fn may_be(&self, names: u32, number: u64) -> bool {
        names > 1 || self.known().numbers.contains_key(&number)
    }

    /// Whether the guest knows none.
    pub fn is_empty(&self) -> bool {
        self.known().files.is_empty()
    }

    /// Finds a name in a folder, and returns the guest's number for the file and what the file is like. A file that the
    /// guest does not know yet gets its number from `keep`. `None` is for what is not such a file. `descriptors` is
    /// `/proc/self/fd`.
    ///
    /// # Errors
    /// Those of openat(2), statx(2), inotify_add_watch(2) and of `keep`.
    pub fn find(
        &self,
        descriptors: &File,
        folder: &File,
        name: &CStr,
        keep: impl FnOnce(Found) -> io::Result<Inode>,
    ) -> io::Result<Option<(Inode, libc::stat64)>> {
        if fstatfs(folder)?.f_type != OVERLAYFS {
            return Ok(None);
        }
        let file = openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = statx(&file, None)?;
        let (st, mount) = (stat.st, stat.mnt_id);
        if st.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return Ok(None);
        }
        let mut known = self.known();
        // inotify_add_watch takes a path alone. Each worker has a current folder of its own, and whatever needs
        // one enters it first.
        fchdir(descriptors)?;
        let watch = add_watch(&self.watches, file.as_raw_fd().to_string(), WatchFlags::EXCL_UNLINK).map_err(|error| match error {
            // As many are watched as may be (`fs.inotify.max_user_watches`): the guest is told to forget some.
            Errno::NOSPC => Errno::NFILE,
            error => error,
        })?;
        let identity = Identity { watch, mount };
        if let Some(inode) = known.files.get(&identity) {
            return Ok(Some((*inode, st)));
        }
        let kept = if st.st_nlink > 1 { keep(Found { file, stat, identity }).map(Some) } else { Ok(None) };
        if let Ok(Some(inode)) = kept {
            known.files.insert(identity, inode);
            *known.mounts.entry(watch).or_default() += 1;
            *known.numbers.entry(st.st_ino).or_default() += 1;
        } else if !known.mounts.contains_key(&watch) {
            self.unwatch(watch);
        }
        Ok(kept?.map(|inode| (inode, st)))
    }

    /// Notes that a file's number is no longer `before`: it was copied up.
    pub fn renumber(&self, before: u64, now: u64) {
        let mut known = self.known();
        take_from(&mut known.numbers, &before);
        *known.numbers.entry(now).or_default() += 1;
    }

    /// Forgets a file that was kept, which has this number.
    pub fn forget(&self, identity: Identity, number: u64) {
        let mut known = self.known();
        known.files.remove(&identity);
        take_from(&mut known.numbers, &number);
        if take_from(&mut known.mounts, &identity.watch) {
            self.unwatch(identity.watch);
        }
    }

    /// Forgets all files.
    pub fn clear(&self) {
        let known = std::mem::take(&mut *self.known());
        known.mounts.keys().for_each(|watch| self.unwatch(*watch));
    }

    /// Takes a watch away. The kernel says so by an event, which is read and dropped.
    fn unwatch(&self, watch: i32) {
        // Either fails only for a watch that the kernel has taken away itself, with the file system.
        let _ = remove_watch(&self.watches, watch);
        let _ = rustix::io::read(&self.watches, &mut [0; EVENTS]);
    }
}

/// Counts one down, and returns whether it was the last.
fn take_from<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: &K) -> bool {
    let Some(count) = counts.get_mut(key) else { return false };
    *count -= 1;
    let last = *count == 0;
    if last {
        counts.remove(key);
    }
    last
}
