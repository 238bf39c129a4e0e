//! A container's file system: its root entered, its mounts made, what it must not see covered.
//!
//! The root is entered first (chroot) and filled from within, so no path of the image or of the
//! specification can lead out of it; what is bound into it is reached through a descriptor of the
//! old root, which is let go at the end.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use caisson_sys::mounts::{self as trees, Attributes};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstatat, major, makedev, minor, mknod};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Spec};
use protobuf::Message;

use caisson_protocol::agent::Layers;
use caisson_protocol::guest::{UPPER_DIR, WORK_DIR, shared_snapshot};

use super::terminal::Terminal;
use super::{inside, layers_file, mounts};
use crate::cgroup::Cgroup;

/// What every container has in its /dev (runtime-spec `config-linux.md`, "Default Devices").
const DEVICES: &[(&str, u64, u64)] = &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
const ANYONE: u32 = 0o666;
/// Room for the places of mounts: folders and empty files.
const PLACES: &str = "mode=755,size=1m";

/// Enters the container's root and fills it.
///
/// # Errors
/// What could not be mounted, made or written, and why.
pub fn enter(id: &str, spec: &Spec) -> Result<()> {
    let root = spec.root().as_ref().context("the specification has no root")?.path();
    let linux = spec.linux().as_ref().context("the specification has no linux section")?;
    // Nothing that happens here reaches the agent's mounts; what the agent mounts later comes here.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>).context("part from the agent's mounts")?;
    lay_layers(id, root)?;
    mount(Some(root), root, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("bind the root {}", root.display()))?;
    let old_root = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).context("open the old root")?;
    chdir(root).with_context(|| format!("enter the root {}", root.display()))?;
    // Not pivot_root(2) yet: with the old root laid over the new one, a path that goes up from a
    // folder of the image would come out there.
    chroot(".").context("make the root the root")?;

    let entries = spec.mounts().as_deref().unwrap_or_default();
    for entry in entries {
        mounts::make(entry, &old_root, Cgroup::of(id).dir())?;
    }
    let brings_devices = entries.iter().any(|entry| entry.destination() == Path::new("/dev") && !mounts::is_device_folder(entry));
    if !brings_devices {
        fill_dev(linux, &old_root)?;
    }
    leave(old_root)?;
    set_sysctls(linux, |name| !is_of_the_network(name))?;
    let process = spec.process().as_ref().context("the specification has no process")?;
    // A working folder that the image lacks is made, as other runtimes do; a root that cannot be
    // written says what is wrong when the folder is entered.
    let _ = inside::ensure(&Path::new("/").join(process.cwd()), true);
    Ok(())
}

/// Mounts an overlay at the root, where that is made of layers.
fn lay_layers(id: &str, root: &Path) -> Result<()> {
    let file = layers_file(id);
    let text = match std::fs::read(&file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        text => text.with_context(|| format!("read {}", file.display()))?,
    };
    let Layers { folder, count, read_only, .. } = Layers::parse_from_bytes(&text).context("read the layers of the root")?;
    // With paths from there on many fit into the page that the kernel takes.
    chdir(folder.as_str()).with_context(|| format!("enter {folder}"))?;
    let lower: Vec<String> = (0..count).map(|layer| layer.to_string()).collect();
    let snapshot = if read_only {
        // Places for mounts that the image lacks: they are made before the root is read-only.
        mount(Some("places"), root, Some("tmpfs"), MsFlags::MS_NODEV | MsFlags::MS_NOSUID, Some(PLACES)).context("make room for mounts")?;
        for name in [UPPER_DIR, WORK_DIR] {
            let folder = root.join(name);
            std::fs::create_dir(&folder).context("make room for mounts")?;
            // The first is the root to be, whatever modes new folders have here.
            std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).context("make room for mounts")?;
        }
        root.to_string_lossy().into_owned()
    } else {
        shared_snapshot(id)
    };
    let options = format!("lowerdir={},upperdir={snapshot}/{UPPER_DIR},workdir={snapshot}/{WORK_DIR}", lower.join(":"));
    mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("lay {count} layers over one another at {}", root.display()))
}

/// Makes the root that of the mount namespace and detaches the old one: only the container's own
/// mounts remain.
fn leave(old_root: OwnedFd) -> Result<()> {
    let root = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).context("open the root")?;
    fchdir(&old_root).context("go to the old root")?;
    chroot(".").context("return to the old root")?;
    fchdir(&root).context("go to the root")?;
    pivot_root(".", ".").context("exchange the roots")?;
    // The old root lies over the new one, and so is what the current folder leads to.
    umount2(".", MntFlags::MNT_DETACH).context("detach the old root")?;
    chdir("/").context("enter the root")?;
    let [top, above] = ["/", "/.."].map(nix::sys::stat::stat);
    let (top, above) = (top.context("look at the root")?, above.context("look above the root")?);
    ensure!((top.st_dev, top.st_ino) == (above.st_dev, above.st_ino), "something is left of the old root");
    Ok(())
}

