//! The pod's cgroup on the host: where the memory and CPU of its processes are counted.
//!
//! The path that containerd asks for is used, or one in the cgroup of the pod's tenant: in the one hierarchy
//! of cgroup v2, or in those of v1 that count and limit what the processes use. A path in systemd's form is a scope that systemd makes, where it runs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use caisson_host::process::Process;
use caisson_protocol::config::Tenant;

use crate::store::within;

const MOUNT: &str = "/sys/fs/cgroup";
/// Hierarchies of cgroup v1 that the pod's processes join: those that count and limit.
const COUNTING: &[&str] = &["blkio", "cpu", "cpu,cpuacct", "cpuacct", "memory", "pids"];
/// The cgroup of the shims whose pods have ended.
const SHIMS: &str = "/caisson";
/// The part of the pod's processor time that the shim gets when all is asked for (`cpu.weight`, of 1 to 10,000): a
/// hundred times the machine's.
const SHIM_WEIGHT: &str = "10000";
/// Bytes of the shim's memory that the kernel leaves it when the pod has no more (`memory.low`): what it has.
const SHIM_MEMORY: &str = "16777216";
/// Threads of the machine's processes (`pids.max`): a monitor and a file server have some dozens, and each container one that
/// stands for it. Who takes them over can start no more.
const MACHINE_THREADS: &str = "2048";
/// How long killed processes may take to leave.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// Where systemd tells that it runs (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// How long systemd may take to make a scope.
const SCOPE_TIMEOUT: Duration = Duration::from_secs(15);

/// Where a pod's processes are to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// Below the mount of a hierarchy.
    pub path: String,
    scope: Option<Scope>,
}

/// A scope unit (systemd.scope(5)).
#[derive(Debug, PartialEq, Eq)]
struct Scope {
    slice: String,
    name: String,
}

impl Place {
    /// What an OCI `cgroupsPath` means: a path, or systemd's `slice:prefix:name`. `None` for what means no cgroup.
    pub fn parse(cgroups_path: &str) -> Option<Self> {
        let clean =
            |path: &Path| path.components().all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::RootDir));
        let parts: Vec<&str> = cgroups_path.split(':').collect();
        let (path, scope) = match parts.as_slice() {
            [path] => (PathBuf::from("/").join(path), None),
            [slice, prefix, name] if !cgroups_path.contains('/') => {
                // As runc has it.
                let slice = if slice.is_empty() { "system.slice" } else { slice };
                let name = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
                (slice_path(slice).join(&name), Some(Scope { slice: slice.to_owned(), name }))
            }
            _ => return None,
        };
        (clean(&path) && path.parent().is_some()).then(|| Self { path: path.to_string_lossy().into_owned(), scope })
    }

    /// The place of a pod in its tenant's cgroup, or slice.
    ///
    /// # Errors
    /// When the tenant has limits and no cgroup that they could be set on.
    pub fn of_tenant(tenant: &Tenant, namespace: &str, pod: &str) -> Result<Option<Self>> {
        let Tenant { cgroup, memory_mib, cpus, processes, .. } = tenant;
        ensure!(
            cgroup.starts_with('/') || (*memory_mib, *cpus, *processes) == (0, 0, 0),
            "tenant.memory_mib, tenant.cpus and tenant.processes need a path as tenant.cgroup, which is {cgroup:?}; the limits of a slice are systemd's to set"
        );
        Ok(match cgroup.as_str() {
            "" => None,
            path if path.starts_with('/') => Self::parse(&format!("{path}/{namespace}/{pod}")),
            slice => Self::parse(&format!("{slice}:caisson-{namespace}:{pod}")),
        })
    }

    /// Makes the cgroup, which may exist, with its leaves, and moves processes of the machine into theirs and the shim
    /// into its own.
    ///
    /// # Errors
    /// When the host does not allow it.
    pub async fn make(&self, machine: &[u32]) -> Result<()> {
        let shim = std::process::id();
        note_where_from();
        // systemd makes a scope once, for its first processes, and leaves it to us then.
        if let Some(scope) = self.scope.as_ref().filter(|_| Path::new(SYSTEMD).exists() && !self.has_processes()) {
            scope.start(&[machine, &[shim]].concat()).await?;
        }
        self.join(Leaf::Machine, machine)?;
        self.join(Leaf::Shim, &[shim])?;
        if is_unified() {
            let limits = [
                (Leaf::Shim, "cpu", "cpu.weight", SHIM_WEIGHT),
                (Leaf::Shim, "memory", "memory.low", SHIM_MEMORY),
                (Leaf::Machine, "pids", "pids.max", MACHINE_THREADS),
            ];
            for (leaf, controller, file, value) in limits {
                let leaf = Path::new(MOUNT).join(self.path.trim_start_matches('/')).join(leaf.name());
                pass_down(&leaf, controller);
                let file = leaf.join(file);
                if file.exists() {
                    std::fs::write(&file, value).with_context(|| format!("write {value} to {}", file.display()))?;
                }
            }
        }
        Ok(())
    }

    fn has_processes(&self) -> bool {
        let processes = |dir: &Path| std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        dirs(&self.path).into_iter().any(|dir| !processes(&dir).is_empty() || !processes(&dir.join(Leaf::Machine.name())).is_empty())
    }

    /// Moves processes into a leaf.
    ///
    /// # Errors
    /// When the host does not allow it.
    pub fn join(&self, leaf: Leaf, pids: &[u32]) -> Result<()> {
        dirs(&self.path).iter().try_for_each(|dir| move_to(&dir.join(leaf.name()), pids))
    }
}

