//! Disks that the host puts into the machine's places and takes away again: found, mounted, let go.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_protocol::agent::{AttachDiskRequest, DiskMount};
use caisson_protocol::guest::{DISKS_DIR, FIRST_DISK_DEVICE};
use caisson_protocol::vmm::DISKS;
use nix::errno::Errno;
use nix::mount::{MntFlags, mount, umount2};

use crate::containers::Error;
use crate::init::flags_and_data;
use crate::machine;
use crate::names::check_file_name;

/// For the last process of a container to be gone that used its files.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(5);

/// The disks, by their places, with where they are mounted. Calls are made side by side: a disk that does
/// not answer holds up nobody but who asked for it.
#[derive(Default, Clone)]
pub struct Disks(Arc<Mutex<HashMap<u32, Option<PathBuf>>>>);

impl Disks {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Option<PathBuf>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the disk in a place, and mounts it when it is to be; returns its device's numbers.
    ///
    /// # Errors
    /// What could not be found or mounted, and why; then the place is as it was.
    pub fn attach(&self, request: &AttachDiskRequest) -> Result<(u32, u32)> {
        let place = request.place;
        match self.lock().entry(place) {
            Entry::Vacant(entry) if place < DISKS => entry.insert(None),
            _ => bail!("disk {place}: there are {DISKS} places, each for one disk"),
        };
        let found = machine::find_device(device(place)).and_then(|()| find(place, request.mount.as_ref()));
        let Ok((_, target)) = &found else {
            self.lock().remove(&place);
            // Why it failed comes first.
            let _ = machine::forget_device(device(place));
            return found.map(|(numbers, _)| numbers);
        };
        match self.lock().get_mut(&place) {
            Some(mounted) => mounted.clone_from(target),
            // Whoever asked has given up meanwhile.
            None => let_go(place, target.as_deref())?,
        }
        found.map(|(numbers, _)| numbers)
    }

    /// Unmounts the disk in a place, so that everything is on it, and lets go of it.
    ///
    /// # Errors
    /// When there is none, or it is in use: then it is let go all the same.
    pub fn detach(&self, place: u32) -> Result<(), Error> {
        let target = self.lock().remove(&place).ok_or_else(|| Error::NotFound(format!("disk {place}")))?;
        Ok(let_go(place, target.as_deref())?)
    }
}

/// The numbers of a disk's device, and where it is mounted now.
fn find(place: u32, wanted: Option<&DiskMount>) -> Result<((u32, u32), Option<PathBuf>)> {
    let found = machine::class_dir(device(place), "block").context("find the disk")?;
    let numbers = std::fs::read_to_string(found.join("dev")).context("read its numbers")?;
    let numbers = numbers.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let numbers = numbers.context("its numbers are none")?;
    let Some(wanted) = wanted else { return Ok((numbers, None)) };
    let source = Path::new("/dev").join(found.file_name().context("it has no name")?);
    let target = target(wanted)?;
    std::fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    let (flags, data) = flags_and_data(&wanted.options);
    mount(Some(&source), &target, Some(wanted.type_.as_str()), flags, Some(data.as_str())).with_context(|| {
        format!("mount the {} file system of disk {} (options {:?})", wanted.type_, wanted.name, wanted.options.join(","))
    })?;
    Ok((numbers, Some(target)))
}

fn let_go(place: u32, target: Option<&Path>) -> Result<()> {
    let unmounted = target.map_or(Ok(()), unmount);
    machine::forget_device(device(place)).and(unmounted)
}

fn device(place: u32) -> u32 {
    FIRST_DISK_DEVICE + place
}

/// Where a disk is mounted; both names are plain.
fn target(wanted: &DiskMount) -> Result<PathBuf> {
    for name in [&wanted.container, &wanted.name] {
        check_file_name(name)?;
    }
    Ok(Path::new(DISKS_DIR).join(&wanted.container).join(&wanted.name))
}

fn unmount(target: &Path) -> Result<()> {
    // Whoever else still holds it, as a container's mount namespace may.
    let written = File::open(target).and_then(|folder| Ok(nix::unistd::syncfs(&folder)?));
    let begin = Instant::now();
    let unmounted = loop {
        match umount2(target, MntFlags::empty()) {
            Err(Errno::EBUSY) if begin.elapsed() < BUSY_TIMEOUT => std::thread::sleep(INTERVAL),
            // Whoever still uses it has errors from now on.
            Err(Errno::EBUSY) => {
                break umount2(target, MntFlags::MNT_DETACH).and(Err(Errno::EBUSY));
            }
            outcome => break outcome,
        }
    };
    // The container's folder goes with its last disk.
    let _ = std::fs::remove_dir(target);
    let _ = target.parent().map(std::fs::remove_dir);
    written.with_context(|| format!("write out {}", target.display()))?;
    unmounted.with_context(|| format!("unmount {}", target.display()))
}
