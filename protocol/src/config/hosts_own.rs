//! Settings that are the host's own business.

/// What no annotation may set, whatever the configuration says: programs and files that the host runs, where it keeps
/// things, whose a pod is on it, and what bounds what others may set.
pub const HOSTS_OWN: &[&str] = &[
    "run.dir",
    "kernel.path",
    "image.initramfs",
    "vm.max_memory_mib",
    "vm.max_vcpus",
    "vm.core_scheduling",
    "network.passt",
    "vmm.path",
    "vmm.uid_base",
    "vmm.uid_count",
    "pod.host_namespaces",
    "pod.owners",
    "tenant.cgroup",
    "tenant.memory_mib",
    "tenant.cpus",
    "tenant.processes",
    "task.path",
    "fs.path",
    "fs.id_base",
    "fs.mapped_volumes",
    "fs.set_id",
    "log.level",
    "annotations.allowed",
];