/// The cgroups within a pod's: who is in the one does not keep who is in the other from the processor, and the pod's limits
/// are those of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaf {
    /// The monitor, the file server, and what else works for the guest.
    Machine,
    /// The shim.
    Shim,
}

impl Leaf {
    const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Shim => "shim",
        }
    }
}

fn move_to(dir: &Path, pids: &[u32]) -> Result<()> {
    make(dir).with_context(|| format!("create cgroup {}", dir.display()))?;
    for pid in pids {
        std::fs::write(dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("move process {pid} into cgroup {}", dir.display()))?;
    }
    Ok(())
}

/// Has the shim leave its pod's cgroup for one that all shims have: who kills the pod's processes, as kubelet does when a
/// pod has ended, does not kill the shim, which containerd asks until the pod is removed.
///
/// # Errors
/// When the host does not allow it.
pub fn leave() -> Result<()> {
    let left = dirs(SHIMS).iter().try_for_each(|dir| move_to(dir, &[std::process::id()]));
    // Who is not root may have no cgroup there, and goes back to where it came from.
    left.or_else(|error| CAME_FROM.get().map_or(Err(error), |dir| move_to(dir, &[std::process::id()])))
}

/// The cgroup of v2 that the shim was in before its pod's.
static CAME_FROM: OnceLock<PathBuf> = OnceLock::new();

fn note_where_from() {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) {
        // The first one counts.
        let _ = CAME_FROM.set(Path::new(MOUNT).join(path));
    }
}