/// Makes the terminal the container's /dev/console.
///
/// # Errors
/// When it cannot be bound there.
pub fn add_console(terminal: &Terminal) -> Result<()> {
    const CONSOLE: &str = "/dev/console";
    if !Path::new(CONSOLE).exists() {
        File::create(CONSOLE).context("create /dev/console")?;
    }
    let slave = trees::clone_mount_of(terminal.slave()).context("take the terminal's file")?;
    trees::move_mount(&slave, Path::new(CONSOLE)).context("bind /dev/console")
}

/// Covers and freezes what the specification says must not be read or written.
///
/// # Errors
/// What could not be covered: nothing is left open in silence.
pub fn seal(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref().context("the specification has no linux section")?;
    for path in linux.readonly_paths().iter().flatten() {
        make_read_only(Path::new(path)).with_context(|| format!("make {path} read-only"))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        mask(Path::new(path)).with_context(|| format!("mask {path}"))?;
    }
    for entry in spec.mounts().iter().flatten() {
        if mounts::is_device_folder(entry) && mounts::is_read_only(entry) {
            freeze(Path::new("/dev")).context("make /dev read-only")?;
        }
    }
    if spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or_default() {
        freeze(Path::new("/")).context("make the root read-only")?;
    }
    if let Some(option) = linux.rootfs_propagation().as_deref().filter(|option| !option.is_empty()) {
        let flags = mounts::propagation(option).with_context(|| format!("rootfsPropagation {option:?} is not known"))?;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).with_context(|| format!("set rootfsPropagation {option}"))?;
    }
    Ok(())
}

