//! Pods through the CRI: what happens to containers that fail, starve, or ask for what only the host has.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_cri::v1::{
    ContainerConfig, ContainerState, ContainerStatsRequest, ExecSyncRequest, IdMapping, Int64Value, LinuxContainerResources, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxState, PodSandboxStatsRequest, PodSandboxStatusRequest,
    RemoveContainerRequest, ReopenContainerLogRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    SupplementalGroupsPolicy, UserNamespace,
};

use crate::Test;
use crate::containerd::CriContainerd;
use crate::cri::{Pod, SLEEP, security};
use crate::ctr::{self, id, run, shell};
use crate::faults::{Config, Replaced};
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const TESTS: &[Test] = &[
    ("huge_pages_are_set_aside_and_shared_by_a_pods_containers", huge_pages_are_set_aside_and_shared_by_a_pods_containers),
    ("a_pods_counters_are_reported", a_pods_counters_are_reported),
    ("a_log_that_is_rotated_goes_on_in_a_new_file", a_log_that_is_rotated_goes_on_in_a_new_file),
    ("a_container_out_of_memory_is_said_to_be", a_container_out_of_memory_is_said_to_be),
    ("a_missing_program_fails_a_containers_start", a_missing_program_fails_a_containers_start),
    ("sysctls_groups_and_ranks_for_want_of_memory_are_as_asked", sysctls_groups_and_ranks_for_want_of_memory_are_as_asked),
    ("limits_on_what_only_the_host_has_are_passed_over", limits_on_what_only_the_host_has_are_passed_over),
];

pub const ALONE: &[Test] = &[
    ("the_shim_makes_a_pods_sandbox_for_containerd_2", the_shim_makes_a_pods_sandbox_for_containerd_2),
    (
        "a_pod_is_removed_though_kubelet_has_killed_what_was_in_its_cgroup",
        a_pod_is_removed_though_kubelet_has_killed_what_was_in_its_cgroup,
    ),
    ("pods_of_older_containerds_are_the_same", pods_of_older_containerds_are_the_same),
    ("root_of_a_pod_with_users_of_its_own_is_nobody_outside", root_of_a_pod_with_users_of_its_own_is_nobody_outside),
    ("systemd_makes_the_scope_that_its_driver_asks_for", systemd_makes_the_scope_that_its_driver_asks_for),
];

/// kubelet makes the cgroup of a pod and stops what is in the pod. Then it kills whatever is left in the cgroup, and asks for the
/// pod's removal.
fn a_pod_is_removed_though_kubelet_has_killed_what_was_in_its_cgroup() {
    let _containerd = CriContainerd::start("2");
    let before = Inventory::take();
    for handler in ["caisson", "caisson-sandboxer"] {
        shell("mkdir /sys/fs/cgroup/kubepods-pod1");
        let in_cgroup = |config: &mut PodSandboxConfig| config.linux.as_mut().unwrap().cgroup_parent = "/kubepods-pod1".into();
        let mut pod = Pod::start_with(CriContainerd::SOCKET, handler, in_cgroup).unwrap();
        let container = pod.run("one", SLEEP, |_| ());
        let shim = ctr::host_pid(&pod.id, "shim");
        let stop = StopContainerRequest { container_id: container.clone(), timeout: 5 };
        pod.cri.call(|client| client.stop_container(stop)).unwrap();
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        pod.cri.call(|client| client.stop_pod_sandbox(stop)).unwrap();
        shell("find /sys/fs/cgroup/kubepods-pod1 -name cgroup.procs -exec cat {} + | xargs -r kill -9; sleep 0.5");
        // containerd has the shim of a sandbox until the end, and that of a pause container until it has stopped.
        let lives = std::path::Path::new(&format!("/proc/{shim}")).exists();
        assert_eq!(lives, handler == "caisson-sandboxer", "{handler}");
        let remove = RemoveContainerRequest { container_id: container };
        pod.cri.call(|client| client.remove_container(remove)).unwrap();
        drop(pod);
        shell("rmdir /sys/fs/cgroup/kubepods-pod1");
        assert_nothing_left(&before);
    }
}

