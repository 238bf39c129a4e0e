//! Namespaces: new ones for a container, a container's own for an exec.

use std::fs::File;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, Spec};

use crate::{network, sys};

/// `CLONE_NEWTIME` of linux/sched.h, which nix does not know.
const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => NEW_TIME,
    }
}

/// Makes the namespaces that a specification asks for, and joins those that it names.
///
/// `map_users` is called when a new user namespace waits for its map. A mount namespace is always
/// made: a container's root must not become the agent's.
///
/// # Errors
/// Which namespace could not be had, and why.
pub fn make(spec: &Spec, map_users: impl FnOnce() -> Result<()>) -> Result<()> {
    let linux = spec.linux().as_ref().context("the specification has no linux section")?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut fresh = CloneFlags::CLONE_NEWNS;
    let mut joined = Vec::new();
    for namespace in namespaces {
        match namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty()) {
            Some(path) => {
                let file = File::open(path).with_context(|| format!("open the namespace {}", path.display()))?;
                joined.push((namespace.typ(), path, file));
            }
            None => fresh |= flag(namespace.typ()),
        }
    }
    // All are open before the first is joined: a user namespace's root may not look into processes of
    // the guest. That one comes first, since it owns the others.
    joined.sort_by_key(|(kind, ..)| *kind != LinuxNamespaceType::User);
    for (kind, path, file) in joined {
        setns(file, flag(kind)).with_context(|| format!("enter the namespace {}", path.display()))?;
        if kind == LinuxNamespaceType::User {
            become_root()?;
        }
    }
    if fresh.contains(CloneFlags::CLONE_NEWUSER) {
        unshare(CloneFlags::CLONE_NEWUSER).context("make a user namespace")?;
        map_users()?;
        become_root()?;
        fresh -= CloneFlags::CLONE_NEWUSER;
    }
    unshare(fresh).context("make the container's namespaces")?;
    if fresh.contains(NEW_TIME) {
        set_time_offsets(linux)?;
    }
    if fresh.contains(CloneFlags::CLONE_NEWNET) {
        network::loopback_up()?;
    }
    if fresh.contains(CloneFlags::CLONE_NEWUTS) {
        if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
            nix::unistd::sethostname(name).with_context(|| format!("set the host name {name:?}"))?;
        }
        if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
            sys::set_domain_name(name).with_context(|| format!("set the domain name {name:?}"))?;
        }
    }
    Ok(())
}

/// Joins all namespaces of a running container's process.
///
/// # Errors
/// When the process is gone.
pub fn join(spec: &Spec, target: Pid) -> Result<()> {
    let process = sys::open_pidfd(target).context("find the container's process")?;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let flags = namespaces.iter().fold(CloneFlags::CLONE_NEWNS, |flags, namespace| flags | flag(namespace.typ()));
    // One call: the kernel enters the user namespace first and checks the others by it.
    setns(process, flags).context("enter the container's namespaces")?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        become_root()?;
    }
    Ok(())
}

/// In a new user namespace we are nobody until we ask to be its root.
fn become_root() -> Result<()> {
    setgroups(&[]).context("drop the groups")?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context("become group 0 of the user namespace")?;
    setresuid(uid, uid, uid).context("become user 0 of the user namespace")
}

/// Offsets must be set before the first process is in the namespace (time_namespaces(7)).
fn set_time_offsets(linux: &Linux) -> Result<()> {
    let Some(offsets) = linux.time_offsets() else { return Ok(()) };
    for (clock, offset) in offsets {
        let line = format!("{clock} {} {}", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        std::fs::write("/proc/self/timens_offsets", &line).with_context(|| format!("set the time offset {line:?}"))?;
    }
    Ok(())
}

/// The lines of a user or group map (user_namespaces(7)).
pub fn id_map(mappings: &[LinuxIdMapping]) -> String {
    mappings.iter().map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_written_as_the_kernel_reads_them() {
        let maps: Vec<LinuxIdMapping> =
            serde_json::from_str(r#"[{"containerID":0,"hostID":100000,"size":65536},{"containerID":65536,"hostID":5,"size":1}]"#).unwrap();
        assert_eq!(id_map(&maps), "0 100000 65536\n65536 5 1\n");
    }
}
