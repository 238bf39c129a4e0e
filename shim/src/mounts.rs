//! Mounts on the host: a container's root file system and its bind mounts, put into the share.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use caisson_sys::mounts::{self as trees, Attributes};
use containerd_shim_protos::types::mount::Mount;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::disks::GUESTS_WRITE;
use crate::idmap::IdMap;
use crate::snapshot;

/// Mount data longer than a page is refused by the kernel.
const MAX_DATA: usize = 4095;

/// An option that is a flag: its name, the flag, whether it sets or clears.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("atime", MsFlags::MS_NOATIME, false),
    ("bind", MsFlags::MS_BIND, true),
    ("defaults", MsFlags::empty(), true),
    ("dev", MsFlags::MS_NODEV, false),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("nodev", MsFlags::MS_NODEV, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
];

/// Splits mount options into flags and data for the file system.
fn parse_options(options: &[String]) -> (MsFlags, Vec<&str>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, true)) => flags |= *flag,
            Some((_, flag, false)) => flags -= *flag,
            None => data.push(option.as_str()),
        }
    }
    (flags, data)
}

/// Mounts what containerd's snapshotter prepared at `target`, in order, one over the other; with `owners`
/// what is on disk has those in it. To be called in a workshop (`share.rs`).
///
/// `scratch` is an empty folder that the guest does not see.
///
/// # Errors
/// Which mount failed, and why.
pub fn mount_rootfs(mounts: &[Mount], target: &Path, owners: Option<&IdMap>, scratch: &Path) -> Result<()> {
    for one in mounts {
        // containerd 1.7 and later may name a place within the root file system.
        let target = if one.target.is_empty() { target.to_owned() } else { inside(target, Path::new(&one.target))? };
        mount_one(one, &target, owners, scratch)
            .with_context(|| format!("mount the root file system ({} of {})", one.type_, one.source))?;
    }
    Ok(())
}

/// The place that `path` names below `root`, where links lead to what they mean within it (openat2(2)).
fn inside(root: &Path, path: &Path) -> Result<PathBuf> {
    let what = || format!("find {} in the root file system", path.display());
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).with_context(what)?;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let place = openat2(&root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how).with_context(what)?;
    std::fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd())).with_context(what)
}

fn mount_one(one: &Mount, target: &Path, pods_owners: Option<&IdMap>, scratch: &Path) -> Result<()> {
    let (kind, source) = (one.type_.as_str(), one.source.as_str());
    let (flags, mut data) = parse_options(&one.options);
    let own_owners = IdMap::take_from(&mut data)?;
    ensure!(own_owners.is_none() || pods_owners.is_none(), "it has a mapping of owners of its own, which fs.id_base excludes");
    let owners = own_owners.as_ref().or(pods_owners);
    // Device nodes and programs of the share mean something in the guest, never on the host.
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    if flags.contains(MsFlags::MS_BIND) {
        let read_only = if flags.contains(MsFlags::MS_RDONLY) { ReadOnly::Top } else { ReadOnly::No };
        let how = How {
            below: flags.contains(MsFlags::MS_REC),
            read_only,
            attributes: attributes(flags),
            owners: owners.cloned(),
            ..How::default()
        };
        return bind(Path::new(source), target, &how);
    }
    if let Some(owners) = owners.filter(|_| kind == "overlay") {
        let upper = data.iter().find_map(|option| option.strip_prefix("upperdir="));
        if let (Some(owners), Some(upper)) = (pods_owners, upper) {
            snapshot::own(Path::new(upper), owners)?;
        }
        return mount_mapped_overlay(source, target, flags, &data, owners, scratch);
    }
    ensure!(
        !GUESTS_WRITE.contains(&kind),
        "the host does not mount a file system of {kind}, which a guest may have written; it can be a disk of the pod if it is the whole root \
         file system and has the owners that it has on disk"
    );
    ensure!(own_owners.is_none(), "files of {kind} cannot have other owners in a pod than on disk; overlay's can");
    if kind == "overlay" {
        return mount_overlay(source, target, flags, &data);
    }
    let text = data.join(",");
    if text.len() > MAX_DATA {
        bail!("the options have {} bytes; the kernel takes {MAX_DATA}", text.len());
    }
    mount(Some(source), target, Some(kind), flags, Some(text.as_str()))?;
    match pods_owners {
        // A mapped copy covers it.
        Some(owners) => bind(target, target, &How { owners: Some(owners.clone()), ..How::default() }),
        None => Ok(()),
    }
}

