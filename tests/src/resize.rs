//! Machines that become larger and smaller while they run.

use std::os::unix::fs::MetadataExt;

use k8s_cri::v1::{LinuxContainerResources, UpdateContainerResourcesRequest};

use crate::Test;
use crate::cri::Pod;
use crate::ctr::{host_pid, record};
use crate::host::eventually;

pub const TESTS: &[Test] = &[
    ("a_machine_grows_with_its_containers_limits_and_shrinks_again", a_machine_grows_with_its_containers_limits_and_shrinks_again),
    ("a_container_that_comes_later_finds_its_memory", a_container_that_comes_later_finds_its_memory),
    ("memory_that_a_container_frees_is_the_hosts_again", memory_that_a_container_frees_is_the_hosts_again),
];

const SLEEP: &str = "sleep 1000";
/// The VMM's file of memory that the machine has from its start, and of that which is added.
const MEMORY: &str = "guest-memory";
const ADDED: &str = "added-memory";

fn limits(mib: i64, cpus: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        memory_limit_in_bytes: mib << 20,
        ..LinuxContainerResources::default()
    }
}

fn update(pod: &mut Pod, container: &str, resources: LinuxContainerResources) {
    let request = UpdateContainerResourcesRequest {
        container_id: container.into(),
        linux: Some(resources),
        ..UpdateContainerResourcesRequest::default()
    };
    pod.cri.call(|client| client.update_container_resources(request)).unwrap();
}

/// CPUs and MiB of memory that a container sees.
fn size(pod: &mut Pod, container: &str) -> (u64, u64) {
    let seen = pod.output(container, "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo");
    let numbers: Vec<u64> = seen.lines().map(|line| line.parse().unwrap()).collect();
    (numbers[0], numbers[1])
}

/// Size of one of the VMM's files in memory, and how much of it is there, in MiB.
fn file_of(pod: &Pod, name: &str) -> (u64, u64) {
    let folder = format!("/proc/{}/fd", host_pid(&pod.id, "vmm"));
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &std::path::PathBuf| std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains(name));
    let file = std::fs::metadata(entries.into_iter().find(is_it).unwrap()).unwrap();
    (file.size() >> 20, (file.blocks() * 512) >> 20)
}

fn a_machine_grows_with_its_containers_limits_and_shrinks_again() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("grows", SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits(100, 1)));
    let (cpus, before) = size(&mut pod, &container);
    assert_eq!((cpus, file_of(&pod, ADDED)), (1, (0, 0)));

    update(&mut pod, &container, limits(600, 2));
    let (cpus, after) = size(&mut pod, &container);
    assert_eq!((cpus, after - before), (2, 600 + 96 - 256));
    let listed = record(&pod.id);
    assert_eq!((listed["vcpus"].as_u64(), listed["memory_mib"].as_u64()), (Some(2), Some(696)));
    // Both are worth something: a program has more than there was, and two run at once.
    pod.output(&container, "dd if=/dev/zero of=/dev/null bs=400M count=1");
    pod.output(&container, "taskset 2 true");
    assert!(file_of(&pod, ADDED).1 > 200, "{:?}", file_of(&pod, ADDED));

    update(&mut pod, &container, limits(100, 1));
    assert_eq!(size(&mut pod, &container).0, 1);
    eventually(|| size(&mut pod, &container).1 == before, "the guest keeps its memory");
    eventually(|| file_of(&pod, ADDED) == (0, 0), "the host keeps its memory");

    // And once more, as if nothing had been.
    update(&mut pod, &container, limits(400, 2));
    assert_eq!(size(&mut pod, &container), (2, before + 240));
}

fn a_container_that_comes_later_finds_its_memory() {
    let mut pod = Pod::start(|_| ());
    let first = pod.run("first", SLEEP, |_| ());
    let (_, before) = size(&mut pod, &first);
    let second = pod.run("second", SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits(300, 1)));
    assert_eq!(size(&mut pod, &second).1, before + 300);
    pod.remove(&second);
    eventually(|| size(&mut pod, &first).1 == before, "the guest keeps its memory");
}

fn memory_that_a_container_frees_is_the_hosts_again() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("frees", SLEEP, |_| ());
    pod.output(&container, "dd if=/dev/zero of=/dev/null bs=150M count=1");
    let used = file_of(&pod, MEMORY).1;
    assert!(used > 150, "{used} MiB");
    eventually(|| file_of(&pod, MEMORY).1 < 100, "the host keeps the memory");
}
