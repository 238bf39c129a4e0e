//! The pod's cgroup on the host: where the memory and CPU of its VMM and file server are counted.
//!
//! On cgroup v2 the path that containerd asks for is used. On v1 the pod's processes stay where
//! containerd's shims are (see LIMITATIONS).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const MOUNT: &str = "/sys/fs/cgroup";
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

/// Whether this host has the unified hierarchy.
pub fn is_unified() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

fn dir(path: &str) -> PathBuf {
    Path::new(MOUNT).join(path.trim_start_matches('/'))
}

/// Makes the cgroup; it may exist.
///
/// # Errors
/// When the host does not allow it.
pub fn create(path: &str) -> Result<()> {
    let dir = dir(path);
    std::fs::create_dir_all(&dir).with_context(|| format!("create cgroup {path}"))
}

/// Moves a process into the cgroup.
///
/// # Errors
/// When the host does not allow it.
pub fn add(path: &str, pid: u32) -> Result<()> {
    std::fs::write(dir(path).join("cgroup.procs"), pid.to_string()).with_context(|| format!("move process {pid} into cgroup {path}"))
}

/// Kills what is in the cgroup and removes it, and the folder of containerd's namespace above it
/// when it was the last in there.
///
/// # Errors
/// When something in it does not die.
pub fn remove(path: &str, namespace: &str) -> Result<()> {
    let dir = dir(path);
    if dir.exists() {
        std::fs::write(dir.join("cgroup.kill"), "1").with_context(|| format!("kill what is in cgroup {path}"))?;
    }
    let start = Instant::now();
    loop {
        match std::fs::remove_dir(&dir) {
            Ok(()) => break,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(error) if start.elapsed() > EMPTY_TIMEOUT => bail!("remove cgroup {path}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    if let Some(parent) = dir.parent().filter(|parent| parent.file_name().is_some_and(|name| name == namespace)) {
        // Another pod of the namespace keeps it.
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
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
