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

use std::collections::HashSet;
use std::fs::{File, Metadata, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::agent::DiskMount;
use caisson_protocol::guest::DISKS_DIR;
use caisson_protocol::vmm::{BLOCK_SIZES, DISKS, Disk};
use containerd_shim_protos::types::mount::Mount;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::errors::Error;
use crate::pod::lock;
use crate::sandbox::Sandbox;

/// File systems that the guest's kernel mounts from a disk.
const FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "erofs", "squashfs"];
/// The name of a container's root file system among its disks.
const ROOT: &str = "rootfs";
/// Bytes of the name by which a guest knows a disk (virtio 1.2, 5.2.6).
const SERIAL_BYTES: usize = 20;
/// For somebody's look at what is on a device, and between two tries.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
const LOCK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at the sizes of disks.
const INTERVAL: Duration = Duration::from_secs(5);

fn none_left() -> String {
    format!("a pod can have {DISKS} disks at a time")
}

/// A block device by its numbers.
type Numbers = (u64, u64);

/// The disks of a machine, by their places.
#[derive(Default)]
pub struct Disks {
    places: Arc<Mutex<Places>>,
    /// Containers that have some, or are about to.
    containers: std::sync::Mutex<HashSet<String>>,
}

#[derive(Default)]
struct Places {
    disks: [Option<Attached>; DISKS as usize],
    /// Whether a task follows their sizes.
    followed: bool,
}

/// A disk in its place.
struct Attached {
    source: PathBuf,
    identity: Identity,
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

/// What a container wants to have as a disk.
struct Wanted {
    source: PathBuf,
    read_only: bool,
    /// By which container and guest know it.
    name: String,
    mount: Option<DiskMount>,
}

impl Disks {
    /// Gives a container the disks that its specification asks for, and points that at them; whether
    /// its root file system is one.
    ///
    /// # Errors
    /// Which could not be opened, attached or mounted, and why. What was attached until then stays for
    /// [`Disks::release`].
    pub async fn attach(&self, sandbox: &Arc<Sandbox>, container: &str, rootfs: &[Mount], spec: &mut Value) -> Result<bool> {
        for (index, mount) in spec["mounts"].as_array_mut().into_iter().flatten().enumerate() {
            let Some(wanted) = volume(container, index, mount)? else { continue };
            let options = if wanted.read_only { json!(["rbind", "ro"]) } else { json!(["rbind"]) };
            let placed = self.add(sandbox, container, wanted).await?.with_context(none_left)?;
            *mount = json!({"destination": mount["destination"], "type": "bind", "source": placed.folder, "options": options});
        }
        let mut renumbered = Vec::new();
        for (numbers, wanted) in devices(spec)? {
            renumbered.push((numbers, self.add(sandbox, container, wanted).await?.with_context(none_left)?.numbers));
        }
        renumber(spec, &renumbered);
        let Some(wanted) = root(container, rootfs) else { return Ok(false) };
        let placed = self.add(sandbox, container, wanted).await?;
        if let Some(placed) = &placed {
            spec["root"]["path"] = json!(placed.folder);
        }
        Ok(placed.is_some())
    }