fn mount_overlay(source: &str, target: &Path, flags: MsFlags, data: &[&str]) -> Result<()> {
    let text = data.join(",");
    if text.len() <= MAX_DATA {
        return mount(Some(source), target, Some("overlay"), flags, Some(text.as_str())).map_err(Into::into);
    }
    mount_long_overlay(source, target, flags, data)
}

/// Whether mounts that the host makes or takes away below a bound folder do so in its copy, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Follow {
    /// The copy is of what there is now.
    #[default]
    No,
    /// It follows the host, and the host never follows it.
    Host,
}

/// What of a bound folder cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadOnly {
    /// Nothing that its source lets write.
    #[default]
    No,
    /// What is not mounted within it.
    Top,
    /// Everything.
    All,
}

/// What a bound folder's copy is like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct How {
    /// With everything mounted below it.
    pub below: bool,
    /// Whether it follows the host.
    pub follow: Follow,
    /// What of it cannot be written, also by a guest that breaks out of its own rules.
    pub read_only: ReadOnly,
    /// `MOUNT_ATTR_*` that it has besides those of its source.
    pub attributes: u64,
    /// The owners that its files have in it, where they are others than on disk.
    pub owners: Option<IdMap>,
    /// Whether those of what is mounted below it are mapped as well.
    pub owners_below: bool,
}

/// What else of mount(2)'s flags is an attribute that a root file system may ask for.
fn attributes(flags: MsFlags) -> u64 {
    let attributes = [(MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID), (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC)];
    attributes.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |set, (_, attribute)| set | attribute)
}

/// A copy of `source` that is attached nowhere.
///
/// It leaves its source's peer group: what is unmounted in the share
/// when a container ends stays mounted on the host. Flags of the source stay; device nodes and
/// set-user-id programs mean something in the guest only.
///
/// # Errors
/// When the kernel refuses.
pub fn copy(source: &Path, how: &How) -> Result<OwnedFd> {
    let namespace = how.owners.as_ref().map(IdMap::namespace).transpose()?;
    copy_mapped(source, how, namespace.as_deref())
}

/// Binds `source` at `target`.
fn bind(source: &Path, target: &Path, how: &How) -> Result<()> {
    Ok(trees::move_mount(&copy(source, how)?, target)?)
}

fn copy_mapped(source: &Path, how: &How, owners: Option<&OwnedFd>) -> Result<OwnedFd> {
    let propagation = if how.follow == Follow::Host { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
    let tree = trees::open_tree(AT_FDCWD, source, how.below)?;
    let read_only = if how.read_only == ReadOnly::All { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let all = Attributes { set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | read_only, clear: 0, propagation: propagation.bits() };
    trees::set_attributes(&tree, all, how.below).context("part the copy from its source (Linux 5.12 is needed)")?;
    let top = how.attributes | if how.read_only == ReadOnly::Top { libc::MOUNT_ATTR_RDONLY } else { 0 };
    if top != 0 {
        trees::set_attributes(&tree, Attributes::set(top), false)?;
    }
    if let Some(owners) = owners {
        trees::map_owners(&tree, owners, how.owners_below).context("map the owners of its files, which not every file system can")?;
    }
    Ok(tree)
}

/// The mounts below `folder`, as paths from there on.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn below(folder: &Path) -> Result<Vec<PathBuf>> {
    let points = points()?;
    let below = points.into_iter().filter_map(|point| Some(point.path.strip_prefix(folder).ok()?.to_owned()));
    Ok(below.filter(|path| !path.as_os_str().is_empty()).collect())
}

/// A mount of this namespace (proc(5), "mountinfo").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Numbers of the file system's device.
    pub device: String,
    /// The folder of the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub path: PathBuf,
    /// The file system's kind.
    pub kind: String,
    /// What it lies on.
    pub source: PathBuf,
    /// Its own options.
    pub options: String,
}

/// All mounts of this namespace, in the order that they were mounted over one another.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn points() -> Result<Vec<Point>> {
    // Any byte but a few may be in a path.
    let mounts = std::fs::read("/proc/self/mountinfo").context("read the mounts")?;
    let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescape(field)));
    let point = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let (device, root, place) = (text(fields.next()?), path(fields.next()?), path(fields.next()?));
        // Behind a number of others, whose end a dash marks.
        fields.find(|field| *field == b"-")?;
        Some(Point { device, root, path: place, kind: text(fields.next()?), source: path(fields.next()?), options: text(fields.next()?) })
    };
    Ok(mounts.split(|byte| *byte == b'\n').filter_map(point).collect())
}

