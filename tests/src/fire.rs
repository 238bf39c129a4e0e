//! Lifecycles under fire: calls that race, a guest that hangs, a containerd that dies within calls, a
//! host without processes or memory for a pod. Every call is answered, and nothing stays.

use std::time::{Duration, Instant};

use k8s_cri::v1::{ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest};

use crate::Test;
use crate::cri::{self, Cri, SOCKET};
use crate::ctr::{Pod, host_pid, run, shell};
use crate::host::{Inventory, assert_nothing_left};
use crate::sequences::{CONTAINERS, Random, Shim, execs};

pub const ALONE: &[Test] = &[
    ("calls_that_race_are_all_answered", calls_that_race_are_all_answered),
    ("a_pod_whose_guest_hangs_can_be_removed", a_pod_whose_guest_hangs_can_be_removed),
    ("a_containerd_that_dies_within_calls_leaves_nothing", a_containerd_that_dies_within_calls_leaves_nothing),
    ("a_pod_without_processes_or_memory_dies_alone", a_pod_without_processes_or_memory_dies_alone),
    ("a_pod_that_has_all_the_memory_it_may_have_is_deleted_whole", a_pod_that_has_all_the_memory_it_may_have_is_deleted_whole),
];

const CALLERS: u64 = 4;
const CALLS: usize = 60;

fn calls_that_race_are_all_answered() {
    let before = Inventory::take();
    {
        let pod = Pod::start("raced", &[], "exec sleep 1000");
        let first = Shim::connect(&pod);
        std::thread::scope(|scope| {
            for caller in 1..=CALLERS {
                let mut shim = Shim::connect(&pod);
                scope.spawn(move || {
                    let mut random = Random(caller);
                    // Each is answered in time or panics; what the answer is depends on who was first.
                    (0..CALLS).for_each(|_| shim.any_call(&mut random));
                });
            }
        });
        let mut shim = first;
        for id in (0..CONTAINERS).map(|number| format!("seq-{number}")) {
            // Whatever it is in, it can be ended; a paused one dies, too.
            let _ = shim.kill(&id);
            for exec in execs() {
                let _ = shim.delete(&id, &exec);
            }
            let start = Instant::now();
            while shim.exists(&id) {
                let _ = shim.delete(&id, "");
                assert!(start.elapsed() < Duration::from_secs(30), "{id} cannot be deleted");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        assert_eq!(pod.exec(&[], &["echo", "well"]).stdout, "well\n");
    }
    shell("rm -rf /tmp/sequences");
    assert_nothing_left(&before);
}

fn a_pod_whose_guest_hangs_can_be_removed() {
    let before = Inventory::take();
    {
        let mut pod = cri::Pod::start(|_| ());
        pod.run("runs", "sleep 1000", |_| ());
        shell(&format!("kill -STOP {}", host_pid(&pod.id, "vmm")));
        let start = Instant::now();
        std::thread::scope(|scope| {
            let (id, config) = (pod.id.clone(), pod.config.clone());
            scope.spawn(move || {
                let mut hangs = std::mem::ManuallyDrop::new(cri::Pod { cri: Cri::connect(SOCKET), config, id });
                let _ = hangs.create("hangs", "true", |_| ());
            });
            std::thread::sleep(Duration::from_secs(1));
            let mut cri = Cri::connect(SOCKET);
            let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
            // The first may say what it did not get; kubelet asks again.
            if cri.call(|client| client.stop_pod_sandbox(stop.clone())).is_err() {
                cri.call(|client| client.stop_pod_sandbox(stop)).unwrap();
            }
            for _ in 0..2 {
                let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
                cri.call(|client| client.remove_pod_sandbox(remove)).unwrap();
            }
        });
        assert!(start.elapsed() < Duration::from_secs(120), "it took {:?}", start.elapsed());
    }
    assert_nothing_left(&before);
}

/// One pod's life, as far as it goes.
fn live() {
    let Ok(pod) = cri::Pod::try_start(|_| ()) else { return };
    // What containerd does not do any more the caller of this does.
    let mut pod = std::mem::ManuallyDrop::new(pod);
    let Ok(container) = pod.create("lives", "sleep 1000", |_| ()) else { return };
    if pod.try_run(&container).is_ok() {
        let _ = pod.exec_within(&container, "echo lives", 60);
    }
}

fn a_containerd_that_dies_within_calls_leaves_nothing() {
    let before = Inventory::take();
    // Within the start of the shim, the boot, the container's creation, its start and its exec, more or less.
    for delay in [300, 900, 1800, 3000, 4500, 6000] {
        std::thread::scope(|scope| {
            scope.spawn(live);
            std::thread::sleep(Duration::from_millis(delay));
            shell("kill -9 $(cat /run/containerd.pid)");
        });
        assert_eq!(run("/usr/lib/node/containerd.sh", &[]).code, 0);
    }
    let mut cri = Cri::connect(SOCKET);
    let pods = cri.call(|client| client.list_pod_sandbox(ListPodSandboxRequest::default())).unwrap().items;
    for pod in pods {
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        cri.call(|client| client.stop_pod_sandbox(stop)).unwrap();
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.id };
        cri.call(|client| client.remove_pod_sandbox(remove)).unwrap();
    }
    // Network namespaces of pods that containerd forgot are its own to find.
    assert_nothing_left(&before.with_mounts_below("/run/netns"));
}

fn a_pod_that_has_all_the_memory_it_may_have_is_deleted_whole() {
    let before = Inventory::take();
    {
        let pod = Pod::start("full", &["--cgroup", "/pods/full"], "dd if=/dev/zero of=/dev/null bs=64M count=1; exec sleep 1000");
        let containerd = shell("pgrep -x containerd | head -n 1");
        // Nothing more is to be had from now on, and the shim is one of those who ask.
        shell("cd /sys/fs/cgroup/pods/full && echo 0 > memory.swap.max; cat memory.current > memory.max");
        run("ctr", &["task", "delete", "--force", &pod.id]);
        assert_eq!(pod.status(), None);
        assert_eq!(shell("pgrep -x containerd | head -n 1"), containerd);
        assert!(!std::path::Path::new("/sys/fs/cgroup/pods/full").exists());
    }
    shell("rmdir /sys/fs/cgroup/pods");
    assert_nothing_left(&before);
}

fn a_pod_without_processes_or_memory_dies_alone() {
    let neighbour = Pod::start("neighbour", &[], "exec sleep 1000");
    let before = Inventory::take();
    for (limit, says) in
        [("pids.max=4", "start the device thread: Resource temporarily unavailable"), ("memory.max=30M", "was killed by SIGKILL")]
    {
        let (file, value) = limit.split_once('=').unwrap();
        shell(&format!("mkdir /sys/fs/cgroup/tight; echo {value} >/sys/fs/cgroup/tight/{file}"));
        let started = cri::Pod::try_start(|config| config.linux.as_mut().unwrap().cgroup_parent = "/tight".into());
        let Err(error) = started else { panic!("a pod was started with {limit}") };
        assert!(error.message().contains(says), "{limit}: {error:?}");
        shell("rmdir /sys/fs/cgroup/tight");
    }
    assert_eq!(neighbour.exec(&[], &["echo", "well"]).stdout, "well\n");
    assert_nothing_left(&before);
}
