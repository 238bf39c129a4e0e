//! The pod's cgroup on the host: where the memory and CPU of its VMM and file server are counted.
//!
//! The path that containerd asks for is used: in the one hierarchy of cgroup v2, or in those of v1 that
//! count and limit what the processes use.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MOUNT: &str = "/sys/fs/cgroup";
/// Hierarchies of cgroup v1 that the pod's processes join: those that count and limit.
const COUNTING: &[&str] = &["blkio", "cpu", "cpu,cpuacct", "cpuacct", "memory", "pids"];
/// How long killed processes may take to leave.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// The cgroup v2 path that an OCI `cgroupsPath` means, below the mount.
///
/// Both forms are known: a path, and systemd's `slice:prefix:name`.
pub fn path(cgroups_path: &str) -> Option<String> {
    let clean = |path: &Path| path.components().all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::RootDir));
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = match parts.as_slice() {
        [path] => PathBuf::from("/").join(path),
        [slice, prefix, name] => slice_path(slice).join(format!("{prefix}-{name}.scope")),
        _ => return None,
    };
    (clean(&path) && path.parent().is_some()).then(|| path.to_string_lossy().into_owned())
}

/// `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> PathBuf {
    let mut path = PathBuf::from("/");
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut name = String::new();
    for part in stem.split('-').filter(|part| !part.is_empty()) {
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    path
}

/// The roots of the host's hierarchies: one with cgroup v2, one for each controller or pair with v1.
fn hierarchies() -> Vec<PathBuf> {
    let mount = Path::new(MOUNT);
    if mount.join("cgroup.controllers").exists() {
        return vec![mount.to_owned()];
    }
    // A link is the name of one of a pair.
    let is_one = |path: &PathBuf| path.join("cgroup.procs").exists() && !path.is_symlink();
    COUNTING.iter().map(|name| mount.join(name)).filter(is_one).collect()
}

/// The cgroup's folders, one in each hierarchy.
fn dirs(path: &str) -> Vec<PathBuf> {
    hierarchies().into_iter().map(|root| root.join(path.trim_start_matches('/'))).collect()
}

/// Makes the cgroup; it may exist.
///
/// # Errors
/// When the host does not allow it.
pub fn create(path: &str) -> Result<()> {
    dirs(path).iter().try_for_each(|dir| std::fs::create_dir_all(dir).with_context(|| format!("create cgroup {}", dir.display())))
}

/// Moves a process into the cgroup.
///
/// # Errors
/// When the host does not allow it.
pub fn add(path: &str, pid: u32) -> Result<()> {
    dirs(path).iter().try_for_each(|dir| {
        std::fs::write(dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("move process {pid} into cgroup {}", dir.display()))
    })
}

/// Kills what is in the cgroup and removes it, and the folder of containerd's namespace above it
/// when it was the last in there.
///
/// # Errors
/// When something in it does not die.
pub fn remove(path: &str, namespace: &str) -> Result<()> {
    dirs(path).iter().try_for_each(|dir| remove_dir(dir, namespace))
}

fn remove_dir(dir: &Path, namespace: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        kill_all(dir);
        match std::fs::remove_dir(dir) {
            Ok(()) => break,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(error) if start.elapsed() > EMPTY_TIMEOUT => bail!("remove cgroup {}: {error}", dir.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    if let Some(parent) = dir.parent().filter(|parent| parent.file_name().is_some_and(|name| name == namespace)) {
        // Another pod of the namespace keeps it.
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}

/// Kills what is in a cgroup; it may be gone. cgroup v1 has no word for it.
fn kill_all(dir: &Path) {
    // Not made when it is not there: it is a file of the kernel's.
    if std::fs::OpenOptions::new().write(true).open(dir.join("cgroup.kill")).and_then(|mut file| file.write_all(b"1")).is_ok() {
        return;
    }
    for pid in std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines().filter_map(|line| line.parse().ok()) {
        // 0 stands for a process of another namespace, and would mean our own group.
        if pid == 0 {
            continue;
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_path_are_understood() {
        assert_eq!(path("/default/web").unwrap(), "/default/web");
        assert_eq!(path("system.slice:caisson:web").unwrap(), "/system.slice/caisson-web.scope");
        assert_eq!(
            path("kubepods-besteffort-pod1.slice:cri-containerd:ab").unwrap(),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-ab.scope"
        );
    }

    #[test]
    fn a_path_that_leaves_the_tree_is_refused() {
        assert_eq!(path("/default/../../x"), None);
        assert_eq!(path("/"), None);
    }
}
