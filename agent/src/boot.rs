//! What the guest needs before the first container: file systems, the cgroup tree, a few settings.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use caisson_protocol::agent::PodFile;
use caisson_protocol::guest::{POD_FILES_DIR, SHARE_DIR, SHARE_TAG, SHM_DIR};
use nix::mount::{MsFlags, mount};

use crate::cgroup::enable_controllers;
use crate::{network, share};

const NO_EXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Source, target, type, flags, options; in the order that they are needed.
const MOUNTS: &[(&str, &str, &str, MsFlags, &str)] = &[
    ("proc", "/proc", "proc", NO_EXEC, ""),
    ("sysfs", "/sys", "sysfs", NO_EXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "mode=0755"),
    ("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=0755"),
    ("devpts", "/dev/pts", "devpts", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("shm", SHM_DIR, "tmpfs", NO_EXEC, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", NO_EXEC, "nsdelegate"),
    (SHARE_TAG, SHARE_DIR, "virtiofs", MsFlags::empty(), ""),
    ("fusectl", share::CONNECTIONS, "fusectl", NO_EXEC, ""),
];

/// Microseconds since the guest's kernel started.
pub fn uptime_us() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |time| time.tv_sec().unsigned_abs() * 1_000_000 + time.tv_nsec().unsigned_abs() / 1000)
}

/// Writes a line to the kernel's log, where the host finds it when the guest dies.
pub fn log(line: &str) {
    if let Ok(mut kmsg) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // There is no other place to complain to.
        let _ = kmsg.write_all(line.as_bytes());
    }
}

/// Mounts what every guest has and makes every cgroup controller available to containers.
///
/// # Errors
/// What could not be mounted, and why.
pub fn mount_all() -> Result<()> {
    leave_rootfs().context("make the root a mount that can be pivoted from")?;
    for (source, target, kind, flags, options) in MOUNTS {
        std::fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
        mount(Some(*source), *target, Some(*kind), *flags, Some(*options)).with_context(|| format!("mount {target}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/ptmx", "pts/ptmx"),
    ] {
        let _ = std::fs::remove_file(link);
        std::os::unix::fs::symlink(target, link).with_context(|| format!("link {link}"))?;
    }
    // Containers' mounts must not come back to us, but what we mount later must reach them.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>).context("make mounts shared")?;
    enable_controllers(Path::new("/sys/fs/cgroup"))?;
    // A container that reaches a process of ours could otherwise write to the program it runs.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>).context("make the agent's own root read-only")?;
    network::loopback_up()
}

/// Sets the size of the pod's shared memory.
pub fn resize_shm(bytes: u64) -> Result<()> {
    let options = format!("mode=1777,size={bytes}");
    let flags = NO_EXEC | MsFlags::MS_REMOUNT;
    mount(None::<&str>, SHM_DIR, None::<&str>, flags, Some(options.as_str())).context("size the pod's shared memory")
}

/// Keeps the pod's files where its containers' mounts expect them.
pub fn keep_files(files: &[PodFile]) -> Result<()> {
    let folder = Path::new(POD_FILES_DIR);
    if !files.is_empty() {
        std::fs::create_dir_all(folder).with_context(|| format!("create {POD_FILES_DIR}"))?;
    }
    for file in files {
        let name = Path::new(&file.name).file_name().filter(|name| name.to_str() == Some(&file.name));
        let path = folder.join(name.with_context(|| format!("pod file {:?}: it is no plain name", file.name))?);
        std::fs::write(&path, &file.content).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Lays a bind mount of the root over the root and moves onto it.
///
/// The kernel's first mount has no parent, so pivot_root(2), by which containers leave it, refuses
/// to work from there. The bind mount has one, and nothing is copied.
fn leave_rootfs() -> Result<()> {
    const PLACE: &str = "/run/root";
    std::fs::create_dir_all(PLACE)?;
    mount(Some("/"), PLACE, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    nix::unistd::chdir(PLACE)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    Ok(())
}
