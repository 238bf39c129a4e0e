//! Disks of the pod: block devices and images of the host that its containers get as disks of their own.
//!
//! Of a container's specification that is its block devices (`linux.devices`, as Kubernetes' raw block
//! volumes are), its mounts of file systems that lie on a device or in a file, and its root file
//! system when a snapshotter keeps that so. The host does not read what is on them: the guest mounts
//! them, and the monitor passes its reads and writes on.
//!
//! ```text
//! wanted -> opened here -> in a place of the machine -> found (and mounted) by the guest
//!                               ^-- unmounted, let go and closed when its last container is deleted
//! ```

mod layers;
mod wanted;

pub use self::wanted::GUESTS_WRITE;

use std::collections::HashMap;
use std::fs::{File, Metadata, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::agent::{DiskMount, Layers};
use caisson_protocol::config::DiskLayers;
use caisson_protocol::guest::DISKS_DIR;
use caisson_protocol::vmm::{BLOCK_SIZES, Disk, RateLimit};
use containerd_shim_protos::types::mount::Mount;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use self::layers::{Layered, layers};
use self::wanted::{Wanted, devices, renumber, root, volume};
use crate::errors::Error;
use crate::pod::lock;
use crate::sandbox::Sandbox;

/// Bytes of the name by which a guest knows a disk (virtio 1.2, 5.2.6).
const SERIAL_BYTES: usize = 20;
/// For somebody's look at what is on a device, and between two tries.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
const LOCK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at the sizes of disks.
const INTERVAL: Duration = Duration::from_secs(5);

/// The disks of a machine, by their places.
pub struct Disks {
    places: Arc<Mutex<Places>>,
    /// How many places there are.
    count: usize,
    limit: RateLimit,
    layers: DiskLayers,
    /// Containers that have some, or are about to, and whether they may write to any of them.
    containers: std::sync::Mutex<HashMap<String, bool>>,
}

struct Places {
    disks: Vec<Option<Attached>>,
    /// Whether a task follows their sizes.
    followed: bool,
}

/// Where a container's root file system is.
pub enum Root {
    /// Nowhere yet.
    Mounts,
    /// On a disk, which the guest has mounted.
    Disk,
    /// In layers on a disk, which the guest has mounted, below a snapshot's folder.
    Layers {
        /// For the guest.
        layers: Layers,
        /// For the share; none where the root is read-only.
        snapshot: Option<PathBuf>,
    },
}

/// A disk in its place.
struct Attached {
    sources: Vec<PathBuf>,
    /// Of the first of them.
    identity: Identity,
    /// Whether each has a file system of its own.
    divided: bool,
    read_only: bool,
    /// What the guest has mounted of it, where that is so.
    mount: Option<DiskMount>,
    bytes: u64,
    /// Of its device in the guest.
    numbers: (u32, u32),
    /// Who has it; nobody when it could not be taken away.
    containers: Vec<String>,
}

/// What tells a device or a file from others at the same path.
type Identity = (u64, u64);

impl Disks {
    /// None yet, of `count` at a time; each is to carry no more than `limit` says, and `layers` says whose are to be some.
    pub fn new(count: u32, limit: RateLimit, layers: DiskLayers) -> Self {
        let disks: Vec<_> = (0..count).map(|_| None).collect();
        let count = disks.len();
        let places = Arc::new(Mutex::new(Places { disks, followed: false }));
        Self { places, count, limit, layers, containers: std::sync::Mutex::default() }
    }

    fn none_left(&self) -> String {
        format!("a pod can have {} disks at a time (disk.places)", self.count)
    }

    /// Gives a container the disks that its specification asks for, and points that at them; returns where its root file
    /// system is.
    ///
    /// # Errors
    /// Which could not be opened, attached or mounted, and why. What was attached until then stays for
    /// [`Disks::release`].
    pub async fn attach(&self, sandbox: &Arc<Sandbox>, container: &str, rootfs: &[Mount], spec: &mut Value) -> Result<Root> {
        for (index, mount) in spec["mounts"].as_array_mut().into_iter().flatten().enumerate() {
            let Some(wanted) = volume(container, index, mount)? else { continue };
            let options = if wanted.read_only { json!(["rbind", "ro"]) } else { json!(["rbind"]) };
            let placed = self.add(sandbox, container, wanted).await?.with_context(|| self.none_left())?;
            *mount = json!({"destination": mount["destination"], "type": "bind", "source": placed.folder, "options": options});
        }
        let mut renumbered = Vec::new();
        for (numbers, wanted) in devices(spec)? {
            renumbered.push((numbers, self.add(sandbox, container, wanted).await?.with_context(|| self.none_left())?.numbers));
        }
        renumber(spec, &renumbered);
        if let Some(wanted) = root(container, rootfs) {
            // What nobody has written the host may mount as well.
            let written = !wanted.is_of_a_kind_that_nobody_writes();
            match self.add(sandbox, container, wanted).await? {
                Some(placed) => {
                    spec["root"]["path"] = json!(placed.folder);
                    return Ok(Root::Disk);
                }
                None if written => bail!("{}, and the host does not mount what a guest may have written", self.none_left()),
                None => {}
            }
        }
        let read_only = spec["root"]["readonly"] == true;
        let wanted = self.layers == DiskLayers::Always || (self.layers == DiskLayers::ReadOnly && read_only);
        if let Some(Layered { wanted, snapshot }) = wanted.then(|| layers(container, rootfs, read_only)).flatten() {
            let count = wanted.sources.len() as u32;
            match self.add(sandbox, container, wanted).await {
                Ok(Some(Placed { folder: Some(folder), .. })) => {
                    return Ok(Root::Layers { layers: Layers { folder, count, read_only, ..Layers::default() }, snapshot });
                }
                Ok(_) => log::debug!("container {container}: its layers are mounted on the host: {}", self.none_left()),
                // The host's kernel knows more kinds of them than the guest's.
                Err(error) => log::warn!("container {container}: its layers are mounted on the host: {error:#}"),
            }
        }
        Ok(Root::Mounts)
    }

    /// Puts a disk into a place, or shares the one that another container of the pod has there; returns
    /// nothing when no place is left.
    async fn add(&self, sandbox: &Arc<Sandbox>, container: &str, wanted: Wanted) -> Result<Option<Placed>> {
        let name = format!("disk {}", describe(&wanted.name, &wanted.sources));
        let what = || name.clone();
        *lock(&self.containers).entry(container.to_owned()).or_default() |= !wanted.read_only;
        let mut places = self.places.lock().await;
        if let Some(disk) = places.disks.iter_mut().flatten().find(|disk| disk.serves(&wanted)) {
            disk.containers.push(container.to_owned());
            return Ok(Some(disk.placed()));
        }
        let Some(place) = places.disks.iter().position(Option::is_none) else { return Ok(None) };
        let (mut files, mut parts, mut block_size) = (Vec::new(), Vec::new(), BLOCK_SIZES[0]);
        for source in &wanted.sources {
            let (file, blocks) = open(source, wanted.mount.is_some(), wanted.read_only).await.with_context(what)?;
            parts.push((&file).seek(SeekFrom::End(0)).with_context(what)?);
            block_size = block_size.max(blocks);
            files.push(file);
        }
        let identity = identity(&files.first().with_context(what)?.metadata().with_context(what)?);
        let bytes = parts.iter().sum();
        let disk = Disk {
            place: place as u32,
            parts: parts.clone(),
            block_size,
            read_only: wanted.read_only,
            serial: serial(&wanted.name),
            limit: self.limit,
        };
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        sandbox.vmm.attach_disk(disk, &descriptors).await.with_context(what)?;
        // Closed here, so that they are closed for good once the monitor has done so.
        drop(files);
        let Wanted { sources, read_only, mount, divided, .. } = wanted;
        let mut disk = Attached { sources, identity, divided, read_only, mount, bytes, numbers: (0, 0), containers: Vec::new() };
        let parts = if divided { parts } else { Vec::new() };
        match sandbox.agent.attach_disk(place as u32, disk.mount.clone(), parts).await {
            Ok(numbers) => disk.numbers = numbers,
            Err(error) => {
                // It may be there all the same, or come yet.
                if !take_away(sandbox, place as u32, &name).await {
                    places.disks[place] = Some(disk);
                }
                return Err(error).with_context(what);
            }
        }
        if !std::mem::replace(&mut places.followed, true) {
            tokio::spawn(follow_sizes(Arc::clone(&self.places), Arc::clone(sandbox)));
        }
        disk.containers.push(container.to_owned());
        Ok(Some(places.disks[place].insert(disk).placed()))
    }

    /// Whether a container has disks that are to be written out before its machine goes.
    pub fn are_written_by(&self, container: &str) -> bool {
        lock(&self.containers).get(container).copied().unwrap_or_default()
    }

    /// Takes away the disks of a container that has exited, in a machine that is about to go: what the
    /// guest has not written yet is written then.
    pub async fn write_out(&self, sandbox: &Sandbox, container: &str) {
        if self.are_written_by(container) {
            // Without its mount namespace nothing holds them.
            let _ = sandbox.agent.delete(container, "").await;
            self.release(sandbox, container).await;
        }
    }

    /// Takes away the disks that only this container has, once its processes are gone.
    pub async fn release(&self, sandbox: &Sandbox, container: &str) {
        if !lock(&self.containers).contains_key(container) {
            return;
        }
        let mut places = self.places.lock().await;
        for (place, slot) in (0u32..).zip(places.disks.iter_mut()) {
            let Some(disk) = slot.as_mut().filter(|disk| disk.containers.iter().any(|user| user == container)) else { continue };
            disk.containers.retain(|user| user != container);
            if !disk.containers.is_empty() {
                continue;
            }
            let what = format!("disk {}", describe(&format!("of container {container}"), &disk.sources));
            if take_away(sandbox, place, &what).await {
                *slot = None;
            }
        }
        lock(&self.containers).remove(container);
    }
}

/// Takes a disk from the guest, and then from the monitor; whether its place is free. One that the guest
/// does not let go stays with it: torn off it would hang whoever uses it.
async fn take_away(sandbox: &Sandbox, place: u32, what: &str) -> bool {
    match sandbox.agent.detach_disk(place).await {
        Ok(()) | Err(Error::NotFound(_) | Error::Gone(_)) => {}
        Err(error @ Error::Timeout(_)) => {
            log::error!("{what}: {error}");
            return false;
        }
        // It was let go all the same.
        Err(error) => log::error!("{what}: {error}"),
    }
    // With a machine that is gone it is closed.
    sandbox.vmm.detach_disk(place).await.inspect_err(|error| log::error!("{what}: {error:#}")).is_ok()
}

/// What a container has to know of its disk: the numbers of its device in the guest, and where that has
/// it mounted.
struct Placed {
    numbers: (u32, u32),
    folder: Option<String>,
}

impl Attached {
    /// Whether it is what another container wants.
    fn serves(&self, wanted: &Wanted) -> bool {
        let alike = match (&self.mount, &wanted.mount) {
            (None, None) => true,
            (Some(has), Some(wants)) => has.type_ == wants.type_ && has.options == wants.options,
            _ => false,
        };
        let same = self.sources == wanted.sources && self.read_only == wanted.read_only && self.divided == wanted.divided;
        alike && same && !self.containers.is_empty()
    }

    fn placed(&self) -> Placed {
        let folder = self.mount.as_ref().map(|mount| format!("{DISKS_DIR}/{}/{}", mount.container, mount.name));
        Placed { numbers: self.numbers, folder }
    }
}

/// Tells the guest when a disk has another size, as when a volume is expanded; until there is none.
async fn follow_sizes(places: Arc<Mutex<Places>>, sandbox: Arc<Sandbox>) {
    let mut ended = sandbox.ended();
    loop {
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let mut places = places.lock().await;
        if places.disks.iter().all(Option::is_none) {
            places.followed = false;
            return;
        }
        for (place, slot) in (0u32..).zip(places.disks.iter_mut()) {
            let Some(disk) = slot else { continue };
            // One of layers stays as it is.
            let [source] = disk.sources.as_slice() else { continue };
            if let Some(bytes) = size(source, disk.identity).filter(|bytes| *bytes != disk.bytes) {
                disk.bytes = bytes;
                // A monitor that is gone needs no sizes.
                let _ = sandbox.vmm.resize_disk(place, bytes).await;
            }
        }
    }
}

fn identity(meta: &Metadata) -> Identity {
    if meta.file_type().is_block_device() { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) }
}