    /// Puts a disk into a place, or shares the one that another container of the pod has there; returns
    /// nothing when no place is left.
    async fn add(&self, sandbox: &Arc<Sandbox>, container: &str, wanted: Wanted) -> Result<Option<Placed>> {
        let name = format!("disk {} ({})", wanted.name, wanted.source.display());
        let what = || name.clone();
        lock(&self.containers).insert(container.to_owned());
        let mut places = self.places.lock().await;
        if let Some(disk) = places.disks.iter_mut().flatten().find(|disk| disk.serves(&wanted)) {
            disk.containers.push(container.to_owned());
            return Ok(Some(disk.placed()));
        }
        let Some(place) = places.disks.iter().position(Option::is_none) else { return Ok(None) };
        let (file, block_size) = open(&wanted).await.with_context(what)?;
        let bytes = (&file).seek(SeekFrom::End(0)).with_context(what)?;
        let disk = Disk { place: place as u32, bytes, block_size, read_only: wanted.read_only, serial: serial(&wanted.name) };
        let identity = identity(&file.metadata().with_context(what)?);
        sandbox.vmm.attach_disk(disk, file.as_fd()).await.with_context(what)?;
        // Closed here, so that it is closed for good once the monitor has done so.
        drop(file);
        let Wanted { source, read_only, mount, .. } = wanted;
        let mut disk = Attached { source, identity, read_only, mount, bytes, numbers: (0, 0), containers: Vec::new() };
        match sandbox.agent.attach_disk(place as u32, disk.mount.clone()).await {
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

    /// Whether a container has disks, which are to be written out before its machine goes.
    pub fn has(&self, container: &str) -> bool {
        lock(&self.containers).contains(container)
    }

    /// Takes away the disks of a container that has exited, in a machine that is about to go: what the
    /// guest has not written yet is written then.
    pub async fn write_out(&self, sandbox: &Sandbox, container: &str) {
        if self.has(container) {
            // Without its mount namespace nothing holds them.
            let _ = sandbox.agent.delete(container, "").await;
            self.release(sandbox, container).await;
        }
    }

    /// Takes away the disks that only this container has, once its processes are gone.
    pub async fn release(&self, sandbox: &Sandbox, container: &str) {
        if !self.has(container) {
            return;
        }
        let mut places = self.places.lock().await;
        for (place, slot) in (0u32..).zip(places.disks.iter_mut()) {
            let Some(disk) = slot.as_mut().filter(|disk| disk.containers.iter().any(|user| user == container)) else { continue };
            disk.containers.retain(|user| user != container);
            if !disk.containers.is_empty() {
                continue;
            }
            let what = format!("disk {} of container {container}", disk.source.display());
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
        alike && !self.containers.is_empty() && self.source == wanted.source && self.read_only == wanted.read_only
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
            if let Some(bytes) = size(&disk.source, disk.identity).filter(|bytes| *bytes != disk.bytes) {
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

/// The file system on a device or in a file that a mount entry names.
fn volume(container: &str, index: usize, mount: &Value) -> Result<Option<Wanted>> {
    let options = mount["options"].as_array().into_iter().flatten().filter_map(|option| Some(option.as_str()?.to_owned())).collect();
    let (kind, source) = (mount["type"].as_str().unwrap_or_default(), mount["source"].as_str().unwrap_or_default());
    let wanted = file_system(container, &format!("mount{index}"), kind, source, options);
    ensure!(wanted.is_none() || Path::new(source).exists(), "mount {}: {source} does not exist", mount["destination"]);
    Ok(wanted)
}

/// The root file system, when it is one on a device or in a file.
fn root(container: &str, rootfs: &[Mount]) -> Option<Wanted> {
    let [mount] = rootfs else { return None };
    // Other owners for its files are the host's business.
    let mapped = mount.options.iter().any(|option| option.starts_with("uidmap=") || option.starts_with("gidmap="));
    let source = Some(&mount.source).filter(|source| !mapped && mount.target.is_empty() && Path::new(source).exists())?;
    file_system(container, ROOT, &mount.type_, source, mount.options.clone())
}

fn file_system(container: &str, name: &str, kind: &str, source: &str, mut options: Vec<String>) -> Option<Wanted> {
    if !FILE_SYSTEMS.contains(&kind) || !source.starts_with('/') {
        return None;
    }
    // A file is a disk without a loop device, too.
    options.retain(|option| option != "loop");
    let always_read_only = matches!(kind, "erofs" | "squashfs");
    let read_only =
        always_read_only || options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw")).is_some_and(|last| last == "ro");
    if always_read_only {
        options.push("ro".into());
    }
    let mount = DiskMount { container: container.into(), name: name.into(), type_: kind.into(), options, ..DiskMount::default() };
    Some(Wanted { source: source.into(), read_only, name: name.into(), mount: Some(mount) })
}

/// The block devices of the host that a specification names. A container that may use every device
/// names them all, and wants none of them.
fn devices(spec: &Value) -> Result<Vec<(Numbers, Wanted)>> {
    let rules = spec["linux"]["resources"]["devices"].as_array().map(Vec::as_slice).unwrap_or_default();
    if rules.iter().any(is_every_device) {
        return Ok(Vec::new());
    }
    let mut wanted = Vec::new();
    for device in spec["linux"]["devices"].as_array().into_iter().flatten().filter(|device| device["type"] == "b") {
        let (Some(major), Some(minor)) = numbers(device) else { continue };
        let source = node(major, minor)?.with_context(|| format!("device {} ({major}:{minor}) does not exist", device["path"]))?;
        let rule = rules.iter().rev().find(|rule| rule["type"] == "b" && numbers(rule) == (Some(major), Some(minor)));
        let writes = rule.and_then(|rule| rule["access"].as_str()).is_none_or(|access| access.contains('w'));
        let path = device["path"].as_str().unwrap_or_default();
        let name = Path::new(path).file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        wanted.push(((major, minor), Wanted { source, read_only: !writes, name, mount: None }));
    }
    Ok(wanted)
}

/// Whether a rule allows every device that there is.
fn is_every_device(rule: &Value) -> bool {
    rule["allow"] == true && rule["type"].as_str().is_none_or(|kind| kind == "a") && numbers(rule) == (None, None)
}

fn numbers(entry: &Value) -> (Option<u64>, Option<u64>) {
    (entry["major"].as_u64(), entry["minor"].as_u64())
}

/// The host's node of a block device; `None` when there is no such device.
fn node(major: u64, minor: u64) -> Result<Option<PathBuf>> {
    let Ok(text) = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")) else { return Ok(None) };
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME=")).with_context(|| format!("find block device {major}:{minor}"))?;
    let path = Path::new("/dev").join(name);
    let found = std::fs::metadata(&path).with_context(|| format!("find {}", path.display()))?.rdev();
    ensure!(found == nix::sys::stat::makedev(major, minor), "{} is not block device {major}:{minor}", path.display());
    Ok(Some(path))
}

/// Opens a disk; returns the size of its blocks besides. One that will be mounted and written is taken
/// for us alone: a file system that two kernels write is lost.
async fn open(wanted: &Wanted) -> Result<(File, u32)> {
    let mut options = File::options();
    options.read(true).write(!wanted.read_only);
    let kind = std::fs::metadata(&wanted.source)?.file_type();
    let alone = wanted.mount.is_some() && !wanted.read_only;
    ensure!(kind.is_block_device() || kind.is_file(), "it is neither a block device nor a file");
    // Of a block device O_EXCL keeps the host from mounting it (open(2)).
    let flags = libc::O_NONBLOCK | if alone && kind.is_block_device() { libc::O_EXCL } else { 0 };
    let file = options.custom_flags(flags).open(&wanted.source).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => anyhow::anyhow!("it is in use on the host"),
        _ => error.into(),
    })?;
    if wanted.mount.is_some() {
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

/// As much of a name as a guest gets to know a disk by.
fn serial(name: &str) -> String {
    name.chars().filter(char::is_ascii_graphic).take(SERIAL_BYTES).collect()
}

/// Puts the guest's numbers of devices in the place of the host's, wherever a specification has them.
fn renumber(spec: &mut Value, numbers_of: &[(Numbers, (u32, u32))]) {
    let change = |entry: &mut Value| {
        let (Some(major), Some(minor)) = numbers(entry) else { return };
        if let Some((_, (major, minor))) = numbers_of.iter().find(|(host, _)| *host == (major, minor)) {
            entry["major"] = json!(major);
            entry["minor"] = json!(minor);
        }
    };
    let linux = &mut spec["linux"];
    linux["devices"].as_array_mut().into_iter().flatten().filter(|entry| entry["type"] == "b").for_each(change);
    let resources = &mut linux["resources"];
    if let Some(rules) = resources["devices"].as_array_mut() {
        // What else the host has by such numbers is something else in the guest.
        let known = |rule: &Value| numbers_of.iter().any(|((major, minor), _)| numbers(rule) == (Some(*major), Some(*minor)));
        rules.retain(|rule| rule["type"] != "b" || rule["allow"] != true || rule["major"].as_u64().is_none() || known(rule));
        rules.iter_mut().filter(|entry| entry["type"] == "b").for_each(change);
    }
    // The limits of single devices are lists of such entries.
    let limits = resources["blockIO"].as_object_mut().into_iter().flat_map(|limits| limits.values_mut());
    limits.filter_map(Value::as_array_mut).flatten().for_each(change);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_host_become_those_of_the_guest_at_once() {
        let mut spec = json!({"linux": {
            "devices": [{"path": "/dev/a", "type": "b", "major": 7, "minor": 0}, {"path": "/dev/b", "type": "b", "major": 7, "minor": 1},
                {"path": "/dev/c", "type": "c", "major": 7, "minor": 0}],
            "resources": {
                "devices": [{"allow": false}, {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rw"},
                    {"allow": true, "type": "b", "major": 8, "access": "rw"}, {"allow": true, "type": "b", "access": "m"}],
                "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 5}]},
            },
        }});
        renumber(&mut spec, &[((7, 0), (7, 1)), ((7, 1), (254, 16))]);
        let linux = &spec["linux"];
        let all: Vec<_> = linux["devices"].as_array().unwrap().iter().map(numbers).collect();
        assert_eq!(all, [(Some(7), Some(1)), (Some(254), Some(16)), (Some(7), Some(0))]);
        let rules: Vec<_> = linux["resources"]["devices"].as_array().unwrap().iter().map(numbers).collect();
        assert_eq!(rules, [(None, None), (Some(254), Some(16)), (None, None)]);
        assert_eq!(numbers(&linux["resources"]["blockIO"]["throttleReadBpsDevice"][0]), (Some(7), Some(1)));
    }

    #[test]
    fn a_container_that_may_use_every_device_gets_none_as_a_disk() {
        let every = |rule: Value| is_every_device(&rule);
        assert!(every(json!({"allow": true, "access": "rwm"})) && every(json!({"allow": true, "type": "a", "access": "rwm"})));
        // Anybody may make nodes, and nobody may use them.
        assert!(!every(json!({"allow": true, "type": "b", "access": "m"})) && !every(json!({"allow": false, "access": "rwm"})));
        assert!(!every(json!({"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rwm"})));
    }

    #[test]
    fn only_file_systems_that_lie_on_something_are_disks() {
        let mount = |kind: &str, source: &str, options: &[&str]| {
            volume("c", 2, &json!({"destination": "/data", "type": kind, "source": source, "options": options})).unwrap()
        };
        assert!(mount("tmpfs", "/dev/null", &[]).is_none() && mount("ext4", "none", &[]).is_none());
        let wanted = mount("ext4", "/dev/null", &["loop", "noatime", "rw"]).unwrap();
        assert_eq!(
            (wanted.read_only, wanted.name.as_str(), wanted.mount.unwrap().options),
            (false, "mount2", vec!["noatime".into(), "rw".into()])
        );
        assert!(mount("ext4", "/dev/null", &["rw", "ro"]).unwrap().read_only && mount("erofs", "/dev/null", &[]).unwrap().read_only);
        assert!(volume("c", 0, &json!({"destination": "/data", "type": "xfs", "source": "/does/not/exist"})).is_err());
    }

    #[test]
    fn containers_of_a_pod_share_what_they_want_alike() {
        let wanted = |options: &[&str]| {
            file_system("c", "mount0", "ext4", "/dev/null", options.iter().map(|option| (*option).to_owned()).collect()).unwrap()
        };
        let Wanted { source, read_only, mount, .. } = wanted(&["rw"]);
        let mut disk = Attached { source, identity: (0, 0), read_only, mount, bytes: 0, numbers: (254, 0), containers: vec!["c".into()] };
        assert_eq!(disk.placed().folder.unwrap(), "/run/caisson/disks/c/mount0");
        assert!(disk.serves(&wanted(&["rw", "loop"])));
        assert!(!disk.serves(&wanted(&["ro"])) && !disk.serves(&wanted(&["rw", "noatime"])));
        assert!(!disk.serves(&Wanted { mount: None, ..wanted(&["rw"]) }));
        // One that could not be taken away.
        disk.containers.clear();
        assert!(!disk.serves(&wanted(&["rw"])));
    }

    #[tokio::test]
    async fn an_image_is_mounted_by_one_writer_or_by_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 1024]).unwrap();
        let wanted = |option: &str| file_system("c", "disk0", "ext4", path.to_str().unwrap(), vec![option.into()]).unwrap();
        let readers = [open(&wanted("ro")).await.unwrap(), open(&wanted("ro")).await.unwrap()];
        assert!(open(&wanted("rw")).await.unwrap_err().to_string().contains("in use by another pod"));
        drop(readers);
        let _writer = open(&wanted("rw")).await.unwrap();
        assert!(open(&wanted("ro")).await.is_err());
        let opened = identity(&path.metadata().unwrap());
        assert_eq!((size(&path, opened), size(&path, (opened.0, opened.1 + 1))), (Some(1024), None));
    }
}