/// Whether this process is in a cgroup, or in one below it.
fn has_me(path: &str) -> bool {
    let within = |line: &str| {
        // proc(5): HIERARCHY:CONTROLLERS:PATH
        line.splitn(3, ':')
            .nth(2)
            .and_then(|own| own.strip_prefix(path.trim_end_matches('/')))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    std::fs::read_to_string("/proc/self/cgroup").is_ok_and(|text| text.lines().any(within))
}

impl Scope {
    /// Has systemd make the scope with the processes in it (org.freedesktop.systemd1(5), `StartTransientUnit`).
    /// It goes by itself with the last of them.
    async fn start(&self, pids: &[u32]) -> Result<()> {
        let manager = "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager";
        let properties = [
            &["Description", "s", "Caisson pod"][..],
            &["Slice", "s", &self.slice],
            &["Delegate", "b", "true"],
            &["CollectMode", "s", "inactive-or-failed"],
            &["DefaultDependencies", "b", "false"],
        ];
        let mut command = tokio::process::Command::new("busctl");
        command.args(["--system", "--quiet", "call"]).args(manager.split(' ')).args(["StartTransientUnit", "ssa(sv)a(sa(sv))"]);
        command.args([&self.name, "fail"]).arg((properties.len() + 1).to_string()).args(properties.concat());
        command.args(["PIDs", "au"]).arg(pids.len().to_string()).args(pids.iter().map(u32::to_string));
        // No units besides.
        let call = command.arg("0").stdin(Stdio::null()).kill_on_drop(true).output();
        let output = tokio::time::timeout(SCOPE_TIMEOUT, call)
            .await
            .with_context(|| format!("start scope {}: systemd did not answer within {} s", self.name, SCOPE_TIMEOUT.as_secs()))?
            .with_context(|| format!("start scope {}: run busctl", self.name))?;
        let says = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "start scope {}: systemd says {:?}", self.name, says.trim());
        self.wait_for(pids).await
    }

    /// systemd answers when it has the job, and moves the processes when it does it.
    async fn wait_for(&self, pids: &[u32]) -> Result<()> {
        let end = format!("/{}", self.name);
        let in_scope = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.lines().any(|line| line.ends_with(&end)))
        };
        let start = Instant::now();
        while !pids.iter().all(in_scope) {
            ensure!(start.elapsed() < SCOPE_TIMEOUT, "start scope {}: not there within {} s", self.name, SCOPE_TIMEOUT.as_secs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
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

/// Whether the host has cgroup v2.
fn is_unified() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// The roots of the host's hierarchies: one with cgroup v2, one for each controller or pair with v1.
fn hierarchies() -> Vec<PathBuf> {
    let mount = Path::new(MOUNT);
    if is_unified() {
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

/// Makes a cgroup, which may exist, and those above it.
fn make(dir: &Path) -> std::io::Result<()> {
    match within(dir.parent().unwrap_or(dir), || std::fs::create_dir(dir)) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Has a cgroup of v2 get a controller from all above it, as far as it is to be had there.
fn pass_down(dir: &Path, controller: &str) {
    let above: Vec<&Path> = dir.ancestors().skip(1).take_while(|above| above.starts_with(MOUNT)).collect();
    for group in above.into_iter().rev() {
        let _ = std::fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Makes a tenant's cgroup and sets its limits; those of 0 stay what they are.
///
/// # Errors
/// When the host does not have them.
pub fn limit(tenant: &Tenant) -> Result<()> {
    let unified = is_unified();
    // By the controller, with its file of cgroup v2 and of v1. Of CPU time it is microseconds, of a period that is 100 ms by itself.
    let limits = [
        ("memory", "memory.max", "memory.limit_in_bytes", tenant.memory_mib << 20),
        ("cpu", "cpu.max", "cpu.cfs_quota_us", u64::from(tenant.cpus) * 100_000),
        ("pids", "pids.max", "pids.max", u64::from(tenant.processes)),
    ];
    for (controller, file, v1_file, value) in limits.into_iter().filter(|(.., value)| *value > 0) {
        let (root, file) = if unified { (PathBuf::from(MOUNT), file) } else { (Path::new(MOUNT).join(controller), v1_file) };
        ensure!(root.join("cgroup.procs").exists(), "limit the tenant's pods: the host has no cgroups of {controller}");
        let dir = root.join(tenant.cgroup.trim_start_matches('/'));
        make(&dir).with_context(|| format!("create cgroup {}", dir.display()))?;
        if unified {
            // Where it is not to be had, it shows when the limit is set.
            pass_down(&dir, controller);
        }
        let file = dir.join(file);
        std::fs::write(&file, value.to_string())
            .with_context(|| format!("limit the tenant's pods: write \"{value}\" to {}", file.display()))?;
    }
    Ok(())
}

/// Kills what is in the cgroup and removes it, and the folder of containerd's namespace above it
/// when it was the last in there.
///
/// # Errors
/// When something in it does not die.
pub fn remove(path: &str, namespace: &str) -> Result<()> {
    if has_me(path) {
        leave().context("leave the pod's cgroup")?;
    }
    dirs(path).iter().try_for_each(|dir| remove_dir(dir, namespace))
}

fn remove_dir(dir: &Path, namespace: &str) -> Result<()> {
    let start = Instant::now();
    let leaves = [Leaf::Machine, Leaf::Shim].map(|leaf| dir.join(leaf.name()));
    loop {
        for leaf in &leaves {
            kill_all(leaf);
            // With what is left in it the cgroup above it stays as well.
            let _ = std::fs::remove_dir(leaf);
        }
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
    let processes = || -> Vec<u32> {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    // 0 stands for a process of another namespace, which no handle is to be had of.
    let handles: Vec<Process> = processes().into_iter().filter_map(|pid| Process::open(pid).ok()).collect();
    // What was in the cgroup may have ended before its handle was made: that is of another process then.
    let still = processes();
    handles.iter().filter(|process| still.contains(&process.id())).for_each(Process::kill);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_path_are_understood() {
        let path = |text| Place::parse(text).unwrap().path;
        assert_eq!(path("/default/web"), "/default/web");
        assert_eq!(path("system.slice:caisson:web"), "/system.slice/caisson-web.scope");
        assert_eq!(path("::web"), "/system.slice/web.scope");
        assert_eq!(
            path("kubepods-besteffort-pod1.slice:cri-containerd:ab"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-ab.scope"
        );
    }

    #[test]
    fn a_tenants_pods_are_in_its_cgroup_or_slice() {
        let place = |cgroup: &str, cpus| Place::of_tenant(&Tenant { cgroup: cgroup.into(), cpus, ..Tenant::default() }, "k8s.io", "web");
        assert_eq!(place("", 0).unwrap(), None);
        assert_eq!(place("/hosting/acme", 2).unwrap().unwrap().path, "/hosting/acme/k8s.io/web");
        assert_eq!(place("hosting-acme.slice", 0).unwrap().unwrap().path, "/hosting.slice/hosting-acme.slice/caisson-k8s.io-web.scope");
        for cgroup in ["", "acme.slice"] {
            assert!(place(cgroup, 2).unwrap_err().to_string().contains("need a path as tenant.cgroup"));
        }
    }

    #[test]
    fn a_path_that_leaves_the_tree_is_refused() {
        assert_eq!(Place::parse("/default/../../x"), None);
        assert_eq!(Place::parse("/"), None);
        assert_eq!(Place::parse("a.slice:b:../c"), None);
    }
}