/// Bytes of a device or a file, when it is still the one that was opened.
fn size(source: &Path, opened: Identity) -> Option<u64> {
    let meta = std::fs::metadata(source).ok().filter(|meta| identity(meta) == opened)?;
    if !meta.file_type().is_block_device() {
        return Some(meta.len());
    }
    let sectors: u64 = std::fs::read_to_string(sysfs(meta.rdev()).join("size")).ok()?.trim().parse().ok()?;
    sectors.checked_mul(512)
}

/// The kernel's folder for a block device.
fn sysfs(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)))
}

/// Opens a disk or a part of one; returns the size of its blocks besides. One that will be mounted and written is taken
/// for us alone: a file system that two kernels write is lost.
async fn open(source: &Path, mounted: bool, read_only: bool) -> Result<(File, u32)> {
    let mut options = File::options();
    options.read(true).write(!read_only);
    let kind = std::fs::metadata(source)?.file_type();
    let alone = mounted && !read_only;
    ensure!(kind.is_block_device() || kind.is_file(), "it is neither a block device nor a file");
    // Of a block device O_EXCL keeps the host from mounting it (open(2)).
    let flags = libc::O_NONBLOCK | if alone && kind.is_block_device() { libc::O_EXCL } else { 0 };
    let file = options.custom_flags(flags).open(source).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => anyhow::anyhow!("it is in use on the host"),
        _ => error.into(),
    })?;
    if mounted {
        let begin = Instant::now();
        loop {
            match if alone { file.try_lock() } else { file.try_lock_shared() } {
                Ok(()) => break,
                // udev locks a device for as long as it looks what is on it.
                Err(TryLockError::WouldBlock) if kind.is_block_device() && begin.elapsed() < LOCK_TIMEOUT => {
                    tokio::time::sleep(LOCK_INTERVAL).await;
                }
                Err(TryLockError::WouldBlock) => bail!("it is in use by another pod, or with other options"),
                Err(TryLockError::Error(error)) => return Err(error).context("lock it"),
            }
        }
    }
    let block_size = if kind.is_file() { BLOCK_SIZES[0] } else { block_size(&sysfs(file.metadata()?.rdev())) };
    Ok((file, block_size))
}

