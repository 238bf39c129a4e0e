//! What stands on the host for a container: one process each, which signals go to and whose end is the container's.

use crate::Test;
use crate::cri::{self, SLEEP};
use crate::ctr::{Pod, ctr, ctr_ok, run, shell};
use crate::host::eventually;

pub const TESTS: &[Test] = &[
    ("what_stands_for_a_container_has_no_rights", what_stands_for_a_container_has_no_rights),
    ("a_signal_to_what_stands_for_a_container_is_the_containers", a_signal_to_what_stands_for_a_container_is_the_containers),
    ("each_container_of_a_pod_has_a_process_that_stands_for_it", each_container_of_a_pod_has_a_process_that_stands_for_it),
    (
        "a_shim_shares_its_pods_cgroup_and_leaves_it_when_the_pod_has_ended",
        a_shim_shares_its_pods_cgroup_and_leaves_it_when_the_pod_has_ended,
    ),
    ("a_pod_that_takes_all_processor_time_is_killed_at_once", a_pod_that_takes_all_processor_time_is_killed_at_once),
];

/// Memory that one of these may have, in KiB.
const MOST_MEMORY: u64 = 100;

/// The host's process id of a task.
fn pid(arguments: &[&str], id: &str) -> String {
    let list = ctr_ok(&[arguments, &["task", "ls"]].concat());
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id)).unwrap_or_else(|| panic!("{id} is not in {list}"));
    line.split_whitespace().nth(1).unwrap().to_owned()
}

/// The host's process ids of a pod's containers in Kubernetes' namespace.
fn pid_of_container(id: &str) -> String {
    pid(&["--namespace", "k8s.io"], id)
}

fn what_stands_for_a_container_has_no_rights() {
    let pod = Pod::start("stands", &[], "sleep 1000");
    let pid = pid(&[], &pod.id);
    assert_ne!(pid, pod.host_pid("vmm").to_string());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {status}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("Name:"), "caisson-stand-i");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!([field("NoNewPrivs:"), field("Seccomp:"), field("Threads:"), field("Groups:")], ["1", "2", "1", ""]);
    let user = field("Uid:");
    assert!(user.split(' ').all(|id| id == user.split(' ').next().unwrap() && id != "0"), "{user}");
    // It is the first process of its own namespace, leads its own session and group, and is killed by no group's signal.
    assert_eq!([field("NSpid:"), field("NSsid:"), field("NSpgid:")], [format!("{pid} 1"), format!("{pid} 1"), format!("{pid} 1")]);
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let link = |of: &str| shell(&format!("readlink /proc/{of}/ns/{namespace}"));
        assert_ne!(link(&pid), link("self"), "{namespace}");
    }
    assert_eq!(
        shell(&format!("ls -A /proc/{pid}/root; ls /proc/{pid}/root/proc | grep '^[0-9]'; ls /proc/{pid}/fd | wc -l")),
        "proc\n1\n5"
    );
    assert!(shell(&format!("touch /proc/{pid}/root/file 2>&1; :")).contains("Read-only file system"));
    let memory = shell(&format!("grep ^Pss: /proc/{pid}/smaps_rollup | tr -dc 0-9"));
    assert!(memory.parse::<u64>().unwrap() <= MOST_MEMORY, "{memory} KiB");
    // Nothing of the guest's is taken for a process of the host.
    let listed = ctr_ok(&["task", "ps", &pod.id]);
    assert_eq!(listed.lines().skip(1).map(|line| line.split_whitespace().next().unwrap()).collect::<Vec<_>>(), [pid.as_str()]);
}

fn a_signal_to_what_stands_for_a_container_is_the_containers() {
    // By itself, by a signal that it has a use for, and killed: the container's code is that of the process.
    for (signal, code) in [("TERM", 7), ("USR1", 8), ("KILL", 137)] {
        let pod = Pod::start("signal", &[], "trap 'exit 7' TERM; trap 'exit 8' USR1; touch /trapped; while :; do sleep 0.1; done");
        eventually(|| pod.exec(&[], &["ls", "/trapped"]).code == 0, "the container does not run");
        let (pid, shim) = (pid(&[], &pod.id), pod.host_pid("shim"));
        shell(&format!("kill -{signal} {pid}"));
        pod.wait_for("STOPPED");
        // The shim is there to be asked.
        assert_eq!((run("kill", &["-0", &shim.to_string()]).code, pod.delete()), (0, code), "{signal}");
        eventually(|| !std::path::Path::new(&format!("/proc/{pid}")).exists(), "what stood for the container is still there");
    }
}

