//! Mounts on the host: a container's root file system and its bind mounts, put into the share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::types::mount::Mount;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

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
    let (flags, data) = parse_options(options);
    // Device nodes in the share mean something in the guest, never on the host.
    let flags = flags | MsFlags::MS_NODEV;
    if flags.contains(MsFlags::MS_BIND) {
        return bind(Path::new(source), target, flags);
    }
    let text = data.join(",");
    if text.len() <= MAX_DATA {
        return mount(Some(source), target, Some(kind), flags, Some(text.as_str())).map_err(Into::into);
    }
    if kind != "overlay" {
        bail!("the options have {} bytes; the kernel takes {MAX_DATA}", text.len());
    }
    mount_long_overlay(source, target, flags, &data)
}

/// Binds `source` at `target` with the flags that a bind mount takes in a second step.
///
/// # Errors
/// When the kernel refuses.
pub fn bind(source: &Path, target: &Path, flags: MsFlags) -> Result<()> {
    mount(Some(source), target, None::<&str>, flags & (MsFlags::MS_BIND | MsFlags::MS_REC), None::<&str>)?;
    let rest = flags - MsFlags::MS_REC;
    mount(None::<&str>, target, None::<&str>, rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, None::<&str>)?;
    Ok(())
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
