//! Mounts on the host: a container's root file system and its bind mounts, put into the share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use caisson_sys::mounts::{self as trees, Attributes};
use containerd_shim_protos::types::mount::Mount;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::idmap::IdMap;
use crate::store::{remove_empty_tree, unmount_below};

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

/// Mounts what containerd's snapshotter prepared at `target`, in order, one over the other.
///
/// # Errors
/// Which mount failed, and why.
pub fn mount_rootfs(mounts: &[Mount], target: &Path) -> Result<()> {
    for one in mounts {
        // containerd 1.7 and later may name a place within the root file system.
        let target = if one.target.is_empty() { target.to_owned() } else { inside(target, Path::new(&one.target))? };
        mount_one(&one.type_, &one.source, &one.options, &target)
            .with_context(|| format!("mount the root file system ({} of {})", one.type_, one.source))?;
    }
    Ok(())
}

/// `path` below `root`, refusing what would leave it.
fn inside(root: &Path, path: &Path) -> Result<PathBuf> {
    if path.components().any(|part| part == std::path::Component::ParentDir) {
        bail!("mount target {} leaves the root file system", path.display());
    }
    Ok(root.join(path.strip_prefix("/").unwrap_or(path)))
}

fn mount_one(kind: &str, source: &str, options: &[String], target: &Path) -> Result<()> {
    let (flags, mut data) = parse_options(options);
    let owners = IdMap::take_from(&mut data)?;
    // Device nodes in the share mean something in the guest, never on the host.
    let flags = flags | MsFlags::MS_NODEV;
    if flags.contains(MsFlags::MS_BIND) {
        return bind(Path::new(source), target, flags.contains(MsFlags::MS_REC), flags, Follow::No, owners.as_ref());
    }
    if let Some(owners) = owners {
        return mount_mapped_overlay(kind, source, target, flags, &data, &owners);
    }
    if kind == "overlay" {
        return mount_overlay(source, target, flags, &data);
    }
    let text = data.join(",");
    if text.len() > MAX_DATA {
        bail!("the options have {} bytes; the kernel takes {MAX_DATA}", text.len());
    }
    mount(Some(source), target, Some(kind), flags, Some(text.as_str())).map_err(Into::into)
}

fn mount_overlay(source: &str, target: &Path, flags: MsFlags, data: &[&str]) -> Result<()> {
    let text = data.join(",");
    if text.len() <= MAX_DATA {
        return mount(Some(source), target, Some("overlay"), flags, Some(text.as_str())).map_err(Into::into);
    }
    mount_long_overlay(source, target, flags, data)
}

/// Whether mounts that the host makes or takes away below a bound folder do so in its copy, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// The copy is of what there is now.
    No,
    /// It follows the host, and the host never follows it.
    Host,
}

/// The flags that are attributes of a mount, as mount_setattr(2) has them.
const ATTRIBUTES: &[(MsFlags, u64)] = &[
    (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
];

/// Binds `source` at `target`, with all mounted below it when `below`.
///
/// The copy leaves its source's peer group before it is attached: what is unmounted in the share
/// when a container ends stays mounted on the host. Flags of the source stay; those of `flags` come
/// in addition, and device nodes mean something in the guest only. With `owners` its files have
/// other owners in the share than on disk.
///
/// # Errors
/// When the kernel refuses.
pub fn bind(source: &Path, target: &Path, below: bool, flags: MsFlags, follow: Follow, owners: Option<&IdMap>) -> Result<()> {
    let propagation = if follow == Follow::Host { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
    let tree = trees::open_tree(AT_FDCWD, source, below)?;
    let all = Attributes { set: libc::MOUNT_ATTR_NODEV, clear: 0, propagation: propagation.bits() };
    trees::set_attributes(&tree, all, below).context("part the copy from its source (Linux 5.12 is needed)")?;
    let set = ATTRIBUTES.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |set, (_, attribute)| set | attribute);
    if set != 0 {
        trees::set_attributes(&tree, Attributes::set(set), false)?;
    }
    if let Some(owners) = owners {
        trees::map_owners(&tree, &owners.namespace()?, below).context("map the owners of its files")?;
    }
    Ok(trees::move_mount(&tree, target)?)
}

/// The mounts below `folder`, as paths from there on.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn below(folder: &Path) -> Result<Vec<PathBuf>> {
    let points = points()?;
    let below = points.into_iter().filter_map(|point| Some(point.strip_prefix(folder).ok()?.to_owned()));
    Ok(below.filter(|path| !path.as_os_str().is_empty()).collect())
}

/// All mount points of this namespace, in the order that they were mounted over one another.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn points() -> Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    Ok(mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| PathBuf::from(unescape(point))).collect())
}

/// The kernel writes blanks and backslashes in mountinfo in octal.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// An overlay whose layers' files have other owners than on disk; what is written above them has
/// those of the share.
///
/// The layers' mapped copies are attached for the overlay to find them, beside its own place, and
/// taken away again.
fn mount_mapped_overlay(kind: &str, source: &str, target: &Path, flags: MsFlags, data: &[&str], owners: &IdMap) -> Result<()> {
    const LOWER: &str = "lowerdir=";
    if kind != "overlay" {
        bail!("files of {kind} cannot have other owners in a pod than on disk; overlay's can");
    }
    let lower = data.iter().find_map(|option| option.strip_prefix(LOWER)).context("overlay without lowerdir")?;
    let places = folder_beside(target)?;
    let outcome = (|| {
        let mut layers = Vec::new();
        for (index, layer) in lower.split(':').enumerate() {
            let place = places.join(index.to_string());
            std::fs::create_dir(&place).with_context(|| format!("create {}", place.display()))?;
            bind(Path::new(layer), &place, false, MsFlags::empty(), Follow::No, Some(owners))
                .with_context(|| format!("map layer {layer}"))?;
            layers.push(place.to_string_lossy().into_owned());
        }
        let mut options: Vec<String> = data.iter().filter(|option| !option.starts_with(LOWER)).map(|option| (*option).to_owned()).collect();
        options.push(format!("{LOWER}{}", layers.join(":")));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        mount_overlay(source, target, flags, &options)
    })();
    unmount_below(&places)?;
    remove_empty_tree(&places)?;
    outcome
}

/// A folder for what is mounted for a moment.
fn folder_beside(target: &Path) -> Result<PathBuf> {
    let folder = target.with_extension("layers");
    std::fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
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
    let (source, target, common) = (source.to_owned(), target.to_owned(), common.to_owned());
    // A thread of its own, with a working folder of its own.
    let thread = std::thread::spawn(move || -> Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(Path::new(&common))?;
        mount(Some(source.as_str()), &target, Some("overlay"), flags, Some(text.as_str()))?;
        Ok(())
    });
    thread.join().map_err(|_| anyhow::anyhow!("the mounting thread ended"))?
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
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }

    #[test]
    fn layers_share_their_longest_folder() {
        assert_eq!(common_folder(&["/s/snap/10/fs", "/s/snap/9/fs"]), Some("/s/snap"));
        assert_eq!(common_folder(&["/a/fs", "/b/fs"]), None);
    }

    #[test]
    fn a_target_outside_of_the_root_is_refused() {
        assert!(inside(Path::new("/r"), Path::new("/../etc")).is_err());
        assert_eq!(inside(Path::new("/r"), Path::new("/etc")).unwrap(), Path::new("/r/etc"));
    }
}
