//! `caisson check --rootless`: can whoever asks run pods without being root (rootless containerd), and what is not possible then.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::users::Users;
use caisson_protocol::config::Config;
use caisson_protocol::fs::HOST_IDS;

use crate::check::{Check, filesystem, readable};

/// What a pod needs of an ordinary user's account, besides what each host needs.
pub fn checks(config: &Config) -> Vec<Check> {
    let subordinate = |what, path| Check {
        what,
        outcome: subordinate(path),
        remedy: "Run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER` as root.",
    };
    let mut checks = Vec::new();
    match Users::here() {
        // Within the namespace that rootless containerd has made.
        Ok(users) if !users.are_all() => checks.push(Check {
            what: "users of this namespace",
            outcome: enough(&users, config),
            remedy: "Give the user 65536 subordinate ids; set vmm.uid_base and vmm.uid_count to some of them.",
        }),
        _ => checks.extend([
            subordinate("subordinate user ids", "/etc/subuid"),
            subordinate("subordinate group ids", "/etc/subgid"),
            Check { what: "newuidmap and newgidmap", outcome: helpers(), remedy: "Install the package uidmap." },
        ]),
    }
    checks.extend([
        Check {
            what: "overlay file system for everybody",
            outcome: filesystem("overlay").and_then(|_| overlay()),
            remedy: "Use Linux 5.11 or later, or containerd's snapshotter fuse-overlayfs or native.",
        },
        Check { what: "user-mode network", outcome: readable(&config.network_passt), remedy: "Install the package passt." },
        Check { what: "limits of the whole pod", outcome: Ok(cgroup()), remedy: "" },
    ]);
    checks
}

fn enough(users: &Users, config: &Config) -> Result<String> {
    ensure!(users.have(1, HOST_IDS - 1), "there are {}; an image has users up to {}", users.describe(), HOST_IDS - 1);
    let (first, count) = (config.uid_base, config.uid_count);
    ensure!(users.have(first, count), "there are {}, and not the {count} from vmm.uid_base = {first} on", users.describe());
    Ok(users.describe())
}

/// The calling user's line of a file of subordinate ids (subuid(5)).
fn subordinate(path: &str) -> Result<String> {
    let id = nix::unistd::getuid();
    let name = nix::unistd::User::from_uid(id).ok().flatten().map_or_else(|| id.to_string(), |user| user.name);
    let text = std::fs::read_to_string(path).context(path.to_owned())?;
    let counts = text.lines().filter_map(|line| {
        let mut parts = line.split(':');
        let whose = parts.next()?;
        (whose == name || whose == id.to_string()).then(|| parts.nth(1)?.trim().parse::<u32>().ok())?
    });
    match counts.max() {
        Some(count) if count >= HOST_IDS => Ok(format!("{count} for {name}")),
        Some(count) => bail!("{path} has {count} for {name}; an image has {HOST_IDS} users"),
        None => bail!("{path} has none for {name}"),
    }
}

fn helpers() -> Result<String> {
    for name in ["newuidmap", "newgidmap"] {
        let found = Path::new("/usr/bin").join(name);
        ensure!(found.exists(), "{} is missing", found.display());
    }
    Ok("installed".into())
}

fn overlay() -> Result<String> {
    let release = nix::sys::utsname::uname().context("ask for the kernel's version")?.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(version >= (5, 11), "Linux {release} lets nobody but root mount it");
    Ok(format!("Linux {release}"))
}

/// Whether pods can be limited as a whole on the host; what their containers may use the guest limits in any case.
fn cgroup() -> String {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let folder = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    if nix::unistd::access(&folder.join("cgroup.subtree_control"), nix::unistd::AccessFlags::W_OK).is_ok() {
        format!("{} is delegated to you", folder.display())
    } else {
        "no cgroup is delegated to you: a pod may use what its machine has; its containers' limits hold within".into()
    }
}
