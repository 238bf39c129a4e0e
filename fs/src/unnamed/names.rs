//! Files of an overlay that have several names (`linked.rs`), found, told of and forgotten.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry};
use virtiofsd::fuse::Attr;

use super::file::{self, Kind, Own};
use super::{Files, Place};
use crate::seal::check_name;
use crate::share::Inode;

impl Files {
    /// What a file is like that was found on the host.
    pub(super) fn attr_of(&self, stat: libc::stat64) -> io::Result<Attr> {
        let mut attr = file::attr_of(stat)?;
        self.share.mark(&mut attr);
        Ok(attr)
    }

    /// Answers a lookup with a file of ours, where the name is of a file of an overlay that has several.
    pub(super) fn find_linked(&self, ctx: Context, parent: Inode, name: &CStr, found: &Entry) -> io::Result<Option<Entry>> {
        let is_folder = found.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        if is_folder || !self.linked.may_be(found.attr.nlink, found.attr.ino) {
            return Ok(None);
        }
        let folder = match self.share.file(ctx, parent, false) {
            // A folder of users whom the pod does not have is on no overlay of the pod's.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            folder => folder?,
        };
        let keep = |found| {
            let own = Arc::new(Own::linked(&self.rules, found)?);
            let mut known = self.known_mut();
            let inode = known.number();
            known.files.insert(inode, Place::Here(own));
            Ok(inode)
        };
        let Some((inode, stat)) = self.linked.find(&self.rules.descriptors, &folder, name, keep)? else { return Ok(None) };
        self.tell(inode, stat).map(Some)
    }

    /// The answer for a file of ours that has names, which the guest is told of once more.
    pub(super) fn tell(&self, inode: Inode, stat: libc::stat64) -> io::Result<Entry> {
        let attr = self.attr_of(stat)?;
        if let Place::Here(own) = self.place(inode)
            && let Kind::Linked { told, .. } = &own.kind
        {
            told.fetch_add(1, Ordering::Relaxed);
        }
        let (attr_timeout, entry_timeout) = (self.attr_timeout(&attr), self.rules.attr_timeout);
        Ok(Entry { inode, generation: 0, attr, attr_timeout, entry_timeout })
    }

    /// For how long the guest may keep what it has heard of a file of ours. To open one of a lower layer for writing leaves
    /// it one name, which the answer to the guest's open has no room to say.
    pub(super) fn attr_timeout(&self, attr: &Attr) -> Duration {
        if attr.nlink > 1 { Duration::ZERO } else { self.rules.attr_timeout }
    }

    /// Looks whether a file was copied up, which gives it another number of the host's. It is found by that later.
    pub(super) fn settle(&self, own: &Own) -> io::Result<Attr> {
        let attr = self.attr(own)?;
        if let Kind::Linked { number, .. } = &own.kind {
            let before = number.swap(attr.ino, Ordering::Relaxed);
            if before != attr.ino {
                self.linked.renumber(before, attr.ino);
            }
        }
        Ok(attr)
    }

    /// Notes that a file of ours may have been copied up by its name.
    pub(super) fn settle_name(&self, ctx: Context, folder: Inode, name: &CStr) {
        if self.linked.is_empty() {
            return;
        }
        // What cannot be looked at now is looked at when the guest finds it, if it is found by its old number.
        let Ok(folder) = self.share.file(ctx, folder, false) else { return };
        let known = |_| Err(io::Error::from_raw_os_error(libc::ENOENT));
        if let Ok(Some((inode, _))) = self.linked.find(&self.rules.descriptors, &folder, name, known)
            && let Place::Here(own) = self.place(inode)
        {
            let _ = self.settle(&own);
        }
    }

    /// Gives a file that has names another.
    pub(super) fn link_again(&self, ctx: Context, inode: Inode, own: &Own, folder: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.share.within(ctx, folder, |folder| own.link(&self.rules, folder, name))?;
        self.settle(own)?;
        self.tell(inode, own.stat()?)
    }

    /// Notes that the guest has forgotten a file that has names so often.
    pub(super) fn forget_linked(&self, inode: Inode, own: &Own, count: u64) {
        let Kind::Linked { identity, told, number, .. } = &own.kind else { return };
        // Never below none, whatever a guest says that it forgets.
        let forget = |told: u64| Some(told.saturating_sub(count));
        let before = told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, forget).unwrap_or(0);
        if before > count {
            return;
        }
        // No file is found meanwhile: it may have been told of this one again.
        self.share.descriptors().alone(|| {
            if told.load(Ordering::Relaxed) > 0 {
                return;
            }
            let gone = self.known_mut().files.remove(&inode);
            if gone.is_some() {
                self.linked.forget(*identity, number.load(Ordering::Relaxed));
                self.share.unkeep(inode);
                self.share.descriptors().give_back();
            }
        });
    }
}
