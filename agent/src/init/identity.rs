//! Who a process is and what it may: limits, user, groups, capabilities, seccomp.

use std::collections::HashSet;
use std::str::FromStr;

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Capabilities, LinuxSeccomp, PosixRlimitType, Process};

use super::{seccomp, terminal};
use crate::sys;

/// What files are made without unless the process says otherwise.
const DEFAULT_UMASK: u32 = 0o022;

/// Sets what a process inherits: its resource limits and its place in an out-of-memory kill.
///
/// # Errors
/// Which limit could not be set, and why.
pub fn set_limits(process: &Process) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        sys::set_limit(resource(limit.typ()), limit.soft(), limit.hard())
            .with_context(|| format!("set {} to {} of {}", limit.typ(), limit.soft(), limit.hard()))?;
    }
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string()).with_context(|| format!("set oomScoreAdj to {score}"))?;
    }
    Ok(())
}

/// Gives the process a session keyring of the container's, so that it does not have the agent's.
pub fn join_keyring(container: &str) {
    // A keyring is a convenience: a container whose user has no quota left starts without one.
    let _ = sys::join_session_keyring(container);
}

/// Becomes the process's user with its capabilities, behind its seccomp filter.
///
/// # Errors
/// What could not be given up or taken on; nothing is skipped.
pub fn assume(process: &Process, filter: Option<&LinuxSeccomp>) -> Result<()> {
    let user = process.user();
    let no_new_privileges = process.no_new_privileges().unwrap_or_default();
    terminal::give_streams(user.uid())?;
    if no_new_privileges {
        prctl::set_no_new_privs().context("set no_new_privs")?;
    } else if let Some(filter) = filter {
        // Without no_new_privs a filter takes a capability that is about to go.
        seccomp::load(filter)?;
    }
    let sets = Sets::of(process)?;
    for dropped in caps::runtime::thread_all_supported().difference(&sets.bounding) {
        caps::drop(None, CapSet::Bounding, *dropped).with_context(|| format!("drop the bounding capability {dropped}"))?;
    }
    prctl::set_keepcaps(true).context("keep the capabilities")?;
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().copied().map(Gid::from_raw).collect();
    setgroups(&groups).context("set the supplementary groups")?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).with_context(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).with_context(|| format!("become user {uid}"))?;
    prctl::set_keepcaps(false).context("stop keeping the capabilities")?;
    // What is effective must stay permitted, so permitted is lowered last.
    caps::set(None, CapSet::Inheritable, &sets.inheritable).context("set the inheritable capabilities")?;
    caps::set(None, CapSet::Effective, &sets.effective).context("set the effective capabilities")?;
    caps::set(None, CapSet::Permitted, &sets.permitted).context("set the permitted capabilities")?;
    if !sets.ambient.is_empty() {
        caps::set(None, CapSet::Ambient, &sets.ambient).context("set the ambient capabilities")?;
    }
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(DEFAULT_UMASK)));
    if let Some(filter) = filter.filter(|_| no_new_privileges) {
        seccomp::load(filter)?;
    }
    Ok(())
}

struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    inheritable: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

impl Sets {
    fn of(process: &Process) -> Result<Self> {
        let known = process.capabilities().as_ref();
        let set = |set: Option<&Option<Capabilities>>| -> Result<CapsHashSet> {
            set.and_then(Option::as_ref).into_iter().flatten().map(|one| capability(&one.to_string())).collect()
        };
        let (effective, permitted) = (set(known.map(|known| known.effective()))?, set(known.map(|known| known.permitted()))?);
        Ok(Self {
            bounding: set(known.map(|known| known.bounding()))?,
            // What is not permitted cannot be effective; asking for it is no reason to fail.
            effective: effective.intersection(&permitted).copied().collect::<HashSet<_>>(),
            inheritable: set(known.map(|known| known.inheritable()))?,
            permitted,
            ambient: set(known.map(|known| known.ambient()))?,
        })
    }
}

fn capability(name: &str) -> Result<Capability> {
    Capability::from_str(&format!("CAP_{name}")).map_err(|_| anyhow::anyhow!("capability {name} is not known"))
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_of_the_kernel_is_known() {
        for one in caps::all() {
            let parsed: oci_spec::runtime::Capability = serde_json::from_str(&format!("\"{one}\"")).unwrap();
            assert_eq!(capability(&parsed.to_string()).unwrap(), one);
        }
    }

    #[test]
    fn a_process_without_capabilities_has_none() {
        let process: Process = serde_json::from_str(r#"{"cwd":"/","user":{"uid":0,"gid":0}}"#).unwrap();
        let sets = Sets::of(&process).unwrap();
        assert!(sets.bounding.is_empty() && sets.permitted.is_empty());
    }
}