/// The kernel writes blanks and backslashes in mountinfo in octal.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|_| byte == b'\\').and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    out
}

/// An overlay whose layers' files have other owners than on disk; what is written above them has
/// those of the share.
///
/// The layers' mapped copies are attached for the overlay to find them, where the guest does not see them.
fn mount_mapped_overlay(source: &str, target: &Path, flags: MsFlags, data: &[&str], owners: &IdMap, scratch: &Path) -> Result<()> {
    const LOWER: &str = "lowerdir=";
    let lower = data.iter().find_map(|option| option.strip_prefix(LOWER)).context("overlay without lowerdir")?;
    let namespace = owners.namespace()?;
    let how = How { read_only: ReadOnly::Top, ..How::default() };
    let mut layers = Vec::new();
    for (index, layer) in lower.split(':').enumerate() {
        let place = scratch.join(index.to_string());
        let what = || format!("map layer {layer}");
        std::fs::create_dir_all(&place).with_context(what)?;
        let copy = copy_mapped(Path::new(layer), &how, Some(&namespace)).with_context(what)?;
        trees::move_mount(&copy, &place).with_context(what)?;
        layers.push(place.to_string_lossy().into_owned());
    }
    let mut options: Vec<String> = data.iter().filter(|option| !option.starts_with(LOWER)).map(|option| (*option).to_owned()).collect();
    options.push(format!("{LOWER}{}", layers.join(":")));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    mount_overlay(source, target, flags, &options)
}

/// An overlay of so many layers that their paths do not fit: mounted from the folder that they
/// have in common, with relative paths.
fn mount_long_overlay(source: &str, target: &Path, flags: MsFlags, data: &[&str]) -> Result<()> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir=")).context("overlay without lowerdir")?;
    let layers: Vec<&str> = lower.split(':').collect();
    let common = common_folder(&layers).context("the layers have no folder in common")?;
    let relative: Vec<&str> = layers.iter().map(|layer| layer[common.len()..].trim_start_matches('/')).collect();
    let mut options: Vec<String> =
        data.iter().filter(|option| !option.starts_with("lowerdir=")).map(|option| (*option).to_owned()).collect();
    options.push(format!("lowerdir={}", relative.join(":")));
    let text = options.join(",");
    if text.len() > MAX_DATA {
        bail!("{} layers have paths of {} bytes; the kernel takes {MAX_DATA}", layers.len(), text.len());
    }
    // The thread of a workshop has a working folder of its own.
    nix::unistd::chdir(Path::new(common)).with_context(|| format!("enter {common}"))?;
    Ok(mount(Some(source), target, Some("overlay"), flags, Some(text.as_str()))?)
}

/// The longest folder that all paths begin with.
fn common_folder<'a>(paths: &[&'a str]) -> Option<&'a str> {
    let first = *paths.first()?;
    let mut end = 0;
    for (index, _) in first.match_indices('/') {
        if !paths.iter().all(|path| path.get(..=index) == Some(&first[..=index])) {
            break;
        }
        end = index;
    }
    (end > 0).then(|| &first[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_told_apart() {
        let options: Vec<String> = ["ro", "lowerdir=/a:/b", "nosuid", "rw", "index=off"].map(str::to_owned).to_vec();
        let (flags, data) = parse_options(&options);
        assert_eq!(flags, MsFlags::MS_NOSUID);
        assert_eq!(data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(b"/a\\040b\\134c\xff"), b"/a b\\c\xff");
    }

    #[test]
    fn layers_share_their_longest_folder() {
        assert_eq!(common_folder(&["/s/snap/10/fs", "/s/snap/9/fs"]), Some("/s/snap"));
        assert_eq!(common_folder(&["/a/fs", "/b/fs"]), None);
    }

    #[test]
    fn no_path_and_no_link_leads_a_target_out_of_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("etc")).unwrap();
        for (link, leads) in [("absolute", "/etc"), ("up", "../../../../etc"), ("by-proc", "/proc/self/root/etc")] {
            std::os::unix::fs::symlink(leads, root.join(link)).unwrap();
        }
        for target in ["etc", "/etc", "/../etc", "absolute", "up", "/up"] {
            assert_eq!(inside(&root, Path::new(target)).unwrap(), root.join("etc"), "{target}");
        }
        assert!(inside(&root, Path::new("by-proc")).is_err() && inside(&root, Path::new("nowhere")).is_err());
    }
}
