//! What of a file gives rights on the host, by what its mount keeps (`volumes.rs`).

use std::ffi::CStr;
use std::io;

use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
use virtiofsd::filesystem::{Context, FileSystem, SetattrValid};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::passthrough::stat::statx;

use super::{Files, Place};
use crate::share::Inode;
use crate::volumes::{gives_rights, without_rights};

impl Files {
    /// Whether the mount of a file that the guest knows keeps what gives rights. One that cannot be looked at does not: it
    /// is of users whom the pod does not have, or the file is a link, device or pipe, which nothing gives rights.
    pub(super) fn keeps(&self, ctx: Context, inode: Inode) -> io::Result<bool> {
        match self.volumes.keep(|| self.mount(ctx, inode)) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EBADF)) => Ok(false),
            kept => kept,
        }
    }

    /// The mount of a file that the guest knows.
    fn mount(&self, ctx: Context, inode: Inode) -> io::Result<u64> {
        Ok(match self.place(inode) {
            Place::Here(own) => own.mount()?,
            Place::Share { inode, .. } => statx(&self.share.file(ctx, inode, false)?, None)?.mnt_id,
        })
    }

    /// The mode for a regular file, by what is kept in the mount of another one, its folder say.
    pub(super) fn kept_mode(&self, ctx: Context, inode: Inode, mode: u32) -> io::Result<u32> {
        let keeps = !gives_rights(mode) || self.keeps(ctx, inode)?;
        Ok(if keeps { mode } else { without_rights(mode) })
    }

    /// What is to be changed of a file, by what is kept in its mount.
    pub(super) fn kept_change(&self, ctx: Context, inode: Inode, wanted: SetattrIn, valid: SetattrValid) -> io::Result<SetattrIn> {
        if !valid.contains(SetattrValid::MODE) || !gives_rights(wanted.mode) {
            return Ok(wanted);
        }
        // Folders hand their group on so, which many volumes live by.
        let is_regular = self.getattr(ctx, inode, None)?.0.mode & libc::S_IFMT == libc::S_IFREG;
        let mode = if is_regular { self.kept_mode(ctx, inode, wanted.mode)? } else { wanted.mode };
        Ok(SetattrIn { mode, ..wanted })
    }

    /// Notes which mount a file is in that was found by its name.
    pub(super) fn note_mount(&self, ctx: Context, parent: Inode, name: &CStr, inode: Inode) -> io::Result<()> {
        // Not opened to be read: the folder of a snapshot may be nobody's in the pod.
        let mount = || {
            let folder = self.share.file(ctx, parent, false)?;
            let found = openat(&folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            Ok(statx(&found, None)?.mnt_id)
        };
        let is_there = |path: &CStr| statat(&self.rules.root, path, AtFlags::SYMLINK_NOFOLLOW).is_ok();
        self.volumes.found(parent, name, inode, mount, is_there)
    }
}
