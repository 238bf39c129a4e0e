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
use caisson_protocol::guest::{SNAPSHOT_DIR, UPPER_DIR, WORK_DIR};
use rustix::fs::{Dir, FileType, Mode, OFlags, XattrFlags, fgetxattr, fsetxattr, openat, removexattr, setxattr};
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
/// A folder is opened as what it is, not what a link leads to.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// With other owners the folder is nobody's in the guest, who must come through it.
const PASSABLE: u32 = 0o711;

/// Whether the file system of a snapshot can be written by a guest's overlay.
pub fn can_be_shared(snapshot: &Path) -> bool {
    let is_folder = |name: &str| std::fs::symlink_metadata(snapshot.join(name)).is_ok_and(|meta| meta.is_dir());
    let work = snapshot.join(WORK_DIR);
    is_folder(UPPER_DIR)
        && is_folder(WORK_DIR)
        && setxattr(&work, GUESTS_MARK, OPAQUE, XattrFlags::empty()).is_ok()
        && removexattr(&work, GUESTS_MARK).is_ok()
}

/// Binds a snapshot's folder at `target`; with `owners` its files have those, on disk as in the share.
///
/// # Errors
/// What could not be prepared or bound, and why.
pub fn share(snapshot: &Path, target: &Path, owners: Option<&IdMap>) -> Result<()> {
    let (upper, work) = (snapshot.join(UPPER_DIR), snapshot.join(WORK_DIR));
    // Another overlay's, which nobody needs any more.
    for entry in std::fs::read_dir(&work).with_context(|| format!("read {}", work.display()))? {
        let path = entry.with_context(|| format!("read {}", work.display()))?.path();
        std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    carry_marks(&upper, HOSTS_MARK, GUESTS_MARK)?;
    if let Some(owners) = owners {
        own(&upper, owners)?;
        own(&work, owners)?;
        let passable = std::fs::Permissions::from_mode(PASSABLE);
        std::fs::set_permissions(snapshot, passable).with_context(|| format!("let others through {}", snapshot.display()))?;
    }
    std::fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    mounts::bind(snapshot, target, &How::default()).context("share it with the guest")
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

/// Makes what a container has left of its snapshot the host's again, where it has one in its folder of the share. What
/// goes wrong is said in the log.
pub fn settle(container: &Path) {
    let snapshot = container.join(SNAPSHOT_DIR);
    if !snapshot.join(WORK_DIR).exists() && !snapshot.join(UPPER_DIR).exists() {
        return;
    }
    for name in [UPPER_DIR, WORK_DIR] {
        // The file server keeps the guest from that, and would have to be taken over first.
        let path = snapshot.join(name);
        if !std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            log::error!("{}: it is no folder any more; what is there is removed", path.display());
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::create_dir(&path);
        }
    }
    if let Err(error) = carry_marks(&snapshot.join(UPPER_DIR), GUESTS_MARK, HOSTS_MARK) {
        log::error!("{error:#}");
    }
}

/// Marks the folders of a snapshot by one attribute that are marked by another.
fn carry_marks(upper: &Path, from: &str, to: &str) -> Result<()> {
    let what = || format!("carry over the marks of {}", upper.display());
    let top = rustix::fs::open(upper, FOLDER, Mode::empty()).with_context(what)?;
    carry_below(&top, from, to, 0).with_context(what)
}

/// No path that somebody could change meanwhile leads anywhere else: each folder is found in the one before.
fn carry_below(folder: &OwnedFd, from: &str, to: &str, depth: usize) -> Result<()> {
    if depth == MAX_DEPTH {
        log::warn!("of folders more than {MAX_DEPTH} deep it is not known what they hide");
        return Ok(());
    }
    let mut value = [0; OPAQUE.len()];
    match fgetxattr(folder, from, &mut value) {
        Ok(_) if value == *OPAQUE => fsetxattr(folder, to, OPAQUE, XattrFlags::empty()).context("mark a folder")?,
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => {}
        Err(error) => return Err(error).context("look for a folder's mark"),
    }
    for entry in Dir::read_from(folder).context("read a folder")? {
        let entry = entry.context("read a folder")?;
        if entry.file_type() != FileType::Directory || matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        match openat(folder, entry.file_name(), FOLDER, Mode::empty()) {
            Ok(inner) => carry_below(&inner, from, to, depth + 1)?,
            // Gone, or another thing by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error).context("open a folder"),
        }
    }
    Ok(())
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
        let (upper, outside) = (top.path().join("fs"), top.path().join("outside"));
        for folder in ["fs/a/b", "fs/plain", "outside/inner"] {
            std::fs::create_dir_all(top.path().join(folder)).unwrap();
        }
        std::os::unix::fs::symlink(&outside, upper.join("link")).unwrap();
        for folder in [upper.join("a/b"), outside.join("inner")] {
            setxattr(&folder, GUESTS_MARK, OPAQUE, XattrFlags::empty()).unwrap();
        }
        setxattr(upper.join("plain"), GUESTS_MARK, b"n", XattrFlags::empty()).unwrap();
        carry_marks(&upper, GUESTS_MARK, OTHER_MARK).unwrap();
        let found = ["a", "a/b", "plain", "link/inner"].map(|folder| marked(&upper.join(folder), OTHER_MARK));
        assert_eq!(found, [false, true, false, false]);
    }

    #[test]
    fn a_snapshot_in_which_a_link_has_come_is_a_folder_again() {
        let container = tempfile::tempdir().unwrap();
        let snapshot = container.path().join(SNAPSHOT_DIR);
        std::fs::create_dir_all(snapshot.join(WORK_DIR)).unwrap();
        std::os::unix::fs::symlink("/", snapshot.join(UPPER_DIR)).unwrap();
        assert!(!can_be_shared(&snapshot));
        settle(container.path());
        assert!(std::fs::symlink_metadata(snapshot.join(UPPER_DIR)).unwrap().is_dir());
        assert!(std::fs::read_dir(snapshot.join(UPPER_DIR)).unwrap().next().is_none());
    }

    #[test]
    fn a_container_without_a_snapshot_in_the_share_is_left_alone() {
        let container = tempfile::tempdir().unwrap();
        settle(container.path());
        assert!(std::fs::read_dir(container.path()).unwrap().next().is_none());
    }
}