fn a_container_out_of_memory_is_said_to_be() {
    let mut pod = Pod::start(|_| ());
    let limits = LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..LinuxContainerResources::default() };
    // tail keeps all of what is one line, and there is no end of it.
    let container = pod.run("hungry", "exec tail /dev/zero", |config| config.linux.as_mut().unwrap().resources = Some(limits));
    assert_eq!(pod.wait_for_exit(&container), 137);
    // The reason is an event of its own; kubelet looks at the status when it hears of the exit.
    let status = pod.status(&container);
    assert_eq!(status.reason, "OOMKilled", "{status:?}");
}

fn a_missing_program_fails_a_containers_start() {
    let mut pod = Pod::start(|_| ());
    let container = pod.create("missing", "", |config| config.command = vec!["no-such-program".into()]).unwrap();
    let start = StartContainerRequest { container_id: container.clone() };
    let error = pod.cri.call(|client| client.start_container(start)).unwrap_err();
    assert!(error.message().contains("exec no-such-program") && error.message().contains("not found in $PATH"), "{error:?}");
    assert_eq!(pod.status(&container).state(), ContainerState::ContainerExited);
    let other = pod.run("other", SLEEP, |_| ());
    let exec = ExecSyncRequest { container_id: other, cmd: vec!["/no/such/program".into()], timeout: 30 };
    let begin = Instant::now();
    let error = pod.cri.call(|client| client.exec_sync(exec)).unwrap_err();
    assert!(error.message().contains("exec /no/such/program: No such file"), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(20));
}

fn sysctls_groups_and_ranks_for_want_of_memory_are_as_asked() {
    let mut pod = Pod::start(|config| {
        let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
        sysctls.insert("kernel.msgmax".into(), "9999".into());
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "555".into());
        sysctls.insert("fs.mqueue.msg_max".into(), "100".into());
    });
    // The image has root in a group besides: that counts, or only what was asked for does.
    for (policy, groups) in [(SupplementalGroupsPolicy::Merge, "0 10 3456"), (SupplementalGroupsPolicy::Strict, "0 3456")] {
        let container = pod.run(policy.as_str_name(), SLEEP, |config| {
            config.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 321;
            let context = security(config);
            context.run_as_user = Some(Int64Value { value: 0 });
            context.supplemental_groups = vec![3456];
            context.supplemental_groups_policy = policy.into();
        });
        assert_eq!(pod.output(&container, "id -G"), groups);
        assert_eq!(pod.output(&container, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj | uniq"), "321");
        let sysctls = "cat /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max /proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(pod.output(&container, sysctls), "9999\n100\n555");
    }
}

fn limits_on_what_only_the_host_has_are_passed_over() {
    let mut pod = Pod::start(|_| ());
    let huge = |size: &str| (format!("hugetlb.{size}.max"), "0".to_owned());
    let limits = LinuxContainerResources {
        cpuset_cpus: "61-62".into(),
        cpuset_mems: "7".into(),
        unified: HashMap::from([huge("64KB"), huge("2MB")]),
        ..LinuxContainerResources::default()
    };
    let container = pod.run("pinned", SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits));
    assert_eq!(pod.output(&container, "cat /sys/fs/cgroup/hugetlb.2MB.max"), "0");
    assert_eq!(pod.output(&container, "cat /sys/fs/cgroup/cpuset.cpus"), "");
}