fn each_container_of_a_pod_has_a_process_that_stands_for_it() {
    let mut pod = cri::Pod::start(|_| ());
    let (one, other) = (pod.run("one", SLEEP, |_| ()), pod.run("other", SLEEP, |_| ()));
    let [sandbox, first, second] = [pod.id.clone(), one.clone(), other.clone()].map(|id| pid_of_container(&id));
    assert!(sandbox != first && first != second && sandbox != second);
    for pid in [&sandbox, &first, &second] {
        assert_eq!(
            shell(&format!("readlink /proc/{pid}/exe; grep CapEff /proc/{pid}/status")),
            "/usr/libexec/caisson/caisson-stand-in\nCapEff:\t0000000000000000"
        );
        // Who looks for the pod's network by any of them finds it.
        let network = |pid: &str| shell(&format!("readlink /proc/{pid}/ns/net"));
        assert_eq!(network(pid), network(&sandbox));
        assert_ne!(network(pid), network("self"));
    }
    // The death of one is that of its container.
    shell(&format!("kill -9 {first}"));
    assert_eq!((pod.wait_for_exit(&one), pod.output(&other, "echo lives")), (137, "lives".into()));
}

fn a_shim_shares_its_pods_cgroup_and_leaves_it_when_the_pod_has_ended() {
    let pod = Pod::start("leaf", &["--cgroup", "/pods/leaf"], "trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let (shim, monitor) = (pod.host_pid("shim"), pod.host_pid("vmm"));
    let cgroup = |pid: &str| shell(&format!("cut -d : -f 3 /proc/{pid}/cgroup"));
    assert_eq!((cgroup(&shim.to_string()), cgroup(&monitor.to_string())), ("/pods/leaf/shim".into(), "/pods/leaf/machine".into()));
    assert_eq!(cgroup(&pid(&[], &pod.id)), "/pods/leaf/machine");
    assert_eq!(shell("cd /sys/fs/cgroup/pods/leaf; cat shim/cpu.weight machine/cpu.weight shim/memory.low"), "10000\n100\n16777216");
    assert_eq!(shell(&format!("cat /proc/{shim}/oom_score_adj")), "-998");
    assert_eq!(ctr(&["task", "kill", &pod.id]).code, 0);
    pod.wait_for("STOPPED");
    assert_eq!(cgroup(&shim.to_string()), "/caisson");
    // As kubelet does with a pod that has ended.
    shell("for pid in $(cat /sys/fs/cgroup/pods/leaf/cgroup.procs /sys/fs/cgroup/pods/leaf/*/cgroup.procs); do kill -9 $pid; done; :");
    assert_eq!(pod.delete(), 0);
    eventually(|| !std::path::Path::new("/sys/fs/cgroup/pods/leaf").exists(), "the pod's cgroup is still there");
}

fn a_pod_that_takes_all_processor_time_is_killed_at_once() {
    let pod = Pod::start("spins", &["--cgroup", "/pods/spins"], "while :; do :; done & while :; do :; done");
    shell("echo 5000 100000 > /sys/fs/cgroup/pods/spins/cpu.max; sleep 2");
    let took = shell(&format!(
        "begin=$(date +%s%N); ctr task delete --force {0} > /dev/null 2>&1; echo $((($(date +%s%N) - begin) / 1000000))",
        pod.id
    ));
    // Two seconds on hardware, where containerd's own commands take none of it.
    assert!(took.parse::<u64>().unwrap() < 10_000, "{took} ms");
    assert!(!run("caisson", &["list", "--json"]).stdout.contains(&pod.id), "the pod is still there");
}
