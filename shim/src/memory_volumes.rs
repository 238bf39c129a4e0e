//! Volumes of memory among a container's mounts: the guest makes them of its own, where they count for the
//! containers that fill them. On the host kubelet has mounted them, and nothing is ever in them.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use caisson_protocol::agent::MemoryVolume;
use caisson_protocol::guest::MEMORY_DIR;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use serde_json::Value;

use crate::mounts::{self, Point};

/// Kubelet's folder for the volumes of its kind `emptyDir`.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// The volume of memory that a mount entry asks for, as the guest is to make it.
pub fn of(mount: &Value) -> Option<MemoryVolume> {
    let source = mount["source"].as_str().filter(|source| source.starts_with('/')).map(Path::new)?;
    let found = statfs(source).ok()?;
    if found.filesystem_type() == HUGETLBFS_MAGIC {
        return Some(MemoryVolume { name: name(source), huge_pages: true, mode: 0o777, ..MemoryVolume::default() });
    }
    // Owners that the host is to map are on the host.
    if found.filesystem_type() != TMPFS_MAGIC || mount["uidMappings"].is_array() {
        return None;
    }
    let (volume, folder) = empty_dir(&source.canonicalize().ok()?, &mounts::points().ok()?)?;
    let meta = volume.metadata().ok()?;
    let folder_name = if folder.as_os_str().is_empty() { String::new() } else { name(&volume.join(&folder)) };
    Some(MemoryVolume {
        name: name(&volume),
        bytes: found.blocks().saturating_mul(found.block_size().unsigned_abs()),
        user: meta.uid(),
        group: meta.gid(),
        mode: meta.mode() & 0o7777,
        folder: folder.to_str()?.to_owned(),
        folder_name,
        ..MemoryVolume::default()
    })
}

/// Where the guest has the part of a volume that its container gets.
pub fn place(volume: &MemoryVolume) -> String {
    format!("{MEMORY_DIR}/{}", if volume.folder.is_empty() { &volume.name } else { &volume.folder_name })
}

/// The `emptyDir` that a path is in, by where kubelet has mounted it, and the folder in it. A path may be in
/// one by way of another mount of its file system, as those are that kubelet makes for `subPath`.
fn empty_dir(path: &Path, points: &[Point]) -> Option<(PathBuf, PathBuf)> {
    let mount = points.iter().rev().find(|point| path.starts_with(&point.path))?;
    let is_volume = |point: &&Point| {
        let folder = point.path.parent().and_then(Path::file_name);
        point.device == mount.device && point.root == Path::new("/") && folder == Some(OsStr::new(EMPTY_DIRS))
    };
    let volume = points.iter().find(is_volume)?;
    let within = mount.root.strip_prefix("/").ok()?.join(path.strip_prefix(&mount.path).ok()?);
    // Joined with nothing it would have a slash at its end.
    Some((volume.path.clone(), within.components().collect()))
}

/// The guest's name for a volume: containers that have the same one share it.
fn name(path: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_into_an_empty_dir_lead_to_it() {
        let point = |device: &str, root: &str, path: &str| Point {
            device: device.into(),
            root: root.into(),
            path: path.into(),
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            options: String::new(),
        };
        let pod = "/var/lib/kubelet/pods/1";
        let volume = format!("{pod}/volumes/kubernetes.io~empty-dir/cache");
        let points = [
            point("8:1", "/", "/"),
            point("0:50", "/", &volume),
            point("0:51", "/", &format!("{pod}/volumes/kubernetes.io~secret/token")),
            point("0:50", "/a/b", &format!("{pod}/volume-subpaths/cache/web/0")),
        ];
        let found =
            |path: String| empty_dir(Path::new(&path), &points).map(|(volume, folder)| (volume, folder.to_str().unwrap().to_owned()));
        let at = |folder: &str| Some((PathBuf::from(&volume), folder.to_owned()));
        assert_eq!(found(volume.clone()), at(""));
        assert_eq!(found(format!("{volume}/x")), at("x"));
        assert_eq!(found(format!("{pod}/volume-subpaths/cache/web/0")), at("a/b"));
        for other in ["volumes/kubernetes.io~secret/token", "volumes/kubernetes.io~empty-dir/on-disk"] {
            assert_eq!(found(format!("{pod}/{other}")), None);
        }
    }
}
