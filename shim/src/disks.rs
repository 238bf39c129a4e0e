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

use std::fs::{File, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::agent::DiskMount;
use caisson_protocol::guest::DISKS_DIR;
use caisson_protocol::vmm::{BLOCK_SIZES, DISKS, Disk};
use containerd_shim_protos::types::mount::Mount;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::errors::Error;
use crate::sandbox::Sandbox;

/// File systems that the guest's kernel mounts from a disk.
const FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "erofs", "squashfs"];
/// The name of a container's root file system among its disks.
const ROOT: &str = "rootfs";
/// Bytes of the name by which a guest knows a disk (virtio 1.2, 5.2.6).
const SERIAL_BYTES: usize = 20;
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
    places: Arc<Mutex<[Option<Attached>; DISKS as usize]>>,
}

/// A disk in its place.
struct Attached {
    source: PathBuf,
    read_only: bool,
    /// Whether the guest has its file system mounted, for one container; a device can have many.
    mounted: bool,
    bytes: u64,
    numbers: (u32, u32),
    containers: Vec<String>,
}

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
            let place = format!("{DISKS_DIR}/{container}/{}", wanted.name);
            let options = if wanted.read_only { json!(["rbind", "ro"]) } else { json!(["rbind"]) };
            self.add(sandbox, container, wanted).await?.with_context(none_left)?;
            *mount = json!({"destination": mount["destination"], "type": "bind", "source": place, "options": options});
        }
        let mut renumbered = Vec::new();
        for (numbers, wanted) in devices(spec)? {
            renumbered.push((numbers, self.add(sandbox, container, wanted).await?.with_context(none_left)?));
        }
        renumber(spec, &renumbered);
        let Some(wanted) = root(container, rootfs) else { return Ok(false) };
        let attached = self.add(sandbox, container, wanted).await?.is_some();
        if attached {
            spec["root"]["path"] = json!(format!("{DISKS_DIR}/{container}/{ROOT}"));
        }
        Ok(attached)
    }

    /// Puts a disk into a place, or shares the one that another container of the pod has there; returns
    /// the numbers of its device in the guest, or nothing when no place is left.
    async fn add(&self, sandbox: &Arc<Sandbox>, container: &str, wanted: Wanted) -> Result<Option<(u32, u32)>> {
        let what = || format!("disk {} ({})", wanted.name, wanted.source.display());
        let mut places = self.places.lock().await;
        let same = |disk: &&mut Attached| {
            !disk.mounted && wanted.mount.is_none() && disk.source == wanted.source && disk.read_only == wanted.read_only
        };
        if let Some(disk) = places.iter_mut().flatten().find(same) {
            disk.containers.push(container.to_owned());
            return Ok(Some(disk.numbers));
        }
        let Some(place) = places.iter().position(Option::is_none) else { return Ok(None) };
        let (file, block_size) = open(&wanted).with_context(what)?;
        let bytes = (&file).seek(SeekFrom::End(0)).with_context(what)?;
        let disk = Disk { place: place as u32, bytes, block_size, read_only: wanted.read_only, serial: serial(&wanted.name) };
        sandbox.vmm.attach_disk(disk, file.as_fd()).await.with_context(what)?;
        // Closed here, so that it is closed for good once the monitor has done so.
        drop(file);
        let numbers = match sandbox.agent.attach_disk(place as u32, wanted.mount.clone()).await {
            Ok(numbers) => numbers,
            Err(error) => {
                let _ = sandbox.vmm.detach_disk(place as u32).await;
                return Err(error).with_context(what);
            }
        };
        if places.iter().all(Option::is_none) {
            tokio::spawn(follow_sizes(Arc::clone(&self.places), Arc::clone(sandbox)));
        }
        let (source, read_only, mounted) = (wanted.source, wanted.read_only, wanted.mount.is_some());
        places[place] = Some(Attached { source, read_only, mounted, bytes, numbers, containers: vec![container.to_owned()] });
        Ok(Some(numbers))
    }

    /// Whether a container has disks, which are to be written out before its machine goes.
    pub async fn has(&self, container: &str) -> bool {
        self.places.lock().await.iter().flatten().any(|disk| disk.containers.iter().any(|user| user == container))
    }

    /// Takes away the disks that only this container has, once its processes are gone.
    pub async fn release(&self, sandbox: &Sandbox, container: &str) {
        let mut places = self.places.lock().await;
        for (place, slot) in (0u32..).zip(places.iter_mut()) {
            let Some(disk) = slot.as_mut().filter(|disk| disk.containers.iter().any(|user| user == container)) else { continue };
            disk.containers.retain(|user| user != container);
            if !disk.containers.is_empty() {
                continue;
            }
            if let Err(error) = sandbox.agent.detach_disk(place).await
                && !matches!(error, Error::Gone(_))
            {
                log::warn!("container {container}: let go of disk {}: {error}", disk.source.display());
            }
            // With a machine that is gone it is closed already.
            if let Err(error) = sandbox.vmm.detach_disk(place).await {
                log::warn!("container {container}: take disk {} away: {error:#}", disk.source.display());
            }
            *slot = None;
        }
    }
}

