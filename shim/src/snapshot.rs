//! The folder of a container's snapshot, in the share: for a root file system of which the guest has the layers as disks,
//! and which it lays over one another itself (docs/decisions/020-layers-as-disks.md).
//!
//! ```text
//! SNAPSHOT/fs    what the container writes, as the snapshotter has it
//! SNAPSHOT/work  what overlayfs needs on the same mount
//! ```
//!
//! The guest's overlay marks folders that hide what is below them by an attribute, as the host's does, but no guest sets
//! that one on the host: the file server keeps it under another name. So that the snapshot means the same to both, the
//! marks are carried over before it is shared and afterwards.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use caisson_protocol::guest::{UPPER_DIR, WORK_DIR};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, XattrFlags, fgetxattr, fsetxattr, mkdirat, openat, removexattr, setxattr, statat, unlinkat,
};
use rustix::io::Errno;

use crate::idmap::IdMap;
use crate::mounts::{self, How};

/// A folder that hides what is below it (Linux `Documentation/filesystems/overlayfs.rst`, "whiteouts and opaque
/// directories"): by its name on the host, and by the one that `caisson-fs` keeps it under.
const HOSTS_MARK: &str = "trusted.overlay.opaque";
const GUESTS_MARK: &str = "user.virtiofs.trusted.overlay.opaque";
const OPAQUE: &[u8] = b"y";
/// Folders within one another that are looked at: twice as many are open then.
const MAX_DEPTH: usize = 128;
/// Files and folders that are looked at: a container may have left any number.
const MAX_ENTRIES: usize = 1 << 20;
/// A folder is opened as what it is, not what a link leads to.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// With other owners the folder is nobody's in the guest, who must come through it.
const PASSABLE: u32 = 0o711;

/// Whether nothing was written to a snapshot.
pub fn is_fresh(snapshot: &Path) -> bool {
    std::fs::read_dir(snapshot.join(UPPER_DIR)).is_ok_and(|mut entries| entries.next().is_none())
}

/// Whether the file system of a snapshot can be written by a guest's overlay.
pub fn can_be_shared(snapshot: &Path) -> bool {
    let is_folder = |name: &str| std::fs::symlink_metadata(snapshot.join(name)).is_ok_and(|meta| meta.is_dir());
    let work = snapshot.join(WORK_DIR);
    is_folder(UPPER_DIR)
        && is_folder(WORK_DIR)
        && setxattr(&work, GUESTS_MARK, OPAQUE, XattrFlags::empty()).is_ok()
        && removexattr(&work, GUESTS_MARK).is_ok()
}

/// Prepares a snapshot's folder for the share, and returns a copy of it that is attached nowhere; with `owners` its files
/// have those, on disk as in the share.
///
/// # Errors
/// What could not be prepared or bound, and why.
pub fn share(snapshot: &Path, owners: Option<&IdMap>) -> Result<OwnedFd> {
    let (upper, work) = (snapshot.join(UPPER_DIR), snapshot.join(WORK_DIR));
    // Another overlay's, which nobody needs any more.
    for entry in std::fs::read_dir(&work).with_context(|| format!("read {}", work.display()))? {
        let entry = entry.with_context(|| format!("read {}", work.display()))?;
        let path = entry.path();
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = if is_folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.with_context(|| format!("remove {}", path.display()))?;
    }
    let top = rustix::fs::open(snapshot, FOLDER, Mode::empty()).with_context(|| format!("open {}", snapshot.display()))?;
    carry_marks(&top, HOSTS_MARK, GUESTS_MARK).with_context(|| format!("carry over the marks of {}", snapshot.display()))?;
    if let Some(owners) = owners {
        own(&upper, owners)?;
        own(&work, owners)?;
        let passable = std::fs::Permissions::from_mode(PASSABLE);
        std::fs::set_permissions(snapshot, passable).with_context(|| format!("let others through {}", snapshot.display()))?;
    }
    mounts::copy(snapshot, &How::default()).context("share it with the guest")
}

/// Gives a fresh snapshot's own folder, which is the root of its overlay, the owners that its layers' have
/// in the pod. containerd does that where it asks for the mapping itself.
///
/// # Errors
/// When another pod's ids are in it, or it cannot be given away.
pub fn own(folder: &Path, owners: &IdMap) -> Result<()> {
    let meta = std::fs::metadata(folder).with_context(|| format!("look at {}", folder.display()))?;
    // One that another run of the container has left has them.
    let (user, group) = owners.seen(meta.uid(), meta.gid());
    ensure!(
        user.is_some() || owners.shows(meta.uid()),
        "its snapshot belongs to user {}: it was written with another fs.id_base",
        meta.uid()
    );
    chown(folder, user, group).with_context(|| format!("change the owner of {}", folder.display()))
}

/// The folder of a snapshot that a guest had, held open.
pub struct Left(OwnedFd);

impl Left {
    /// The one at a path, when it is there.
    pub fn at(snapshot: &Path) -> Option<Self> {
        rustix::fs::open(snapshot, FOLDER, Mode::empty()).ok().map(Self)
    }

