//! The table of settings.

use std::path::PathBuf;

use super::hosts_own::HOSTS_OWN;
use super::{Config, CoreScheduling, DiskLayers, HostNamespaces, HostSockets, Join, NetworkDefault};
use crate::fs::{CachePolicy, HOST_IDS};
use crate::publish::MOST_PUBLISHED;
use crate::vmm::{DISKS, FILES_MIB, MEMORY_MIB, VCPUS};

/// A value as it stands in a file or an annotation.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number.
    Integer(i64),
    /// true or false.
    Bool(bool),
    /// Text, as all annotations are.
    Text(String),
    /// A list of texts.
    List(Vec<String>),
}

/// One setting.
pub struct Key {
    /// Section and name: `vm.vcpus`.
    pub name: &'static str,
    /// What it means, with its unit.
    pub meaning: &'static str,
    /// What is allowed, as it stands in error messages.
    pub allowed: &'static str,
    /// Sets it; `None` when the value is not allowed.
    pub set: fn(&mut Config, Value) -> Option<()>,
    /// Its value, as TOML.
    pub show: fn(&Config) -> String,
}

/// Reads a whole number within limits, also from an annotation's text.
fn integer<T: TryFrom<i64>>(value: &Value, min: i64, max: i64) -> Option<T> {
    let number = match value {
        Value::Integer(number) => *number,
        Value::Text(text) => text.parse().ok()?,
        Value::Bool(_) | Value::List(_) => return None,
    };
    (min..=max).contains(&number).then(|| T::try_from(number).ok())?
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Text(text) => text.parse().ok(),
        Value::Integer(_) | Value::List(_) => None,
    }
}

/// One of several choices, by its name.
fn chosen<T: Copy>(value: &Value, names: &[(&str, T)]) -> Option<T> {
    let Value::Text(text) = value else { return None };
    names.iter().find(|(name, _)| name == text).map(|(_, choice)| *choice)
}

fn name_of<T: PartialEq>(choice: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, named)| *named == choice).map_or("", |(name, _)| *name)
}

fn absolute(value: Value) -> Option<PathBuf> {
    match value {
        Value::Text(text) if text.starts_with('/') && text.len() < 4096 && !text.contains('\0') => Some(text.into()),
        _ => None,
    }
}

/// A list, in an annotation with commas between its entries.
fn list<T>(value: Value, read: impl Fn(String) -> Option<T>) -> Option<Vec<T>> {
    let texts = match value {
        Value::List(texts) => texts,
        Value::Text(text) => text.split(',').map(str::to_owned).collect(),
        Value::Integer(_) | Value::Bool(_) => return None,
    };
    texts.into_iter().map(read).collect()
}

/// A list as TOML.
fn quoted_list(texts: impl Iterator<Item = String>) -> String {
    toml::Value::from(texts.collect::<Vec<_>>()).to_string()
}

fn text(value: Value, allowed: impl Fn(&str) -> bool) -> Option<String> {
    match value {
        Value::Text(text) if allowed(&text) => Some(text),
        _ => None,
    }
}

