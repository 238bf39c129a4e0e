//! What a container's specification wants to have as disks.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use caisson_protocol::agent::DiskMount;
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};

/// File systems that the guest's kernel mounts from a disk.
const FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "erofs", "squashfs"];
/// Those that a guest may have written, byte by byte: a kernel that mounts one must not trust them.
pub const GUESTS_WRITE: [&str; 2] = ["ext4", "xfs"];
/// The name of a container's root file system among its disks.
const ROOT: &str = "rootfs";
/// A block device by its numbers.
pub type Numbers = (u64, u64);

/// What a container wants to have as a disk.
pub struct Wanted {
    /// The block device or file, or several that are one behind the other.
    pub sources: Vec<PathBuf>,
    /// Whether nobody writes it.
    pub read_only: bool,
    /// By which container and guest know it.
    pub name: String,
    /// Where the guest mounts it, unless the container has the device itself.
    pub mount: Option<DiskMount>,
    /// Whether each of them has a file system of its own.
    pub divided: bool,
}

impl Wanted {
    /// Whether it is a file system that is made once, and only read from then on.
    pub fn is_of_a_kind_that_nobody_writes(&self) -> bool {
        self.mount.as_ref().is_some_and(|mount| !GUESTS_WRITE.contains(&mount.type_.as_str()))
    }
}

/// The file system on a device or in a file that a mount entry names.
pub fn volume(container: &str, index: usize, mount: &Value) -> Result<Option<Wanted>> {
    let options = mount["options"].as_array().into_iter().flatten().filter_map(|option| Some(option.as_str()?.to_owned())).collect();
    let (kind, source) = (mount["type"].as_str().unwrap_or_default(), mount["source"].as_str().unwrap_or_default());
    let wanted = file_system(container, &format!("mount{index}"), kind, source, options);
    ensure!(wanted.is_none() || Path::new(source).exists(), "mount {}: {source} does not exist", mount["destination"]);
    Ok(wanted)
}

/// The root file system, when it is one on a device or in a file.
pub fn root(container: &str, rootfs: &[Mount]) -> Option<Wanted> {
    let [mount] = rootfs else { return None };
    // Other owners for its files are the host's business.
    let mapped = mount.options.iter().any(|option| option.starts_with("uidmap=") || option.starts_with("gidmap="));
    let source = Some(&mount.source).filter(|source| !mapped && mount.target.is_empty() && Path::new(source).exists())?;
    file_system(container, ROOT, &mount.type_, source, mount.options.clone())
}

/// A mount of a file system, when it is one that the guest mounts from a disk by itself.
pub fn file_system(container: &str, name: &str, kind: &str, source: &str, mut options: Vec<String>) -> Option<Wanted> {
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
    Some(Wanted { sources: vec![source.into()], read_only, name: name.into(), mount: Some(mount), divided: false })
}

/// The block devices of the host that a specification names. A container that may use every device
/// names them all, and wants none of them.
pub fn devices(spec: &Value) -> Result<Vec<(Numbers, Wanted)>> {
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
        wanted.push(((major, minor), Wanted { sources: vec![source], read_only: !writes, name, mount: None, divided: false }));
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

/// Puts the guest's numbers of devices in the place of the host's, wherever a specification has them.
pub fn renumber(spec: &mut Value, numbers_of: &[(Numbers, (u32, u32))]) {
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
}
