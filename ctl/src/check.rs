//! `caisson check`: can this host run pods, and if not, what is to be done.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::settings;
use caisson_protocol::config::{Config, NetworkDefault};
use caisson_sys::mounts::Attributes;

use crate::{probe, rootless};

/// One thing that a pod needs of its host.
pub struct Check {
    pub what: &'static str,
    /// What was found, or what is missing.
    pub outcome: Result<String>,
    /// What to do when it is.
    pub remedy: &'static str,
}

/// Prints a line a check, with a remedy for each miss; true when nothing is missing. With `rootless` for who is not root.
pub fn print(path: &Path, rootless: bool) -> bool {
    let checks = all(path, rootless);
    for check in &checks {
        match &check.outcome {
            Ok(found) => println!("ok      {}: {found}", check.what),
            Err(error) => println!("MISSING {}: {error:#}\n        {}", check.what, check.remedy),
        }
    }
    let missing = checks.iter().filter(|check| check.outcome.is_err()).count();
    println!(
        "{}",
        if missing == 0 {
            "This host can run pods.".to_owned()
        } else {
            format!("This host cannot run pods: {missing} of {} checks failed.", checks.len())
        }
    );
    missing == 0
}

const RUN_FOLDER: &str = "run folder";

fn all(path: &Path, rootless: bool) -> Vec<Check> {
    let config = settings::load(path);
    let effective = config.as_ref().cloned().unwrap_or_default();
    let file = |what, path: &Path, remedy| Check { what, outcome: readable(path), remedy };
    let mut checks = vec![
        Check {
            what: "configuration",
            outcome: config.map(|_| path.display().to_string()).map_err(Into::into),
            remedy: "Correct the key that is named; `caisson config` prints the defaults.",
        },
        Check {
            what: "KVM runs an unmodified guest",
            outcome: probe::run_guest().map(|()| "it does".into()),
            remedy: "Switch on hardware virtualization (SVM or VT-x) in the firmware, or nested virtualization on the hypervisor below; load kvm-amd or kvm-intel; run as root or in the group kvm.",
        },
        Check {
            what: "user namespaces",
            outcome: user_namespaces(),
            remedy: "Set the sysctl user.max_user_namespaces above 0: the VMM's jail needs one.",
        },
        Check { what: "seccomp", outcome: seccomp(), remedy: "Use a kernel with CONFIG_SECCOMP_FILTER." },
        Check {
            what: "overlay file system",
            outcome: filesystem("overlay"),
            remedy: "Run `modprobe overlay`, or use another snapshotter.",
        },
        Check { what: "volumes", outcome: volumes(), remedy: "Use Linux 5.12 or later, which has mount_setattr(2)." },
        Check { what: "taps of pod networks", outcome: taps(), remedy: "Run `modprobe tun`, or install the kernel's package that has it." },
        Check { what: "cgroups", outcome: cgroups(), remedy: "Mount cgroup2 at /sys/fs/cgroup, as systemd does." },
        Check {
            what: "users of virtual machines",
            outcome: users_of_machines(&effective),
            remedy: "Set vmm.uid_base and vmm.uid_count to ids that nobody else gives away, from 1879048192 on.",
        },
        file("guest kernel", &effective.kernel_path, "Run `cargo xtask install`, or set kernel.path."),
        file("initramfs", &effective.initramfs_path, "Run `cargo xtask install`, or set image.initramfs."),
        file("virtual machine monitor", &effective.vmm_path, "Run `cargo xtask install`, or set vmm.path."),
        file("virtio-fs server", &effective.fs_path, "Run `cargo xtask install`, or set fs.path."),
        file("stand-in of containers", &effective.task_path, "Run `cargo xtask install`, or set task.path."),
        Check {
            what: "shim on the PATH",
            outcome: shim(),
            remedy: "Run `cargo xtask install`; containerd looks for the shim on its own PATH.",
        },
        Check { what: RUN_FOLDER, outcome: run_dir(&effective), remedy: "Run as root, or set run.dir to a folder that can be written." },
    ];
    if rootless {
        // Made in a namespace of their own, by who is root there.
        checks.retain(|check| check.what != RUN_FOLDER);
        checks.extend(rootless::checks(&effective));
    } else if effective.network_default == NetworkDefault::User {
        checks.push(file("user-mode network", &effective.network_passt, "Install the package passt, or set network.passt."));
    }
    checks
}