fn the_shim_makes_a_pods_sandbox_for_containerd_2() {
    let _containerd = CriContainerd::start("2");
    let before = Inventory::take();
    let start = |change: fn(&mut PodSandboxConfig)| Pod::start_with(CriContainerd::SOCKET, "caisson-sandboxer", change).unwrap();
    {
        let mut pod = start(|config| {
            let dns = config.dns_config.get_or_insert_default();
            (dns.servers, dns.searches) = (vec!["10.9.8.7".into()], vec!["pods.local".into()]);
            let linux = config.linux.as_mut().unwrap();
            linux.sysctls.insert("kernel.msgmax".into(), "9999".into());
            linux.security_context.as_mut().unwrap().namespace_options =
                Some(NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() });
        });
        let (one, two) = (pod.run("one", SLEEP, |_| ()), pod.run("two", SLEEP, |_| ()));
        assert_eq!(pod.output(&one, "hostname; cat /etc/hostname"), "the-pod\nthe-pod");
        assert_eq!(pod.output(&one, "cat /etc/resolv.conf"), "search pods.local\nnameserver 10.9.8.7");
        assert_eq!(pod.output(&one, "cat /proc/sys/kernel/msgmax"), "9999");
        pod.output(&one, "echo shared > /dev/shm/file; echo 127.0.0.1 added >> /etc/hosts");
        assert_eq!(pod.output(&two, "cat /dev/shm/file; grep -c added /etc/hosts"), "shared\n1");
        assert!(pod.output(&two, "ps -o args").matches("sleep 1000").count() >= 2);
        assert!(pod.output(&two, "ip addr show dev eth0").contains("inet "));
        // Its own process namespace beside the pod's.
        let own = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
        let apart = pod.run("apart", SLEEP, |config| security(config).namespace_options = Some(own));
        assert!(pod.output(&apart, "ps -o args").matches("sleep 1000").count() <= 2);
        pod.remove(&apart);
        let status = |pod: &mut Pod| {
            let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
            pod.cri.call(|client| client.pod_sandbox_status(request)).unwrap().status.unwrap().state()
        };
        assert_eq!(status(&mut pod), PodSandboxState::SandboxReady);
        for _ in 0..2 {
            let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
            pod.cri.call(|client| client.stop_pod_sandbox(stop)).unwrap();
        }
        assert_eq!(status(&mut pod), PodSandboxState::SandboxNotready);
        assert_eq!(pod.wait_for_exit(&one), 137);
    }
    assert_nothing_left(&before);
    // A machine that dies is a sandbox that ended.
    let mut pod = start(|_| ());
    let container = pod.run("doomed", SLEEP, |_| ());
    run("pkill", &["-9", "-x", "caisson-vmm"]);
    assert_eq!(pod.wait_for_exit(&container), 137);
    let begin = Instant::now();
    loop {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let state = pod.cri.call(|client| client.pod_sandbox_status(request)).unwrap().status.unwrap().state();
        if state == PodSandboxState::SandboxNotready {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "the sandbox is still said to be ready");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(pod);
    assert_nothing_left(&before);
}

fn pods_of_older_containerds_are_the_same() {
    for version in ["1.6", "1.7"] {
        let _containerd = CriContainerd::start(version);
        let before = Inventory::take();
        {
            let mut pod = Pod::start_with(CriContainerd::SOCKET, "caisson", |_| ()).unwrap();
            let limits = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..LinuxContainerResources::default() };
            let one = pod.run("one", SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits));
            let two = pod.run("two", "echo said; exit 7", |_| ());
            assert_eq!(pod.output(&one, "hostname; df -k /dev/shm | tail -n 1 | awk '{print $2}'"), "the-pod\n65536", "{version}");
            assert_eq!(
                pod.output(&one, "cat /sys/fs/cgroup/memory.max; ip addr show dev eth0 | grep -c 'inet '"),
                "67108864\n1",
                "{version}"
            );
            assert_eq!(pod.wait_for_exit(&two), 7, "{version}");
            let log = std::fs::read_to_string(format!("{}/two.log", pod.config.log_directory)).unwrap();
            assert!(log.ends_with(" stdout F said\n"), "{version}: {log}");
            let error = pod.exec_within(&one, "sleep 1000", 2).unwrap_err();
            assert!(error.message().contains("timeout"), "{version}: {error:?}");
            let request = ContainerStatsRequest { container_id: one.clone() };
            let stats = pod.cri.call(|client| client.container_stats(request)).unwrap().stats.unwrap();
            assert!(stats.memory.is_some_and(|memory| memory.working_set_bytes.unwrap().value > 0), "{version}");
            pod.remove(&two);
        }
        assert_nothing_left(&before);
    }
}