fn fill_dev(linux: &Linux, old_root: &OwnedFd) -> Result<()> {
    inside::ensure(Path::new("/dev"), true)?;
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        make_device(&path, SFlag::S_IFCHR, makedev(*major, *minor), ANYONE, old_root)?;
    }
    for device in linux.devices().iter().flatten() {
        if is_known(device, old_root) {
            make_specified(device, old_root)?;
        } else if !allows_all_devices(linux) {
            bail!(
                "device {} ({}:{}) is one of the host's that the guest does not have",
                device.path().display(),
                device.major(),
                device.minor()
            );
        }
    }
    for (link, target) in LINKS {
        match symlink(target, Path::new("/dev").join(link)) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("link /dev/{link}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether the guest's kernel has a device.
fn is_known(device: &LinuxDevice, old_root: &OwnedFd) -> bool {
    let kind = match device.typ() {
        LinuxDeviceType::B => "block",
        LinuxDeviceType::P => return true,
        LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => "char",
    };
    let entry = format!("sys/dev/{kind}/{}:{}", device.major(), device.minor());
    fstatat(old_root, Path::new(&entry), AtFlags::empty()).is_ok()
}

/// Whether the container may use any device: its list then is all that the host has, asked for by
/// nobody.
fn allows_all_devices(linux: &Linux) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let any_kind = |kind: Option<LinuxDeviceType>| kind.is_none_or(|kind| kind == LinuxDeviceType::A);
    rules.iter().any(|rule| rule.allow() && any_kind(rule.typ()) && rule.major().is_none() && rule.minor().is_none())
}

fn make_specified(device: &LinuxDevice, old_root: &OwnedFd) -> Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => SFlag::S_IFCHR,
    };
    let path = Path::new("/").join(device.path());
    if let Some(folder) = path.parent() {
        inside::ensure(folder, true)?;
    }
    let number = |value: i64| u64::try_from(value).with_context(|| format!("device {}: number {value}", path.display()));
    let mode = device.file_mode().unwrap_or(ANYONE) & 0o7777;
    make_device(&path, kind, makedev(number(device.major())?, number(device.minor())?), mode, old_root)?;
    if device.uid().is_some() || device.gid().is_some() {
        // In a user namespace the node is the guest's own, bound: its owner stays.
        match chown(&path, device.uid(), device.gid()) {
            Err(error) if error.raw_os_error() != Some(libc::EPERM) => {
                return Err(error).with_context(|| format!("chown {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes a device node; in a user namespace, where nobody may, binds the guest's own.
fn make_device(path: &Path, kind: SFlag, number: libc::dev_t, mode: u32, old_root: &OwnedFd) -> Result<()> {
    match mknod(path, kind, Mode::from_bits_truncate(mode), number) {
        // Whatever the umask took away.
        Ok(()) => std::fs::set_permissions(path, Permissions::from_mode(mode)).with_context(|| format!("chmod {}", path.display())),
        Err(Errno::EEXIST) => Ok(()),
        Err(Errno::EPERM) => {
            let source =
                Path::new("./dev").join(node_name(kind, number, old_root).with_context(|| format!("find device {}", path.display()))?);
            let node = trees::open_tree(old_root.as_fd(), &source, false).with_context(|| format!("find device {}", path.display()))?;
            trees::move_mount_onto(&node, &inside::ensure(path, false)?).with_context(|| format!("bind {}", path.display()))
        }
        Err(errno) => Err(errno).with_context(|| format!("make device {}", path.display())),
    }
}

/// The guest's own name for a device.
fn node_name(kind: SFlag, number: libc::dev_t, old_root: &OwnedFd) -> Result<String> {
    let kind = if kind == SFlag::S_IFBLK { "block" } else { "char" };
    let entry = format!("sys/dev/{kind}/{}:{}/uevent", major(number), minor(number));
    let mut text = String::new();
    File::from(openat(old_root, Path::new(&entry), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?).read_to_string(&mut text)?;
    text.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(str::to_owned).context("it has no name")
}

/// Sets the parameters of the pod's network, which is the machine's: a container's own root may not
/// be allowed to.
///
/// # Errors
/// Which parameter could not be set, and why.
pub fn set_network_sysctls(spec: &Spec) -> Result<()> {
    spec.linux().as_ref().map_or(Ok(()), |linux| set_sysctls(linux, is_of_the_network))
}

fn is_of_the_network(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

fn set_sysctls(linux: &Linux, which: impl Fn(&str) -> bool) -> Result<()> {
    linux.sysctl().iter().flatten().filter(|(name, _)| which(name)).try_for_each(|(name, value)| set_sysctl(name, value))
}

/// Sets a kernel parameter of the calling process's namespaces.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    // Dots separate folders, as sysctl(8) has it; an interface's name may hold a dot as a slash.
    let path: String = name
        .chars()
        .map(|letter| {
            if letter == '.' {
                '/'
            } else if letter == '/' {
                '.'
            } else {
                letter
            }
        })
        .collect();
    ensure!(!path.split('/').any(|part| part.is_empty() || part == ".."), "sysctl {name:?} is no name");
    write_parameter(&path, value).with_context(|| format!("set sysctl {name} to {value:?}"))
}

/// Writes a file of the kernel's own, whatever an image or a volume has in the place of /proc.
fn write_parameter(path: &str, value: &str) -> Result<()> {
    let parameters = open("/proc/sys", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    ensure!(fstatfs(&parameters)?.filesystem_type() == PROC_SUPER_MAGIC, "/proc of the container is not the kernel's");
    let how = OpenHow::new()
        .flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    Ok(File::from(openat2(&parameters, path, how)?).write_all(value.as_bytes())?)
}

/// Binds a path over itself, read-only. What is not there needs no lock.
fn make_read_only(path: &Path) -> Result<()> {
    match trees::open_tree(AT_FDCWD, path, true) {
        Ok(tree) => {
            trees::set_attributes(&tree, Attributes::set(libc::MOUNT_ATTR_RDONLY), true)?;
            Ok(trees::move_mount(&tree, path)?)
        }
        Err(error) if is_absent(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Hides a folder behind an empty one and a file behind /dev/null.
fn mask(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("nr_blocks=1,nr_inodes=1"))?;
            Ok(())
        }
        Ok(_) => Ok(trees::move_mount(&trees::clone_mount_of(&null_device()?)?, path)?),
        Err(error) if is_absent(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The null device: an image or a volume may have something else at its path, which is nothing to hide a file behind.
fn null_device() -> Result<File> {
    let device = File::from(inside::open(Path::new("/dev/null")).context("open /dev/null")?);
    let meta = device.metadata().context("look at /dev/null")?;
    ensure!(meta.file_type().is_char_device() && meta.rdev() == makedev(1, 3), "the container's /dev/null is not the null device");
    Ok(device)
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

/// Makes one mount read-only, and not those below it.
fn freeze(path: &Path) -> Result<()> {
    let folder = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok(trees::set_attributes(&folder, Attributes::set(libc::MOUNT_ATTR_RDONLY), false)?)
}
