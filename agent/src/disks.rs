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
use crate::names::check_file_name;
use crate::{machine, sys};

/// For the last process of a container to be gone that used its files.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(5);

/// The disks, by their places, with where what is on them is mounted. Calls are made side by side: a disk that does
/// not answer holds up nobody but who asked for it.
#[derive(Default, Clone)]
pub struct Disks(Arc<Mutex<HashMap<u32, Vec<PathBuf>>>>);

impl Disks {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Vec<PathBuf>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the disk in a place, and mounts it when it is to be; returns its device's numbers.
    ///
    /// # Errors
    /// What could not be found or mounted, and why; then the place is as it was.
    pub fn attach(&self, request: &AttachDiskRequest) -> Result<(u32, u32)> {
        let place = request.place;
        match self.lock().entry(place) {
            Entry::Vacant(entry) if place < *DISKS.end() => entry.insert(Vec::new()),
            _ => bail!("disk {place}: there are {} places, each for one disk", DISKS.end()),
        };
        let found = machine::find_device(device(place)).and_then(|()| find(place, request));
        let Ok((_, targets)) = &found else {
            self.lock().remove(&place);
            // Why it failed comes first.
            let _ = machine::forget_device(device(place));
            return found.map(|(numbers, _)| numbers);
        };
        match self.lock().get_mut(&place) {
            Some(mounted) => mounted.clone_from(targets),
            // Whoever asked has given up meanwhile.
            None => let_go(place, targets)?,
        }
        found.map(|(numbers, _)| numbers)
    }

    /// Unmounts the disk in a place, so that everything is on it, and lets go of it.
    ///
    /// # Errors
    /// When there is none, or it is in use: then it is let go all the same.
    pub fn detach(&self, place: u32) -> Result<(), Error> {
        let targets = self.lock().remove(&place).ok_or_else(|| Error::NotFound(format!("disk {place}")))?;
        Ok(let_go(place, &targets)?)
    }
}

/// The numbers of a disk's device, and where what is on it is mounted now.
fn find(place: u32, request: &AttachDiskRequest) -> Result<((u32, u32), Vec<PathBuf>)> {
    let found = machine::class_dir(device(place), "block").context("find the disk")?;
    let numbers = std::fs::read_to_string(found.join("dev")).context("read its numbers")?;
    let numbers = numbers.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let numbers = numbers.context("its numbers are none")?;
    let Some(wanted) = request.mount.as_ref() else { return Ok((numbers, Vec::new())) };
    let (name, target) = (found.file_name().context("it has no name")?.to_string_lossy(), target(wanted)?);
    if request.parts.is_empty() {
        mount_one(&name, &target, wanted)?;
        return Ok((numbers, vec![target]));
    }
    divide(&found, &name, &request.parts)?;
    let mut targets = Vec::new();
    for index in 0..request.parts.len() {
        let target = target.join(index.to_string());
        if let Err(error) = mount_one(&format!("{name}{}", index + 1), &target, wanted) {
            // Why it failed comes first.
            let _ = unmount_all(&targets);
            return Err(error.context(format!("part {index}")));
        }
        targets.push(target);
    }
    Ok((numbers, targets))
}

/// Mounts a disk, or a part of one, by its device's name.
fn mount_one(device: &str, target: &Path, wanted: &DiskMount) -> Result<()> {
    std::fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    let (flags, data) = flags_and_data(&wanted.options);
    mount(Some(&Path::new("/dev").join(device)), target, Some(wanted.type_.as_str()), flags, Some(data.as_str()))
        .with_context(|| format!("mount the {} file system of disk {} (options {:?})", wanted.type_, wanted.name, wanted.options.join(",")))
}

/// Has the kernel know the parts of a disk as devices, numbered from 1. What it has found on the disk itself is none of them.
fn divide(folder: &Path, name: &str, parts: &[u64]) -> Result<()> {
    let disk = File::open(Path::new("/dev").join(name)).with_context(|| format!("open {name}"))?;
    for entry in std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry.with_context(|| format!("read {}", folder.display()))?.file_name();
        if let Some(number) = entry.to_string_lossy().strip_prefix(name).and_then(|number| number.parse().ok()) {
            sys::remove_partition(&disk, number).with_context(|| format!("forget partition {number} of {name}"))?;
        }
    }
    let mut start = 0u64;
    for (number, bytes) in (1..).zip(parts) {
        sys::add_partition(&disk, number, start, *bytes).with_context(|| format!("tell part {number} of {name} from the others"))?;
        start = start.checked_add(*bytes).context("its parts are larger than any disk")?;
    }
    Ok(())
}

fn let_go(place: u32, targets: &[PathBuf]) -> Result<()> {
    let unmounted = unmount_all(targets);
    machine::forget_device(device(place)).and(unmounted)
}

/// Unmounts all of them; what fails first is reported.
fn unmount_all(targets: &[PathBuf]) -> Result<()> {
    targets.iter().map(|target| unmount(target)).fold(Ok(()), Result::and)
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
    // The container's folder goes with its last disk, and the disk's with its last part.
    for folder in target.ancestors().take_while(|folder| *folder != Path::new(DISKS_DIR)) {
        let _ = std::fs::remove_dir(folder);
    }
    written.with_context(|| format!("write out {}", target.display()))?;
    unmounted.with_context(|| format!("unmount {}", target.display()))
}
