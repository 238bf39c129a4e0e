//! Root file systems whose layers are file systems on devices or in files, as containerd's erofs snapshotter has them.
//!
//! The snapshotter has mounted each layer on the host and hands over an overlay of these places. What is mounted there the
//! guest can have as it is: one disk holds all layers, and the guest lays them over one another.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use caisson_protocol::agent::DiskMount;
use caisson_protocol::guest::{UPPER_DIR, WORK_DIR};
use caisson_protocol::vmm::DISK_PARTS;
use containerd_shim_protos::types::mount::Mount;
use nix::sys::statfs::{FsType, statfs};

use super::wanted::Wanted;
use crate::mounts::{Point, points};
use crate::snapshot;

/// The name of a container's layers among its disks.
const LAYERS: &str = "layers";
const EROFS: &str = "erofs";
/// `EROFS_SUPER_MAGIC_V1` of linux/magic.h.
const EROFS_MAGIC: FsType = FsType(0xe0f5_e1e2);
/// A file that a disk is made of ends with a sector.
const SECTOR: u64 = 512;

/// A root file system made of layers.
pub struct Layered {
    /// The disk that they are on.
    pub wanted: Wanted,
    /// The folder of the snapshot that comes above them, unless nobody writes there.
    pub snapshot: Option<PathBuf>,
}

/// The layers of a root file system, the uppermost first, when the guest can have all of them as they are.
pub fn layers(container: &str, rootfs: &[Mount], read_only: bool) -> Option<Layered> {
    let [mount] = rootfs else { return None };
    let Overlay { layers, snapshot } = Overlay::read(mount)?;
    // Before the list of all mounts is read, which may be long.
    if layers.len() > DISK_PARTS || !layers.iter().all(|layer| statfs(*layer).is_ok_and(|found| found.filesystem_type() == EROFS_MAGIC)) {
        return None;
    }
    let points = points().ok()?;
    let sources: Vec<PathBuf> = layers.iter().map(|layer| source(layer, &points)).collect::<Option<_>>()?;
    // What is in a snapshot already the container is to see, also one that writes nothing.
    let serves = if read_only { snapshot::is_fresh(snapshot) } else { snapshot::can_be_shared(snapshot) };
    if !serves {
        log::debug!("container {container}: its layers are mounted on the host, as its snapshot's folder cannot be the guest's");
        return None;
    }
    let mount = DiskMount {
        container: container.into(),
        name: LAYERS.into(),
        type_: EROFS.into(),
        options: vec!["ro".into()],
        ..DiskMount::default()
    };
    let wanted = Wanted { sources, read_only: true, name: LAYERS.into(), mount: Some(mount), divided: true };
    Some(Layered { wanted, snapshot: (!read_only).then(|| snapshot.to_owned()) })
}

/// An overlay as a snapshotter hands it over.
struct Overlay<'m> {
    layers: Vec<&'m Path>,
    snapshot: &'m Path,
}

impl<'m> Overlay<'m> {
    /// What else than layers and a snapshot somebody asks of it, as other owners, the guest cannot give.
    fn read(mount: &'m Mount) -> Option<Self> {
        let (mut lower, mut upper, mut work) = (None, None, None);
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => lower = Some(value),
                Some(("upperdir", value)) => upper = Some(Path::new(value)),
                Some(("workdir", value)) => work = Some(Path::new(value)),
                None if option == "rw" => {}
                _ => return None,
            }
        }
        let (lower, upper, work) = (lower?, upper?, work?);
        let snapshot = upper.parent()?;
        let as_containerd_has_it = upper == snapshot.join(UPPER_DIR) && work == snapshot.join(WORK_DIR);
        // A colon in a path is escaped.
        let plain = mount.type_ == "overlay" && mount.target.is_empty() && !lower.contains('\\');
        (plain && as_containerd_has_it).then(|| Self { layers: lower.split(':').map(Path::new).collect(), snapshot })
    }
}

/// What a layer that is mounted at a place lies on.
fn source(layer: &Path, points: &[Point]) -> Option<PathBuf> {
    let place = layer.canonicalize().ok()?;
    let point = points.iter().rev().find(|point| point.path == place)?;
    // One with further devices is more than what is mounted.
    let is_whole =
        point.kind == EROFS && point.root == Path::new("/") && !point.options.split(',').any(|option| option.starts_with("device="));
    let source = Some(&point.source).filter(|source| is_whole && source.is_absolute())?;
    let meta = std::fs::metadata(source).ok()?;
    if meta.file_type().is_block_device() {
        return Some(backing_file(meta.rdev()).unwrap_or_else(|| source.clone()));
    }
    meta.len().is_multiple_of(SECTOR).then(|| source.clone())
}

/// The file that is all of a loop device: read by itself, it is in the host's memory once.
fn backing_file(device: u64) -> Option<PathBuf> {
    let folder = super::sysfs(device).join("loop");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let is_zero = |name: &str| read(name).is_some_and(|value| value.trim() == "0");
    let file = PathBuf::from(read("backing_file")?.trim_end_matches('\n'));
    let size = std::fs::metadata(&file).ok().filter(|meta| meta.is_file())?.len();
    // The kernel adds to the path of a file that is gone.
    (is_zero("offset") && is_zero("sizelimit") && size.is_multiple_of(SECTOR)).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Mount::default() }
    }

    #[test]
    fn an_overlay_is_taken_apart_when_it_is_nothing_more() {
        let plain = ["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
        let mount = overlay(&plain);
        let read = Overlay::read(&mount).unwrap();
        assert_eq!((read.layers, read.snapshot), (vec![Path::new("/s/2/fs"), Path::new("/s/1/fs")], Path::new("/s/3")));
        for options in [
            &[&plain[..], &["uidmap=0:65536:65536"]].concat()[..],
            &[&plain[..], &["ro"]].concat(),
            &plain[1..],
            &["workdir=/s/3/work", "upperdir=/s/3/upper", "lowerdir=/s/1/fs"],
            &["workdir=/t/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"],
            &["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/a\\:b"],
        ] {
            assert!(Overlay::read(&overlay(options)).is_none(), "{options:?}");
        }
    }

    #[test]
    fn a_layer_is_what_is_mounted_whole_at_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        let point = Point {
            device: "0:1".into(),
            root: "/".into(),
            path: path.clone(),
            kind: EROFS.into(),
            source: file.path().into(),
            options: "ro,acl".into(),
        };
        let found = |point: Point| source(&path, &[point]);
        assert_eq!(found(point.clone()), Some(file.path().to_owned()));
        assert_eq!(found(Point { root: "/inner".into(), ..point.clone() }), None);
        assert_eq!(found(Point { kind: "ext4".into(), ..point.clone() }), None);
        assert_eq!(found(Point { options: "ro,device=/blob".into(), ..point.clone() }), None);
        assert_eq!(found(Point { path: "/elsewhere".into(), ..point.clone() }), None);
        file.as_file().set_len(4097).unwrap();
        assert_eq!(found(point), None);
    }
}
