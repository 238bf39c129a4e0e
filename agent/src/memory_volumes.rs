//! Volumes of the guest's memory, which a pod's containers share: tmpfs and huge pages. They are made when the
//! first container has them, and last as long as the pod.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use caisson_protocol::agent::MemoryVolume;
use caisson_protocol::guest::MEMORY_DIR;
use caisson_sys::mounts;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use crate::names::check_file_name;

/// One at a time: what is there is mounted.
static TURN: Mutex<()> = Mutex::new(());

/// Makes a volume, which may be there, and the part of it that a container gets.
///
/// # Errors
/// When a name is no plain name, a part leads out of the volume, or a mount fails.
pub fn make(volume: &MemoryVolume) -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    check_file_name(&volume.name).context("memory volume")?;
    let target = Path::new(MEMORY_DIR).join(&volume.name);
    if !target.exists() {
        std::fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
        mount_volume(volume, &target).inspect_err(|_| drop(std::fs::remove_dir(&target)))?;
    }
    if volume.folder.is_empty() {
        return Ok(());
    }
    check_file_name(&volume.folder_name).context("folder of a memory volume")?;
    let folder = open_folder(volume, &target).with_context(|| format!("open folder {:?} of a memory volume", volume.folder))?;
    // By its descriptor: containers that have all of the volume may put a link where the folder was.
    let tree = mounts::clone_mount_of(&folder.into()).context("copy the mount of a memory volume's folder")?;
    let place = Path::new(MEMORY_DIR).join(&volume.folder_name);
    // That of a container before it may be of a folder that was removed since; nobody else needs it.
    let _ = umount2(&place, MntFlags::MNT_DETACH);
    std::fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    mounts::move_mount(&tree, &place).context("mount a memory volume's folder")
}

fn mount_volume(volume: &MemoryVolume, target: &Path) -> Result<()> {
    let MemoryVolume { bytes, user, group, mode, .. } = volume;
    let mut data = format!("mode={:o},uid={user},gid={group}", mode & 0o7777);
    let kind = if volume.huge_pages { "hugetlbfs" } else { "tmpfs" };
    if volume.huge_pages {
        data.push_str(",pagesize=2M");
    }
    if *bytes != 0 {
        data.push_str(&format!(",size={bytes}"));
    }
    mount(Some(kind), target, Some(kind), MsFlags::MS_NODEV, Some(data.as_str()))
        .with_context(|| format!("mount a memory volume ({kind}, {data})"))
}

/// Opens a folder of a volume, made where it is not there; no link on the way is followed.
fn open_folder(volume: &MemoryVolume, top: &Path) -> Result<OwnedFd> {
    const FLAGS: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
    let mode = Mode::from_bits_truncate(volume.mode & 0o7777);
    let mut folder = open(top, FLAGS, Mode::empty())?;
    for part in Path::new(&volume.folder).components() {
        let Component::Normal(name) = part else { anyhow::bail!("it leads out of the volume") };
        folder = match openat(folder.as_fd(), name, FLAGS, Mode::empty()) {
            Err(Errno::ENOENT) => {
                mkdirat(folder.as_fd(), name, mode)?;
                let (user, group) = (Uid::from_raw(volume.user), Gid::from_raw(volume.group));
                fchownat(folder.as_fd(), name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
                let made = openat(folder.as_fd(), name, FLAGS, Mode::empty())?;
                fchmod(made.as_fd(), mode)?;
                made
            }
            found => found?,
        };
    }
    Ok(folder)
}