fn root_of_a_pod_with_users_of_its_own_is_nobody_outside() {
    const FIRST: u32 = 131_072;
    let _containerd = CriContainerd::start("2");
    let folder = format!("/tmp/c2s/{}", id("volume"));
    shell(&format!("mkdir -p {folder} && chown 0:0 {folder} && echo before > {folder}/old && chmod 0600 {folder}/old"));
    for handler in ["caisson", "caisson-sandboxer"] {
        let map = || vec![IdMapping { host_id: FIRST, container_id: 0, length: 65536 }];
        let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: map(), gids: map() };
        let namespaces =
            NamespaceOption { pid: NamespaceMode::Container.into(), userns_options: Some(users), ..NamespaceOption::default() };
        let mut pod = Pod::start_with(CriContainerd::SOCKET, handler, |config| {
            config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(namespaces.clone());
        })
        .unwrap();
        let volume = Mount {
            container_path: "/data".into(),
            host_path: folder.clone(),
            uid_mappings: map(),
            gid_mappings: map(),
            ..Mount::default()
        };
        let container = pod.run("mapped", SLEEP, |config| config.mounts = vec![volume]);
        assert_eq!(pod.output(&container, "tr -s ' ' < /proc/self/uid_map"), format!("0 {FIRST} 65536"), "{handler}");
        assert_eq!(pod.output(&container, "id -u; touch /made && stat -c %u:%g /made /bin/busybox"), "0\n0:0\n0:0", "{handler}");
        // Streams are its own to open again.
        pod.output(&container, "echo x > /proc/self/fd/1; echo y > /dev/stderr");
        // Its root is the volume's, on disk as in the pod, and the image's.
        pod.output(&container, &format!("cat /data/old && echo after > /data/{handler} && chown 7:8 /data/{handler}"));
        assert_eq!(shell(&format!("stat -c %u:%g {folder}/{handler}")), "7:8", "{handler}");
        // A second container is in the same namespace, and so is an exec; it owns nothing of the guest.
        let second = pod.run("second", SLEEP, |_| ());
        let link = "readlink /proc/self/ns/user";
        assert_eq!(pod.output(&container, link), pod.output(&second, link), "{handler}");
        for forbidden in ["echo 1 > /proc/sys/kernel/panic", "mknod /tmp/sda b 8 0", "mount -o remount,rw /sys"] {
            assert_ne!(pod.exec(&container, forbidden).exit_code, 0, "{handler}: {forbidden}");
        }
    }
}

fn huge_pages_are_set_aside_and_shared_by_a_pods_containers() {
    const VOLUME: &str = "/tmp/huge-pages";
    shell(&format!("mkdir -p {VOLUME} && mount -t hugetlbfs none {VOLUME}"));
    {
        let mut pod = Pod::start(|_| ());
        let with_pages = |mib: u64| {
            move |config: &mut ContainerConfig| {
                // containerd passes hugepage_limits on only when its configuration says so.
                let limit = ("hugetlb.2MB.max".to_owned(), (mib << 20).to_string());
                config.linux.as_mut().unwrap().resources.as_mut().unwrap().unified = HashMap::from([limit]);
                config.mounts = vec![Mount { container_path: "/huge".into(), host_path: VOLUME.into(), ..Mount::default() }];
            }
        };
        let first = pod.run("first", "sleep 1000", with_pages(16));
        let total = |pod: &mut Pod, container: &str| pod.output(container, "awk '/HugePages_Total/ {print $2}' /proc/meminfo");
        assert_eq!(total(&mut pod, &first), "8");
        pod.output(&first, "fallocate -l 8M /huge/shared");
        assert_ne!(pod.exec(&first, "fallocate -l 32M /huge/more || { rm /huge/more; false; }").exit_code, 0);
        let second = pod.run("second", "sleep 1000", with_pages(4));
        assert_eq!((total(&mut pod, &second), pod.output(&second, "ls /huge")), ("10".into(), "shared".into()));
        pod.remove(&first);
        pod.output(&second, "rm -f /huge/*");
        assert_eq!(shell(&format!("ls {VOLUME}")), "");
    }
    shell(&format!("umount {VOLUME} && rmdir {VOLUME}"));
}