pub fn readable(path: &Path) -> Result<String> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let meta = file.metadata().with_context(|| path.display().to_string())?;
    ensure!(meta.is_file() && meta.len() > 0, "{}: it is empty or no file", path.display());
    Ok(format!("{} ({} KiB)", path.display(), meta.len() / 1024))
}

fn user_namespaces() -> Result<String> {
    let path = "/proc/sys/user/max_user_namespaces";
    let text = std::fs::read_to_string(path).context(path)?;
    let count: u64 = text.trim().parse().context(path)?;
    ensure!(count > 0, "{path} is 0");
    Ok(format!("up to {count}"))
}

/// Ids that systemd-nspawn gives to containers (systemd's `UIDS-GIDS.md`).
const NSPAWN: std::ops::RangeInclusive<u64> = 524_288..=1_879_048_191;

/// Whether the ids of virtual machines are also given to others.
fn users_of_machines(config: &Config) -> Result<String> {
    let (first, last) = (u64::from(config.uid_base), u64::from(config.uid_base) + u64::from(config.uid_count) - 1);
    // In a user namespace with few users they are what there is.
    if caisson_host::users::are_few() {
        return Ok(format!("{first} to {last}"));
    }
    ensure!(
        last < *NSPAWN.start() || first > *NSPAWN.end(),
        "{first} to {last} are among the ids of systemd-nspawn's containers, 524288 to 1879048191"
    );
    for path in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let taken = text.lines().find_map(|line| overlapping(line, first, last));
        ensure!(taken.is_none(), "{first} to {last} are given to {} by {path}, too", taken.unwrap_or_default());
    }
    Ok(format!("{first} to {last}, which nobody else has"))
}

/// Whom a line of subuid(5) gives ids between two.
fn overlapping(line: &str, first: u64, last: u64) -> Option<&str> {
    let mut parts = line.split(':');
    let (whose, from, count) = (parts.next()?, parts.next()?.trim().parse::<u64>().ok()?, parts.next()?.trim().parse::<u64>().ok()?);
    (count > 0 && from <= last && first < from.saturating_add(count)).then_some(whose)
}

fn seccomp() -> Result<String> {
    let path = "/proc/sys/kernel/seccomp/actions_avail";
    let actions = std::fs::read_to_string(path).context(path)?;
    ensure!(actions.contains("kill_process"), "{path} does not list kill_process");
    Ok("filters are available".into())
}

pub fn filesystem(name: &str) -> Result<String> {
    let known = std::fs::read_to_string("/proc/filesystems").context("/proc/filesystems")?;
    ensure!(known.lines().any(|line| line.split_whitespace().last() == Some(name)), "the kernel does not know {name}");
    Ok("available".into())
}

fn volumes() -> Result<String> {
    let root = std::fs::File::open("/").context("/")?;
    // Of nothing that is to change the kernel only says whether it knows the call, and to whom it may be.
    match caisson_sys::mounts::set_attributes(&root, Attributes::default(), false) {
        Err(error) if error.kind() != ErrorKind::PermissionDenied => Err(error).context("mount_setattr"),
        _ => Ok("mounts can be bound by descriptor".into()),
    }
}

/// The kernel loads the driver when its device is opened.
fn taps() -> Result<String> {
    let path = "/dev/net/tun";
    std::fs::File::options().read(true).write(true).open(path).context(path)?;
    Ok(path.into())
}

fn cgroups() -> Result<String> {
    let mount = Path::new("/sys/fs/cgroup");
    if let Ok(controllers) = std::fs::read_to_string(mount.join("cgroup.controllers")) {
        return Ok(format!("v2 with {}", controllers.trim()));
    }
    let missing = ["cpu", "memory", "pids"].into_iter().find(|name| !mount.join(name).join("cgroup.procs").exists());
    match missing {
        None => Ok("v1".into()),
        Some(name) => bail!("neither cgroup v2 nor the {name} hierarchy of v1 is mounted at /sys/fs/cgroup"),
    }
}

fn shim() -> Result<String> {
    let name = "containerd-shim-caisson-v2";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.map(|file| file.display().to_string()).with_context(|| format!("{name} is not on the PATH"))
}

fn run_dir(config: &Config) -> Result<String> {
    let dir = &config.run_dir;
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let probe = dir.join(".check");
    if let Err(error) = std::fs::write(&probe, "") {
        bail!("{}: {error}", dir.display());
    }
    std::fs::remove_file(&probe).with_context(|| dir.display().to_string())?;
    Ok(dir.display().to_string())
}