/// A text as TOML.
pub fn quoted(text: impl std::fmt::Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

/// A path below the root of the cgroups, or a slice.
fn is_cgroup(text: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.chars().all(|c| c.is_ascii_graphic() && c != ':');
    let path = text.strip_prefix('/').is_some_and(|path| path.split('/').all(part));
    text.len() <= 256 && (path || (part(text) && !text.contains('/') && text.strip_suffix(".slice").is_some_and(|name| !name.is_empty())))
}

const PATH_ALLOWED: &str = "an absolute path";
const TIMEOUT_ALLOWED: &str = "100 to 3600000";

macro_rules! key {
    ($name:literal, $meaning:literal, $allowed:expr, |$config:ident, $value:ident| $set:expr, |$shown:ident| $show:expr) => {
        Key {
            name: $name,
            meaning: $meaning,
            allowed: $allowed,
            set: |$config, $value| {
                $set;
                Some(())
            },
            show: |$shown| $show,
        }
    };
}

/// Every setting there is.
pub const KEYS: &[Key] = &[
    key!("run.dir", "folder for the records and sockets of running pods", PATH_ALLOWED, |c, v| c.run_dir = absolute(v)?, |c| quoted(
        c.run_dir.display()
    )),
    key!("kernel.path", "guest kernel, an ELF vmlinux", PATH_ALLOWED, |c, v| c.kernel_path = absolute(v)?, |c| quoted(
        c.kernel_path.display()
    )),
    key!(
        "kernel.args",
        "added to the guest kernel's command line",
        "up to 512 printable ASCII characters",
        |c, v| c.kernel_args = text(v, |t| t.len() <= 512 && t.chars().all(|ch| (' '..='~').contains(&ch)))?,
        |c| quoted(&c.kernel_args)
    ),
    key!(
        "kernel.console",
        "serial console of the guest, written to the shim's log",
        "true or false",
        |c, v| c.kernel_console = boolean(&v)?,
        |c| c.kernel_console.to_string()
    ),
    key!("image.initramfs", "initramfs that holds the agent", PATH_ALLOWED, |c, v| c.initramfs_path = absolute(v)?, |c| quoted(
        c.initramfs_path.display()
    )),
    key!("vm.vcpus", "vCPUs of a pod", "1 to 32", |c, v| c.vcpus = integer(&v, i64::from(*VCPUS.start()), i64::from(*VCPUS.end()))?, |c| c
        .vcpus
        .to_string()),
    key!(
        "vm.memory_mib",
        "memory of a pod in MiB",
        "64 to 1048576",
        |c, v| c.memory_mib = integer(&v, MEMORY_MIB.start().cast_signed(), MEMORY_MIB.end().cast_signed())?,
        |c| c.memory_mib.to_string()
    ),
    key!(
        "vm.overhead_mib",
        "memory in MiB that a machine has beyond the limit of its pod, when the pod has one",
        "32 to 65536",
        |c, v| c.overhead_mib = integer(&v, 32, 65_536)?,
        |c| c.overhead_mib.to_string()
    ),
    key!(
        "vm.max_memory_mib",
        "the most memory in MiB that a pod's limits size its machine to, at its start and, as far as the host has it, later",
        "64 to 1048576",
        |c, v| c.max_memory_mib = integer(&v, MEMORY_MIB.start().cast_signed(), MEMORY_MIB.end().cast_signed())?,
        |c| c.max_memory_mib.to_string()
    ),
    key!(
        "vm.max_vcpus",
        "the most vCPUs that a pod's limits size its machine to, at its start and, as far as the host has them, later",
        "1 to 32",
        |c, v| c.max_vcpus = integer(&v, i64::from(*VCPUS.start()), i64::from(*VCPUS.end()))?,
        |c| c.max_vcpus.to_string()
    ),
    key!(
        "vm.nested",
        "whether a pod may run virtual machines itself, where the host's KVM lets it; more of the host's kernel is in its reach then",
        "true or false",
        |c, v| c.nested = boolean(&v)?,
        |c| c.nested.to_string()
    ),
    key!(
        "vm.core_scheduling",
        "which guests may run at once on the hardware threads of one core, where the host's processor has several: those of one pod, of one \
         tenant, or all; auto is tenant for a tenant's pods, pod where containerd's SCHED_CORE is set, else off",
        "\"auto\", \"pod\", \"tenant\" or \"off\"",
        |c, v| c.core_scheduling = chosen(&v, CoreScheduling::NAMES)?,
        |c| quoted(name_of(c.core_scheduling, CoreScheduling::NAMES))
    ),
    key!(
        "vm.report_free_memory",
        "whether the guest reports memory that it has freed, so that the host has it back after some seconds",
        "true or false",
        |c, v| c.report_free_memory = boolean(&v)?,
        |c| c.report_free_memory.to_string()
    ),
    key!(
        "network.default",
        "the network of a pod that was given none: its loopback interface alone, or one that passt(1) carries over sockets of the host",
        "\"none\" or \"user\"",
        |c, v| c.network_default = chosen(&v, NetworkDefault::NAMES)?,
        |c| quoted(name_of(c.network_default, NetworkDefault::NAMES))
    ),
    key!("network.passt", "that program", PATH_ALLOWED, |c, v| c.network_passt = absolute(v)?, |c| quoted(c.network_passt.display())),
    key!(
        "network.publish",
        "ports of the host that lead into a pod with such a network",
        "a list of at most 64 [ADDRESS:]HOST-PORT:PORT[/tcp|/udp] (in an annotation with commas between them)",
        |c, v| c.network_publish = list(v, |entry| entry.parse().ok()).filter(|list| list.len() <= MOST_PUBLISHED)?,
        |c| quoted_list(c.network_publish.iter().map(ToString::to_string))
    ),
    key!(
        "network.vhost",
        "whether the host's kernel serves network interfaces where it has vhost-net; otherwise the virtual machine monitor does",
        "true or false",
        |c, v| c.network_vhost = boolean(&v)?,
        |c| c.network_vhost.to_string()
    ),
    key!(
        "network.join",
        "how a pod's interfaces are joined to its machine: frames redirected by traffic control, or a macvtap on the interface where one can be",
        "\"redirect\" or \"macvtap\"",
        |c, v| c.network_join = chosen(&v, Join::NAMES)?,
        |c| quoted(name_of(c.network_join, Join::NAMES))
    ),
    key!(
        "network.max_mbit",
        "most megabits a second that an interface carries, each way; one with a limit is served by the virtual machine monitor",
        "0 to 1000000; 0 for no limit",
        |c, v| c.network_max_mbit = integer(&v, 0, 1_000_000)?,
        |c| c.network_max_mbit.to_string()
    ),
    key!(
        "network.max_frames",
        "most frames a second that an interface carries, each way; what the guest has not cut into packets counts as one",
        "0 to 100000000; 0 for no limit",
        |c, v| c.network_max_frames = integer(&v, 0, 100_000_000)?,
        |c| c.network_max_frames.to_string()
    ),
    key!(
        "disk.layers",
        "which containers have the layers of their image as disks, where the snapshotter made file systems of them: none, those with a read-only root, or all",
        "\"never\", \"read-only\" or \"always\"",
        |c, v| c.disk_layers = chosen(&v, DiskLayers::NAMES)?,
        |c| quoted(name_of(c.disk_layers, DiskLayers::NAMES))
    ),
    key!(
        "disk.places",
        "how many disks a pod may have at a time; where none is left, a container whose root file system a guest may have written is refused",
        "0 to 16",
        |c, v| c.disk_places = integer(&v, i64::from(*DISKS.start()), i64::from(*DISKS.end()))?,
        |c| c.disk_places.to_string()
    ),
    key!(
        "disk.io_uring",
        "whether requests of a disk go to the host's kernel many at a time, where it has io_uring; else one after the other, with reads ahead",
        "true or false",
        |c, v| c.disk_io_uring = boolean(&v)?,
        |c| c.disk_io_uring.to_string()
    ),
    key!(
        "disk.max_mib",
        "most MiB a second that are read from and written to a disk, together",
        "0 to 1000000; 0 for no limit",
        |c, v| c.disk_max_mib = integer(&v, 0, 1_000_000)?,
        |c| c.disk_max_mib.to_string()
    ),
    key!(
        "disk.max_requests",
        "most requests a second to a disk",
        "0 to 100000000; 0 for no limit",
        |c, v| c.disk_max_requests = integer(&v, 0, 100_000_000)?,
        |c| c.disk_max_requests.to_string()
    ),
    key!("vmm.path", "program of the virtual machine monitor", PATH_ALLOWED, |c, v| c.vmm_path = absolute(v)?, |c| quoted(
        c.vmm_path.display()
    )),
    key!(
        "vmm.uid_base",
        "first of the user ids that VMMs run as, one for each pod",
        "1000 to 4294000000",
        |c, v| c.uid_base = integer(&v, 1000, 4_294_000_000)?,
        |c| c.uid_base.to_string()
    ),
    key!(
        "vmm.uid_count",
        "number of those user ids, and so of pods on this host",
        "1 to 900000",
        |c, v| c.uid_count = integer(&v, 1, 900_000)?,
        |c| c.uid_count.to_string()
    ),
    key!(
        "pod.host_namespaces",
        "what becomes of a container that asks for the host's network, process ids or IPC: refused, or given the pod's own",
        "\"refuse\" or \"pod\"",
        |c, v| c.host_namespaces = chosen(&v, HostNamespaces::NAMES)?,
        |c| quoted(name_of(c.host_namespaces, HostNamespaces::NAMES))
    ),
    key!(
        "pod.owners",
        "group of the host, by name or number, whose members may use `caisson exec`, `logs`, `console`, `stop`, `metrics` and `top` on a pod as root may",
        "the name or number of a group; empty for root alone",
        |c, v| c.pod_owners = text(v, |t| t.len() < 64 && t.chars().all(|c| c.is_ascii_graphic()))?,
        |c| quoted(&c.pod_owners)
    ),
    key!(
        "tenant.name",
        "whom a pod belongs to: settings of /etc/caisson/tenants/NAME.toml come after all others but its annotations",
        "up to 64 of a to z, 0 to 9 and -; empty for nobody in particular",
        |c, v| c.tenant.name = text(v, |t| t.len() <= 64 && t.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-')))?,
        |c| quoted(&c.tenant.name)
    ),
    key!(
        "tenant.cgroup",
        "cgroup of the host that all pods of a tenant are in, instead of the one that containerd asks for",
        "an absolute path like \"/acme\", or a slice of systemd's like \"acme.slice\"; empty for where containerd asks",
        |c, v| c.tenant.cgroup = text(v, |t| t.is_empty() || is_cgroup(t))?,
        |c| quoted(&c.tenant.cgroup)
    ),
    key!(
        "tenant.memory_mib",
        "MiB of memory that all pods of that cgroup may use together; 0 leaves the limit as it is",
        "0 to 1073741824",
        |c, v| c.tenant.memory_mib = integer(&v, 0, 1 << 30)?,
        |c| c.tenant.memory_mib.to_string()
    ),
    key!(
        "tenant.cpus",
        "CPUs of the host that they may use together; 0 leaves the limit as it is",
        "0 to 65536",
        |c, v| c.tenant.cpus = integer(&v, 0, 65_536)?,
        |c| c.tenant.cpus.to_string()
    ),
    key!(
        "tenant.processes",
        "processes and threads of the host that they may have together, some ten a pod; 0 leaves the limit as it is",
        "0 to 4194304",
        |c, v| c.tenant.processes = integer(&v, 0, 1 << 22)?,
        |c| c.tenant.processes.to_string()
    ),
    key!("task.path", "program that stands for a container on the host", PATH_ALLOWED, |c, v| c.task_path = absolute(v)?, |c| quoted(
        c.task_path.display()
    )),
    key!("fs.path", "program of the virtio-fs server", PATH_ALLOWED, |c, v| c.fs_path = absolute(v)?, |c| quoted(c.fs_path.display())),
    key!(
        "fs.cache",
        "what the guest may cache of files",
        "\"never\", \"auto\" or \"always\"",
        |c, v| c.fs_cache = chosen(&v, CachePolicy::NAMES)?,
        |c| quoted(name_of(c.fs_cache, CachePolicy::NAMES))
    ),
    key!(
        "fs.set_id",
        "whether containers may make files that run as their owner, or with capabilities, and device nodes in volumes of the host; elsewhere they may",
        "true or false",
        |c, v| c.fs_set_id = boolean(&v)?,
        |c| c.fs_set_id.to_string()
    ),
    key!(
        "fs.writeback",
        "whether the guest collects small writes to files before it makes them: faster, for pods whose volumes nobody else writes meanwhile",
        "true or false",
        |c, v| c.fs_writeback = boolean(&v)?,
        |c| c.fs_writeback.to_string()
    ),
    key!(
        "fs.window_mib",
        "MiB of the window in which a guest has large files as the host's own memory of them, a 64th of which it takes of its own; 0 for none",
        "0, or an even number from 16 to 8192",
        |c, v| c.fs_window_mib = integer::<u64>(&v, 0, FILES_MIB.end().cast_signed())
            .filter(|mib| *mib == 0 || (FILES_MIB.contains(mib) && mib.is_multiple_of(2)))?,
        |c| c.fs_window_mib.to_string()
    ),
    key!(
        "fs.sockets",
        "what becomes of a socket of the host among a container's mounts: refused, bound although nobody answers, or each connection carried to it",
        "\"refuse\", \"dead\" or \"carry\"",
        |c, v| c.fs_sockets = chosen(&v, HostSockets::NAMES)?,
        |c| quoted(name_of(c.fs_sockets, HostSockets::NAMES))
    ),
    key!(
        "fs.id_base",
        "first of the 65536 user and group ids that own a pod's files on the host, the guest's root being the first; 0 for the same ids as in the guest",
        "0, or 65536 to 4294000000",
        |c, v| c.fs_id_base = integer(&v, 0, 4_294_000_000).filter(|id| !(1..HOST_IDS).contains(id))?,
        |c| c.fs_id_base.to_string()
    ),
    key!(
        "fs.mapped_volumes",
        "with fs.id_base, folders of the host or of the container whose volumes' files have those ids on disk as well; in others they are as in the guest",
        "a list of absolute paths (in an annotation with commas between them)",
        |c, v| c.fs_mapped_volumes = list(v, |path| absolute(Value::Text(path)))?,
        |c| quoted_list(c.fs_mapped_volumes.iter().map(|path| path.display().to_string()))
    ),
    key!(
        "fs.threads",
        "threads of the virtio-fs server for requests that wait for disks (fsync, fallocate, copies) or for open files, 0 to have all others wait for disks as well, and none for open files",
        "0 to 64",
        |c, v| c.fs_threads = integer(&v, 0, 64)?,
        |c| c.fs_threads.to_string()
    ),
    key!(
        "fs.poll_us",
        "the longest that the virtio-fs server looks for the guest's next request before it sleeps, in microseconds; it looks for some times as long as requests take",
        "0 to 10000",
        |c, v| c.fs_poll_us = integer(&v, 0, 10_000)?,
        |c| c.fs_poll_us.to_string()
    ),
    key!(
        "timeouts.boot_ms",
        "from the VMM's start to the agent's answer, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.boot_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.boot_timeout_ms.to_string()
    ),
    key!(
        "timeouts.agent_ms",
        "for one call to the agent, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.agent_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.agent_timeout_ms.to_string()
    ),
    key!(
        "timeouts.health_interval_ms",
        "between health checks of the agent, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.health_interval_ms = integer(&v, 100, 3_600_000)?,
        |c| c.health_interval_ms.to_string()
    ),
    key!(
        "timeouts.drain_ms",
        "for output that nobody reads when its process is deleted, in milliseconds",
        TIMEOUT_ALLOWED,
        |c, v| c.drain_timeout_ms = integer(&v, 100, 3_600_000)?,
        |c| c.drain_timeout_ms.to_string()
    ),
    key!(
        "log.level",
        "which messages the shim logs",
        "\"error\", \"warn\", \"info\", \"debug\" or \"trace\"",
        |c, v| c.log_level = text(v, |t| ["error", "warn", "info", "debug", "trace"].contains(&t))?,
        |c| quoted(&c.log_level)
    ),
    key!(
        "annotations.allowed",
        "keys that a pod may set by an annotation io.caisson.<key>",
        "a list of keys, none of them of the host's programs, folders, users, groups or cgroups, or of what bounds a pod",
        |c, v| c.annotations_allowed = match v {
            Value::List(names) if names.iter().all(|name| find(name).is_some() && !HOSTS_OWN.contains(&name.as_str())) => names,
            _ => return None,
        },
        |c| quoted_list(c.annotations_allowed.iter().cloned())
    ),
];

/// A setting by its name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}