fn a_pods_counters_are_reported() {
    let mut pod = Pod::start(|config| config.linux.as_mut().unwrap().cgroup_parent = "/counted".into());
    pod.run("counted", "while :; do :; done", |_| ());
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = pod.cri.call(|client| client.pod_sandbox_stats(request)).unwrap().stats.unwrap().linux.unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 1 << 20);
    assert_eq!(stats.containers.len(), 1);
    let network = stats.network.unwrap().default_interface.unwrap();
    assert_eq!(network.name, "eth0");
}

fn a_log_that_is_rotated_goes_on_in_a_new_file() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("rotated", "while :; do echo tick; sleep 0.2; done", |_| ());
    let log = format!("{}/rotated.log", pod.config.log_directory);
    let ticks = |path: &str| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    eventually(|| ticks(&log) > 2, "the first log stays empty");
    std::fs::rename(&log, format!("{log}.1")).unwrap();
    let request = ReopenContainerLogRequest { container_id: container };
    pod.cri.call(|client| client.reopen_container_log(request)).unwrap();
    eventually(|| ticks(&log) > 2, "the second log stays empty");
}

/// Does what systemd does with the call that makes a scope, and what it was asked is kept. The node has no systemd.
const BUSCTL: &str = r#"#!/bin/bash
[ ! -e /tmp/busctl.said ] || [ -e /tmp/busctl.refuses ] || { echo "Call failed: Unit $9 was already loaded." >&2; exit 1; }
echo "$*" >/tmp/busctl.said
[ ! -e /tmp/busctl.refuses ] || { echo "Call failed: Unit is masked." >&2; exit 1; }
mkdir -p /sys/fs/cgroup/tenant.slice/tenant-a.slice/$9
said="$*"; pids=${said#*PIDs au [0-9]* }
( sleep 0.3; for pid in ${pids% 0}; do echo $pid >/sys/fs/cgroup/tenant.slice/tenant-a.slice/$9/cgroup.procs; done ) >/dev/null 2>&1 &
"#;

fn systemd_makes_the_scope_that_its_driver_asks_for() {
    let before = Inventory::take();
    shell("touch -a /usr/bin/busctl; chmod 755 /usr/bin/busctl; mkdir -p /run/systemd/system");
    let systemd = Replaced::with("/usr/bin/busctl", Some(BUSCTL.as_bytes()));
    {
        // One process more comes when the scope is there.
        let _settings = Config::set("[network]\ndefault = \"user\"\n");
        let pod = ctr::Pod::start("scoped", &["--cgroup", "tenant-a.slice:cri-containerd:one"], "sleep 1000");
        let (vmm, fs, shim) = (pod.host_pid("vmm"), pod.host_pid("fs"), pod.host_pid("shim"));
        let properties =
            "Description s Caisson pod Slice s tenant-a.slice Delegate b true CollectMode s inactive-or-failed DefaultDependencies b false";
        assert_eq!(
            std::fs::read_to_string("/tmp/busctl.said").unwrap(),
            format!(
                "--system --quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager \
                 StartTransientUnit ssa(sv)a(sa(sv)) cri-containerd-one.scope fail 6 {properties} PIDs au 3 {vmm} {fs} {shim} 0\n"
            )
        );
        for (pid, leaf) in [(vmm, "machine"), (fs, "machine"), (pod.host_pid("network"), "machine"), (shim, "shim")] {
            let place = format!("0::/tenant.slice/tenant-a.slice/cri-containerd-one.scope/{leaf}");
            assert_eq!(shell(&format!("cat /proc/{pid}/cgroup")), place);
        }
    }
    shell("touch /tmp/busctl.refuses");
    let refused = ctr::run_pod(&["--cgroup", "tenant-a.slice:cri-containerd:two"], &["true"]);
    assert!(refused.stderr.contains("start scope cri-containerd-two.scope: systemd says \"Call failed: Unit is masked.\""), "{refused:?}");
    drop(systemd);
    shell("rm /tmp/busctl.*; rmdir /run/systemd/system /sys/fs/cgroup/tenant.slice/tenant-a.slice /sys/fs/cgroup/tenant.slice");
    assert_nothing_left(&before);
}
