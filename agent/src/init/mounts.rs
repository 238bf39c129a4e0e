//! Mount options (OCI runtime-spec `config.md`, "Linux mount options") and the mounts they make.

use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use caisson_sys::mounts::{self as trees, Attributes};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, fchdir};
use oci_spec::runtime::Mount;

use super::inside;

/// An option that is a flag: its name, the flag of mount(2), the attribute of mount_setattr(2), and
/// whether it sets or clears. With an `r` before the name it holds for what is mounted below, too.
const FLAGS: &[(&str, MsFlags, u64, bool)] = &[
    ("ro", MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV, true),
    ("dev", MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME, false),
    ("relatime", MsFlags::MS_RELATIME, libc::MOUNT_ATTR_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, libc::MOUNT_ATTR_RELATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME, false),
    ("nosymfollow", MsFlags::empty(), libc::MOUNT_ATTR_NOSYMFOLLOW, true),
    ("symfollow", MsFlags::empty(), libc::MOUNT_ATTR_NOSYMFOLLOW, false),
];
/// Options that only mount(2) knows.
const SUPERBLOCK_FLAGS: &[(&str, MsFlags, bool)] = &[
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("iversion", MsFlags::MS_I_VERSION, true),
    ("noiversion", MsFlags::MS_I_VERSION, false),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("silent", MsFlags::MS_SILENT, true),
    ("loud", MsFlags::MS_SILENT, false),
    ("defaults", MsFlags::empty(), true),
];
/// How mounts and unmounts spread (mount_namespaces(7)).
const PROPAGATION: &[(&str, MsFlags)] = &[
    ("private", MsFlags::MS_PRIVATE),
    ("slave", MsFlags::MS_SLAVE),
    ("shared", MsFlags::MS_SHARED),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];
/// The attributes of which one holds at a time.
const ACCESS_TIMES: u64 = libc::MOUNT_ATTR__ATIME;

/// Mount options, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Options<'a> {
    /// For a new file system.
    flags: MsFlags,
    /// For the mount, and for all below it.
    attributes: Attributes,
    recursive: Attributes,
    /// Whether it is a bind mount, and one with all below it.
    bind: bool,
    bind_below: bool,
    propagation: Option<MsFlags>,
    data: Vec<&'a str>,
}

/// The flags and the file system's own options among those of a mount.
pub fn flags_and_data(options: &[String]) -> (MsFlags, String) {
    let options = Options::parse(options);
    (options.flags, options.data.join(","))
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Self {
        let none = Attributes::default();
        let mut parsed = Self {
            flags: MsFlags::empty(),
            attributes: none,
            recursive: none,
            bind: false,
            bind_below: false,
            propagation: None,
            data: Vec::new(),
        };
        for option in options {
            match option.as_str() {
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.bind_below) = (true, true),
                option => {
                    if !parsed.flag(option) {
                        parsed.data.push(option);
                    }
                }
            }
        }
        parsed
    }

    fn flag(&mut self, option: &str) -> bool {
        if let Some(flag) = propagation(option) {
            self.propagation = Some(flag);
            return true;
        }
        if let Some((_, flag, attribute, set)) = FLAGS.iter().find(|(name, ..)| *name == option) {
            self.flags.set(*flag, *set);
            change(&mut self.attributes, *attribute, *set);
            return true;
        }
        if let Some((_, flag, set)) = SUPERBLOCK_FLAGS.iter().find(|(name, ..)| *name == option) {
            self.flags.set(*flag, *set);
            return true;
        }
        if let Some((_, _, attribute, set)) = option.strip_prefix('r').and_then(|below| FLAGS.iter().find(|(name, ..)| *name == below)) {
            change(&mut self.recursive, *attribute, *set);
            return true;
        }
        false
    }
}

fn change(attributes: &mut Attributes, attribute: u64, set: bool) {
    let access_time = attribute & ACCESS_TIMES != 0 || attribute == libc::MOUNT_ATTR_RELATIME;
    if set {
        attributes.set |= attribute;
        attributes.clear &= !attribute;
        if access_time {
            attributes.clear |= ACCESS_TIMES;
        }
    } else {
        attributes.set &= !attribute;
        attributes.clear |= if access_time { ACCESS_TIMES } else { attribute };
    }
}

/// The flags of a propagation option, with or without an `r`.
pub fn propagation(option: &str) -> Option<MsFlags> {
    let (name, below) = match option.strip_prefix('r') {
        Some(name) => (name, MsFlags::MS_REC),
        None => (option, MsFlags::empty()),
    };
    PROPAGATION.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag | below)
}

/// Makes one mount of a specification, in a root that was entered already: symbolic links in the
/// destination stay within it. `cgroup` is the folder of the container's cgroup in the guest.
///
/// # Errors
/// Which mount could not be made, and why.
pub fn make(entry: &Mount, old_root: impl AsFd, cgroup: &Path) -> Result<()> {
    let options = Options::parse(entry.options().as_deref().unwrap_or_default());
    let target = Path::new("/").join(entry.destination());
    let kind = entry.typ().as_deref().unwrap_or("none");
    let outcome = if options.bind || kind == "bind" {
        bind(entry, &options, old_root, &target)
    } else {
        match mount_new(entry, kind, &options, &target) {
            // In a user namespace that does not own the pod's network: the guest's own stands for it, with
            // all that is mounted in it.
            Err(error) if kind == "sysfs" && error.downcast_ref() == Some(&Errno::EPERM) => {
                bind_own(Path::new("/sys"), &options, old_root, &target)
            }
            // The whole tree is there already, with that; the container's part of it comes over it.
            Err(error) if kind.starts_with("cgroup") && matches!(error.downcast_ref(), Some(Errno::EPERM | Errno::EBUSY)) => {
                bind_own(cgroup, &options, old_root, &target)
            }
            outcome => outcome,
        }
    };
    outcome.and_then(|()| set_propagation(&options, &target)).with_context(|| format!("mount {}", target.display()))
}