/// Tells the guest when a disk has another size, as when a volume is expanded; until there is none.
async fn follow_sizes(places: Arc<Mutex<[Option<Attached>; DISKS as usize]>>, sandbox: Arc<Sandbox>) {
    let mut ended = sandbox.ended();
    loop {
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let mut places = places.lock().await;
        if places.iter().all(Option::is_none) {
            return;
        }
        for (place, slot) in (0u32..).zip(places.iter_mut()) {
            let Some(disk) = slot else { continue };
            if let Some(bytes) = size(&disk.source).filter(|bytes| *bytes != disk.bytes) {
                disk.bytes = bytes;
                // A monitor that is gone needs no sizes.
                let _ = sandbox.vmm.resize_disk(place, bytes).await;
            }
        }
    }
}

/// Bytes of a device or a file.
fn size(source: &Path) -> Option<u64> {
    let meta = std::fs::metadata(source).ok()?;
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
    if rules.iter().any(|rule| rule["allow"] == true && numbers(rule) == (None, None)) {
        return Ok(Vec::new());
    }
    let mut wanted = Vec::new();
    for device in spec["linux"]["devices"].as_array().into_iter().flatten().filter(|device| device["type"] == "b") {
        let (Some(major), Some(minor)) = numbers(device) else { continue };
        // The guest says what it thinks of one that is not there.
        let Some(source) = node(major, minor)? else { continue };
        let rule = rules.iter().rev().find(|rule| rule["type"] == "b" && numbers(rule) == (Some(major), Some(minor)));
        let writes = rule.and_then(|rule| rule["access"].as_str()).is_none_or(|access| access.contains('w'));
        let path = device["path"].as_str().unwrap_or_default();
        let name = Path::new(path).file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        wanted.push(((major, minor), Wanted { source, read_only: !writes, name, mount: None }));
    }
    Ok(wanted)
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
fn open(wanted: &Wanted) -> Result<(File, u32)> {
    let mut options = File::options();
    options.read(true).write(!wanted.read_only);
    let kind = std::fs::metadata(&wanted.source)?.file_type();
    let alone = wanted.mount.is_some() && !wanted.read_only;
    if kind.is_block_device() {
        // Of a block device O_EXCL keeps others from mounting it (open(2)).
        let file = options.custom_flags(if alone { libc::O_EXCL } else { 0 }).open(&wanted.source);
        let file = file.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => anyhow::anyhow!("it is in use on the host"),
            _ => error.into(),
        })?;
        let block_size = block_size(&sysfs(file.metadata()?.rdev()));
        return Ok((file, block_size));
    }
    ensure!(kind.is_file(), "it is neither a block device nor a file");
    let file = options.custom_flags(libc::O_NONBLOCK).open(&wanted.source)?;
    match if wanted.mount.is_none() {
        Ok(())
    } else if alone {
        file.try_lock()
    } else {
        file.try_lock_shared()
    } {
        Ok(()) => Ok((file, BLOCK_SIZES[0])),
        Err(TryLockError::WouldBlock) => bail!("it is in use by another pod"),
        Err(TryLockError::Error(error)) => Err(error).context("lock it"),
    }
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
    resources["devices"].as_array_mut().into_iter().flatten().filter(|entry| entry["type"] == "b").for_each(change);
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
                "devices": [{"allow": false}, {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rw"}],
                "blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 5}]},
            },
        }});
        renumber(&mut spec, &[((7, 0), (7, 1)), ((7, 1), (254, 16))]);
        let linux = &spec["linux"];
        let all: Vec<_> = linux["devices"].as_array().unwrap().iter().map(numbers).collect();
        assert_eq!(all, [(Some(7), Some(1)), (Some(254), Some(16)), (Some(7), Some(0))]);
        assert_eq!(numbers(&linux["resources"]["devices"][1]), (Some(254), Some(16)));
        assert_eq!(numbers(&linux["resources"]["blockIO"]["throttleReadBpsDevice"][0]), (Some(7), Some(1)));
    }

    #[test]
    fn a_container_that_may_use_every_device_gets_none_as_a_disk() {
        let device = json!([{"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0}]);
        let spec = json!({"linux": {"devices": device, "resources": {"devices": [{"allow": true, "access": "rwm"}]}}});
        assert!(devices(&spec).unwrap().is_empty());
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
    fn an_image_is_mounted_by_one_writer_or_by_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 1024]).unwrap();
        let wanted = |option: &str| file_system("c", "disk0", "ext4", path.to_str().unwrap(), vec![option.into()]).unwrap();
        let readers = [open(&wanted("ro")).unwrap(), open(&wanted("ro")).unwrap()];
        assert!(open(&wanted("rw")).unwrap_err().to_string().contains("in use by another pod"));
        drop(readers);
        let _writer = open(&wanted("rw")).unwrap();
        assert!(open(&wanted("ro")).is_err());
        assert_eq!(size(&path), Some(1024));
    }
}