    /// Makes what the container has left the host's again. What goes wrong is said in the log.
    pub fn settle(self) {
        for name in [UPPER_DIR, WORK_DIR] {
            // The file server keeps the guest from that, and would have to be taken over first.
            let is_folder = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_folder) {
                log::error!("{name} of a snapshot is no folder any more; what is in its place is removed");
                let _ = unlinkat(&self.0, name, AtFlags::empty());
                let _ = mkdirat(&self.0, name, Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH);
            }
        }
        if let Err(error) = carry_marks(&self.0, GUESTS_MARK, HOSTS_MARK) {
            log::error!("carry over the marks of a snapshot: {error:#}");
        }
    }
}

/// Marks the folders of a snapshot by one attribute that are marked by another.
fn carry_marks(snapshot: &OwnedFd, from: &str, to: &str) -> Result<()> {
    let upper = openat(snapshot, UPPER_DIR, FOLDER, Mode::empty()).context("open what was written")?;
    let mut entries = 0;
    let all = carry_below(&upper, from, to, 0, &mut entries)?;
    if !all {
        log::warn!(
            "of a snapshot with more than {MAX_DEPTH} folders within one another, or {MAX_ENTRIES} files, not all marks are carried over"
        );
    }
    Ok(())
}

/// No path that somebody could change meanwhile leads anywhere else: each folder is found in the one before. Whether everything
/// was looked at.
fn carry_below(folder: &OwnedFd, from: &str, to: &str, depth: usize, entries: &mut usize) -> Result<bool> {
    if depth == MAX_DEPTH {
        return Ok(false);
    }
    let mut value = [0; OPAQUE.len()];
    match fgetxattr(folder, from, &mut value) {
        Ok(_) if value == *OPAQUE => fsetxattr(folder, to, OPAQUE, XattrFlags::empty()).context("mark a folder")?,
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => {}
        Err(error) => return Err(error).context("look for a folder's mark"),
    }
    let mut all = true;
    for entry in Dir::read_from(folder).context("read a folder")? {
        let entry = entry.context("read a folder")?;
        *entries += 1;
        if *entries > MAX_ENTRIES {
            return Ok(false);
        }
        if entry.file_type() != FileType::Directory || matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        match openat(folder, entry.file_name(), FOLDER, Mode::empty()) {
            Ok(inner) => all &= carry_below(&inner, from, to, depth + 1, entries)?,
            // Gone, or another thing by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error).context("open a folder"),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER_MARK: &str = "user.other";

    fn marked(folder: &Path, name: &str) -> bool {
        rustix::fs::getxattr(folder, name, &mut [0; 8]).is_ok()
    }

    #[test]
    fn marks_are_carried_to_folders_and_through_no_link() {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("fs")).unwrap();
        assert!(is_fresh(top.path()));
        let (upper, outside) = (top.path().join("fs"), top.path().join("outside"));
        for folder in ["fs/a/b", "fs/plain", "outside/inner"] {
            std::fs::create_dir_all(top.path().join(folder)).unwrap();
        }
        std::os::unix::fs::symlink(&outside, upper.join("link")).unwrap();
        for folder in [upper.join("a/b"), outside.join("inner")] {
            setxattr(&folder, GUESTS_MARK, OPAQUE, XattrFlags::empty()).unwrap();
        }
        assert!(!is_fresh(top.path()));
        setxattr(upper.join("plain"), GUESTS_MARK, b"n", XattrFlags::empty()).unwrap();
        let snapshot = rustix::fs::open(top.path(), FOLDER, Mode::empty()).unwrap();
        carry_marks(&snapshot, GUESTS_MARK, OTHER_MARK).unwrap();
        let found = ["a", "a/b", "plain", "link/inner"].map(|folder| marked(&upper.join(folder), OTHER_MARK));
        assert_eq!(found, [false, true, false, false]);
    }

    #[test]
    fn a_snapshot_in_which_a_link_has_come_is_a_folder_again() {
        // Also where they lead nowhere, yet.
        for target in ["/", "/does/not/exist"] {
            let container = tempfile::tempdir().unwrap();
            let snapshot = container.path().join("7");
            std::fs::create_dir(&snapshot).unwrap();
            for name in [UPPER_DIR, WORK_DIR] {
                std::os::unix::fs::symlink(target, snapshot.join(name)).unwrap();
            }
            assert!(!can_be_shared(&snapshot) && (target == "/" || !is_fresh(&snapshot)));
            Left::at(&snapshot).unwrap().settle();
            for name in [UPPER_DIR, WORK_DIR] {
                assert!(std::fs::symlink_metadata(snapshot.join(name)).unwrap().is_dir());
                assert!(std::fs::read_dir(snapshot.join(name)).unwrap().next().is_none());
            }
        }
    }

    #[test]
    fn no_more_is_looked_at_than_is_bounded() {
        let top = tempfile::tempdir().unwrap();
        let (upper, deep) = (top.path().join("fs"), "d/".repeat(MAX_DEPTH));
        std::fs::create_dir_all(upper.join(&deep)).unwrap();
        let open = || rustix::fs::open(&upper, FOLDER, Mode::empty()).unwrap();
        assert!(!carry_below(&open(), GUESTS_MARK, OTHER_MARK, 0, &mut 0).unwrap());
        assert!(carry_below(&open(), GUESTS_MARK, OTHER_MARK, 0, &mut (MAX_ENTRIES - 2)).is_ok_and(|all| !all));
        assert!(
            carry_below(&rustix::fs::open(upper.join("d/d"), FOLDER, Mode::empty()).unwrap(), GUESTS_MARK, OTHER_MARK, 0, &mut 0).unwrap()
        );
    }
}