fn set_propagation(options: &Options<'_>, target: &Path) -> Result<()> {
    match options.propagation {
        Some(flags) => {
            let propagation = (flags - MsFlags::MS_REC).bits();
            let changes = Attributes { propagation, ..Attributes::default() };
            trees::set_attributes(&inside::open(target)?, changes, flags.contains(MsFlags::MS_REC)).context("set the propagation")
        }
        None => Ok(()),
    }
}

/// A bind mount: a copy of the source's mount, given its attributes before anybody sees it.
fn bind(entry: &Mount, options: &Options<'_>, old_root: impl AsFd, target: &Path) -> Result<()> {
    let source = entry.source().as_deref().context("a bind mount needs a source")?;
    let relative = below_root(source)?;
    let tree = trees::open_tree(old_root, &relative, options.bind_below).with_context(|| format!("open {}", source.display()))?;
    if options.attributes != Attributes::default() {
        trees::set_attributes(&tree, options.attributes, false).context("set its attributes")?;
    }
    if options.recursive != Attributes::default() {
        trees::set_attributes(&tree, options.recursive, true).context("set its attributes and those below it")?;
    }
    let is_dir = nix::sys::stat::fstat(&tree).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR);
    trees::move_mount_onto(&tree, &inside::ensure(target, is_dir)?).context("attach it")
}

/// Binds a folder of the guest's own file systems.
fn bind_own(source: &Path, options: &Options<'_>, old_root: impl AsFd, target: &Path) -> Result<()> {
    let tree = trees::open_tree(old_root, &below_root(source)?, true).with_context(|| format!("open {}", source.display()))?;
    trees::set_attributes(&tree, options.attributes, false).context("set its attributes")?;
    trees::move_mount_onto(&tree, &inside::ensure(target, true)?).context("attach it")
}

fn mount_new(entry: &Mount, kind: &str, options: &Options<'_>, target: &Path) -> Result<()> {
    let place = inside::ensure(target, true)?;
    let (kind, data) = match kind {
        // There is only the unified hierarchy in the guest; the options name controllers of the other one.
        "cgroup" | "cgroup2" => ("cgroup2", String::new()),
        kind => (kind, options.data.join(",")),
    };
    let source = entry.source().clone().unwrap_or_else(|| PathBuf::from(kind));
    // A tmpfs that is to be read-only is sealed once it is filled: see `rootfs::seal`.
    let flags = if is_device_folder(entry) { options.flags - MsFlags::MS_RDONLY } else { options.flags };
    // mount(2) takes no descriptor, but the folder that we are in.
    fchdir(&place).context("enter the mount point")?;
    let mounted = mount(Some(&source), ".", Some(kind), flags, Some(data.as_str()));
    chdir("/").context("return to the root")?;
    mounted?;
    if options.recursive != Attributes::default() {
        trees::set_attributes(&inside::open(target)?, options.recursive, true).context("set its attributes")?;
    }
    Ok(())
}

/// Whether a mount is the container's own /dev.
pub fn is_device_folder(entry: &Mount) -> bool {
    entry.destination() == Path::new("/dev") && entry.typ().as_deref() == Some("tmpfs")
}

/// Whether a mount asks to be read-only.
pub fn is_read_only(entry: &Mount) -> bool {
    Options::parse(entry.options().as_deref().unwrap_or_default()).flags.contains(MsFlags::MS_RDONLY)
}

/// A path as seen from an open root folder.
fn below_root(path: &Path) -> Result<PathBuf> {
    if path.components().any(|part| part == Component::ParentDir) {
        bail!("the source {} goes up", path.display());
    }
    Ok(Path::new(".").join(path.strip_prefix("/").unwrap_or(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_apart() {
        let words: Vec<String> = ["rbind", "ro", "nosuid", "rslave", "rnoexec", "noatime", "size=64k"].map(str::to_owned).to_vec();
        let options = Options::parse(&words);
        assert!(options.bind && options.bind_below);
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOATIME);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR__ATIME);
        assert_eq!(options.recursive.set, libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(options.propagation, Some(MsFlags::MS_SLAVE | MsFlags::MS_REC));
        assert_eq!(options.data, ["size=64k"]);
    }

    #[test]
    fn the_last_word_counts() {
        let words: Vec<String> = ["ro", "rw"].map(str::to_owned).to_vec();
        let options = Options::parse(&words);
        assert_eq!(
            (options.flags, options.attributes),
            (MsFlags::empty(), Attributes { clear: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() })
        );
    }

    #[test]
    fn a_source_that_goes_up_is_refused() {
        assert!(below_root(Path::new("/run/../etc")).is_err());
        assert_eq!(below_root(Path::new("/run/x")).unwrap(), Path::new("./run/x"));
    }
}
