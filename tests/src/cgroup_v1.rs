//! Pods on a node with the hierarchies of cgroup v1, which is a node of its own (`cargo xtask node --cgroup-v1`).

use std::path::Path;

use k8s_cri::v1::{ContainerStatsRequest, LinuxContainerResources};

use crate::Test;
use crate::cri;
use crate::ctr::{Pod, run_pod, shell};
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const TESTS: &[Test] = &[
    ("cgroup_v1_has_a_pods_processes_in_each_hierarchy", cgroup_v1_has_a_pods_processes_in_each_hierarchy),
    ("cgroup_v1_limits_a_kubernetes_pod", cgroup_v1_limits_a_kubernetes_pod),
    ("cgroup_v1_limits_a_tenant_where_it_has_the_controller", cgroup_v1_limits_a_tenant_where_it_has_the_controller),
];

/// Those that count or limit what a pod's processes use, of what the node's kernel has of v1.
const COUNTING: [&str; 3] = ["blkio", "cpu,cpuacct", "pids"];

/// Whether this node has them.
pub fn is_here() -> bool {
    !Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn processes(hierarchy: &str, path: &str) -> Vec<u32> {
    let listed = shell(&format!("sort -n /sys/fs/cgroup/{hierarchy}{path}/cgroup.procs"));
    listed.lines().map(|line| line.parse().unwrap()).collect()
}

fn cgroup_v1_has_a_pods_processes_in_each_hierarchy() {
    let before = Inventory::take();
    {
        let pod = Pod::start("v1", &[], "sleep 1000");
        let mut own = [pod.host_pid("vmm"), pod.host_pid("fs"), pod.host_pid("stand-in")];
        own.sort_unstable();
        for hierarchy in COUNTING {
            let of = |leaf: &str| processes(hierarchy, &format!("/default/{}/{leaf}", pod.id));
            assert_eq!((of("machine"), of("shim")), (own.to_vec(), vec![pod.host_pid("shim")]), "{hierarchy}");
        }
        // A shim that is killed leaves it to another process to find them.
        shell(&format!("kill -9 {}", pod.host_pid("shim")));
        eventually(|| pod.status().is_none_or(|status| status == "STOPPED"), "the task outlives its shim");
    }
    assert_nothing_left(&before);
}

fn cgroup_v1_limits_a_kubernetes_pod() {
    let before = Inventory::take();
    for hierarchy in COUNTING {
        shell(&format!("mkdir /sys/fs/cgroup/{hierarchy}/pods"));
    }
    shell("echo 300 >/sys/fs/cgroup/pids/pods/pids.max; echo 150000 >/sys/fs/cgroup/cpu/pods/cpu.cfs_quota_us");
    {
        let mut pod = cri::Pod::start(|config| config.linux.as_mut().unwrap().cgroup_parent = "/pods".into());
        let limits =
            LinuxContainerResources { memory_limit_in_bytes: 64 << 20, cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() };
        let container = pod.run("limited", "sleep 1000", |config| config.linux.as_mut().unwrap().resources = Some(limits));
        // In the guest it is v2, and the container's own, whatever the host has.
        assert_eq!(pod.output(&container, "cat /sys/fs/cgroup/cpu.max /proc/self/cgroup"), "50000 100000\n0::/");
        for hierarchy in COUNTING {
            // The monitor, the file server, and what stands for each container.
            assert_eq!(processes(hierarchy, &format!("/pods/{}/machine", pod.id)).len(), 4, "{hierarchy}");
        }
        let used = shell(&format!("cat /sys/fs/cgroup/cpuacct/pods/{}/cpuacct.usage", pod.id));
        assert!(used.parse::<u64>().unwrap() > 10_000_000, "{used}");
        let request = ContainerStatsRequest { container_id: container };
        let stats = pod.cri.call(|client| client.container_stats(request)).unwrap().stats.unwrap();
        assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
    }
    for hierarchy in COUNTING {
        shell(&format!("rmdir /sys/fs/cgroup/{hierarchy}/pods"));
    }
    assert_nothing_left(&before);
}

fn cgroup_v1_limits_a_tenant_where_it_has_the_controller() {
    let before = Inventory::take();
    let config = "/tmp/tenant.toml";
    std::fs::write(config, "[tenant]\ncgroup = \"/acme\"\ncpus = 2\nprocesses = 200\n").unwrap();
    {
        let pod = Pod::start("limited", &["--runtime-config-path", config], "sleep 1000");
        let place = format!("/acme/default/{}/machine", pod.id);
        assert_eq!((processes("pids", &place).len(), processes("blkio", &place).len()), (3, 3));
        assert_eq!(shell("cat /sys/fs/cgroup/pids/acme/pids.max /sys/fs/cgroup/cpu/acme/cpu.cfs_quota_us"), "200\n200000");
    }
    std::fs::write(config, "[tenant]\ncgroup = \"/acme\"\nmemory_mib = 512\n").unwrap();
    let refused = run_pod(&["--runtime-config-path", config], &["true"]);
    assert!(refused.stderr.contains("limit the tenant's pods: the host has no cgroups of memory"), "{refused:?}");
    for hierarchy in COUNTING {
        shell(&format!("rmdir /sys/fs/cgroup/{hierarchy}/acme"));
    }
    shell(&format!("rm {config}"));
    assert_nothing_left(&before);
}