/// Bytes of a device's blocks; of a partition it is its disk that says.
fn block_size(sysfs: &Path) -> u32 {
    let read = |path: &str| std::fs::read_to_string(sysfs.join(path)).ok()?.trim().parse().ok();
    let size = read("queue/logical_block_size").or_else(|| read("../queue/logical_block_size"));
    size.filter(|size| BLOCK_SIZES.contains(size)).unwrap_or(BLOCK_SIZES[0])
}

/// A disk in messages: what it is, and where.
fn describe(name: &str, sources: &[PathBuf]) -> String {
    match sources {
        [source] => format!("{name} ({})", source.display()),
        [first, rest @ ..] => format!("{name} ({} and {} more)", first.display(), rest.len()),
        [] => name.to_owned(),
    }
}

/// As much of a name as a guest gets to know a disk by.
fn serial(name: &str) -> String {
    name.chars().filter(char::is_ascii_graphic).take(SERIAL_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::wanted::file_system;
    use super::*;

    #[test]
    fn containers_of_a_pod_share_what_they_want_alike() {
        let wanted = |options: &[&str]| {
            file_system("c", "mount0", "ext4", "/dev/null", options.iter().map(|option| (*option).to_owned()).collect()).unwrap()
        };
        let Wanted { sources, read_only, mount, divided, .. } = wanted(&["rw"]);
        let containers = vec!["c".into()];
        let mut disk = Attached { sources, identity: (0, 0), divided, read_only, mount, bytes: 0, numbers: (254, 0), containers };
        assert_eq!(disk.placed().folder.unwrap(), "/run/caisson/disks/c/mount0");
        assert!(disk.serves(&wanted(&["rw", "loop"])));
        assert!(!disk.serves(&wanted(&["ro"])) && !disk.serves(&wanted(&["rw", "noatime"])));
        assert!(!disk.serves(&Wanted { mount: None, ..wanted(&["rw"]) }));
        assert!(!disk.serves(&Wanted { divided: true, ..wanted(&["rw"]) }));
        // One that could not be taken away.
        disk.containers.clear();
        assert!(!disk.serves(&wanted(&["rw"])));
    }

    #[tokio::test]
    async fn an_image_is_mounted_by_one_writer_or_by_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 1024]).unwrap();
        let open = |read_only: bool| open(&path, true, read_only);
        let readers = [open(true).await.unwrap(), open(true).await.unwrap()];
        assert!(open(false).await.unwrap_err().to_string().contains("in use by another pod"));
        drop(readers);
        let _writer = open(false).await.unwrap();
        assert!(open(true).await.is_err());
        let opened = identity(&path.metadata().unwrap());
        assert_eq!((size(&path, opened), size(&path, (opened.0, opened.1 + 1))), (Some(1024), None));
    }
}
