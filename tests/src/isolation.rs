//! What a pod's processes on the host may do: no more than they need.

use std::collections::{BTreeMap, BTreeSet};

use crate::Test;
use k8s_cri::v1::{Device, LinuxContainerResources};

use crate::cri;
use crate::ctr::{Pod, ctr_ok, id, run, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const TESTS: &[Test] = &[
    ("a_pods_processes_have_no_rights_that_they_do_not_need", a_pods_processes_have_no_rights_that_they_do_not_need),
    ("whoever_takes_a_file_server_over_reaches_nothing_but_the_share", whoever_takes_a_file_server_over_reaches_nothing_but_the_share),
    ("a_guest_reaches_no_register_that_counts_or_traces", a_guest_reaches_no_register_that_counts_or_traces),
    ("whoever_takes_a_monitor_over_can_do_nothing_with_it", whoever_takes_a_monitor_over_can_do_nothing_with_it),
];

pub const ALONE: &[Test] = &[
    ("a_pod_that_does_its_worst_keeps_its_bounds_and_can_be_killed", a_pod_that_does_its_worst_keeps_its_bounds_and_can_be_killed),
    ("what_a_monitor_may_ask_of_the_kernel_is_what_it_asks", what_a_monitor_may_ask_of_the_kernel_is_what_it_asks),
    ("check_security_tells_a_process_that_is_held_from_one_that_is_not", check_security_tells_a_process_that_is_held_from_one_that_is_not),
];

/// What a process of the host may hold of its own memory, whatever its pod does, in KiB.
const MOST_MEMORY: u64 = 64 << 10;

/// Numbers of capabilities (capabilities(7)).
const SYS_ADMIN: u32 = 21;
const DANGEROUS: [(&str, u32); 5] = [("NET_RAW", 13), ("SYS_MODULE", 16), ("SYS_RAWIO", 17), ("SYS_BOOT", 22), ("SYS_TIME", 25)];

/// A field of a process's status.
pub fn status(pid: u32, field: &str) -> String {
    shell(&format!("sed -n 's/^{field}:\\s*//p' /proc/{pid}/status"))
}

/// Every thread's capabilities, in effect or to be had.
fn capabilities(pid: u32) -> u64 {
    let all = shell(&format!("cat /proc/{pid}/task/*/status | sed -n -E 's/^Cap(Eff|Prm|Inh|Bnd|Amb):\\s*//p'"));
    all.lines().fold(0, |sum, line| sum | u64::from_str_radix(line, 16).unwrap())
}

fn a_pods_processes_have_no_rights_that_they_do_not_need() {
    let pod = Pod::start("rights", &[], "sleep 1000");
    let (shim, vmm, fs) = (pod.host_pid("shim"), pod.host_pid("vmm"), pod.host_pid("fs"));
    let has = |pid, capability: u32| capabilities(pid) & (1 << capability) != 0;
    assert!(has(shim, SYS_ADMIN));
    for (name, capability) in DANGEROUS {
        assert!(!has(shim, capability), "the shim has {name}");
    }
    // What it could have is in its own namespace.
    assert_eq!(u64::from_str_radix(&status(vmm, "CapPrm"), 16).unwrap(), 0);
    // chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap
    assert_eq!(capabilities(fs), 0x8800_00db);
    for pid in [shim, vmm, fs] {
        assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), ("1".into(), "2".into()));
    }
    for pid in [vmm, fs] {
        for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let link = |pid: &str| shell(&format!("readlink /proc/{pid}/ns/{namespace}"));
            assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
        }
        let cores = shell(&format!("cat /proc/{pid}/limits | grep 'core file' | tr -s ' '"));
        assert_eq!(cores, "Max core file size 0 0 bytes");
    }
    assert_eq!(shell(&format!("cat /sys/fs/cgroup/default/{}/machine/pids.max", pod.id)), "2048");
    assert_ne!(status(vmm, "Uid").split_whitespace().next(), Some("0"));
    assert_ne!(shell(&format!("readlink /proc/{vmm}/ns/user")), shell("readlink /proc/self/ns/user"));
    // Its root has nothing in it, and nothing can be put there.
    assert_eq!(shell(&format!("ls -A /proc/{vmm}/root/")), "");
    assert!(shell(&format!("touch /proc/{vmm}/root/file 2>&1; :")).contains("Read-only file system"));
    // The share shows files without the folders that keep others of the host from them.
    let folder = format!("/run/caisson/default/{}", pod.id);
    let listed = shell(&format!("setpriv --reuid 65534 --regid 65534 --clear-groups ls {folder} 2>&1; :"));
    assert!(listed.contains("Permission denied"), "{listed}");
    // What is mounted for it is mounted in its server's namespace alone, where nothing else is.
    let mounts = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(!mounts("self").contains(&pod.id), "{}", mounts("self"));
    let share = mounts(&fs.to_string());
    assert!(share.lines().all(|line| line.contains("nosuid,nodev") || line.contains("nodev,nosuid")), "{share}");
    assert!(share.contains(&format!(" /{}/rootfs ", pod.id)) && share.lines().count() < 10, "{share}");
    assert!(shell(&format!("touch /proc/{fs}/root/file 2>&1; :")).contains("Read-only file system"));
}

fn whoever_takes_a_monitor_over_can_do_nothing_with_it() {
    // In the monitor's jail, without a filter and with that of each thread role.
    let attempts = shell(&format!("/share/jail-probe 1500000000 {}", std::process::id()));
    let of = |place: &str| attempts.lines().filter(|line| line.starts_with(&format!("{place}: "))).count();
    assert!(of("jail") >= 10 && ["vcpu", "devices", "disk", "control", "spare"].into_iter().all(|role| of(role) >= 20), "{attempts}");
    let done: Vec<&str> = attempts.lines().filter(|line| !line.contains(": refused, ") && !line.ends_with(": killed")).collect();
    assert!(done.is_empty(), "{done:#?}");
    // That the root folder cannot be looked into is Landlock's doing: it is there, and empty.
    assert!(attempts.contains("jail: open the root folder: refused, Permission denied"), "{attempts}");
    assert!(attempts.contains("jail: connect to an abstract socket: refused, Operation not permitted"), "{attempts}");
}

fn whoever_takes_a_file_server_over_reaches_nothing_but_the_share() {
    // Without ids of the pod's own, and with.
    for ids in ["", "700000"] {
        let attempts = shell(&format!("/share/share-probe {} {ids}", std::process::id()));
        let of = |place: &str| attempts.lines().filter(|line| line.starts_with(&format!("{place}: "))).count();
        assert!(of("jail") >= 30 && of("filter") >= 25, "{attempts}");
        let done: Vec<&str> = attempts.lines().filter(|line| !line.contains(": refused, ") && !line.ends_with(": killed")).collect();
        assert!(done.is_empty(), "{done:#?}");
    }
}

fn a_guest_reaches_no_register_that_counts_or_traces() {
    let attempts = shell("/share/register-probe");
    let (done, refused): (Vec<&str>, Vec<&str>) = attempts.lines().partition(|line| line.ends_with(": done"));
    assert_eq!(done, ["read 0x10: done", "write 0x10: done"]);
    assert!(refused.len() > 100 && refused.iter().all(|line| line.ends_with(": refused")), "{} {:?}", refused.len(), refused.last());
    assert!(refused.contains(&"rdpmc 0: refused"));
    // Nor does a pod's start leave anything in the host's log, or take a thread of the host's kernel for a clock.
    shell("dmesg --clear");
    let pod = Pod::start("quiet", &[], "grep -c -w -e svm -e vmx /proc/cpuinfo > /virtual; sleep 1000");
    assert_eq!(shell("dmesg | grep -i kvm; ps -e -o comm= | grep kvm-pit; :"), "");
    assert_eq!(pod.exec(&[], &["cat", "/virtual"]).stdout, "0\n");
}

/// System calls that a monitor makes seldom, in which role, and when.
const SELDOM: &[(&str, &[i64], &str)] = &[
    ("any", &[12, 25, 28, 202, 9, 10, 11], "brk, mremap, madvise, futex, mmap, mprotect, munmap: as the allocator and its locks need"),
    ("any", &[15, 219], "rt_sigreturn, restart_syscall: when a signal comes, and when it is over"),
    ("any", &[60, 231], "exit, exit_group: the end of a thread, and of the process"),
    ("any", &[46, 1], "sendmsg, write: the last word to the shim, and a panic's"),
    ("any", &[14, 131], "rt_sigprocmask, sigaltstack: the end of a thread"),
    ("disk", &[72], "fcntl: by which a build for debugging checks what it closes"),
    ("disk", &[221], "fadvise64: while several requests to read wait in a queue"),
    ("disk", &[426], "io_uring_enter: where disks have rings (disk.io_uring)"),
    ("control", &[273, 334], "set_robust_list, rseq: a new thread's first, when nobody knows yet which it is"),
    ("vcpu", &[8], "lseek: how long a file is now that a guest reads where it was mapped, which KVM tells since Linux 6.13"),
    ("spare", &[56, 273, 334, 435], "those, and clone or clone3: for more vCPUs than the node has"),
    (
        "any",
        &[24, 204, 228, 318],
        "sched_yield, sched_getaffinity, clock_gettime, getrandom: the runtime's, where the kernel's page does not have them",
    ),
];

/// Stands in the monitor's place until it is traced: who is started by the shim cannot trace.
const AWAITED: &str = "#!/bin/sh\necho $$ > /tmp/monitor.pid\nuntil [ -e /tmp/monitor.trace ]; do sleep 0.05; done\n\
    exec /usr/libexec/caisson/caisson-vmm \"$@\"\n";

/// Traces the monitor of the next pod from its beginning, each system call with its number.
fn trace_next() -> std::thread::JoinHandle<()> {
    let trace = "rm -f /tmp/monitor.pid /tmp/monitor.trace; until [ -s /tmp/monitor.pid ]; do sleep 0.05; done; \
        exec strace --quiet=all --syscall-number --follow-forks --output=/tmp/monitor.trace --string-limit=40 --attach=$(cat /tmp/monitor.pid)";
    let mut strace = std::process::Command::new("bash").args(["-c", trace]).spawn().unwrap();
    eventually(|| !std::path::Path::new("/tmp/monitor.pid").exists(), "the last trace stays");
    std::thread::spawn(move || {
        strace.wait().unwrap();
    })
}

fn what_a_monitor_may_ask_of_the_kernel_is_what_it_asks() {
    let monitor = "/tmp/awaited-monitor";
    std::fs::write(monitor, AWAITED).unwrap();
    shell(&format!("chmod 755 {monitor}"));
    let image = format!("/tmp/{}", id("disk"));
    let disk = shell(&format!("truncate -s 16M {image} && losetup --find --show {image}"));
    // By the monitor itself, and by the host's kernel.
    let mut traces = String::new();
    for vhost in [false, true] {
        let _settings =
            Config::set(&format!("[vmm]\npath = \"{monitor}\"\n[network]\nvhost = {vhost}\n[vm]\nmax_vcpus = 4\n[fs]\nwindow_mib = 16\n"));
        let strace = trace_next();
        do_all(&disk);
        strace.join().unwrap();
        traces.push_str(&std::fs::read_to_string("/tmp/monitor.trace").unwrap());
    }
    shell(&format!("losetup -d {disk}; rm {image} {monitor} /tmp/monitor.*"));
    let used = calls_by_role(&traces);
    let mut never = BTreeMap::new();
    for list in shell("/share/jail-probe lists").lines() {
        let (role, calls) = list.split_once(' ').unwrap();
        // Who starts a thread may do what that may do: filters add up.
        let started = match role {
            "control" => "disk",
            "spare" => "vcpu",
            role => role,
        };
        let roles = [role, started, "any"];
        let of_role = SELDOM.iter().filter(|(of, ..)| roles.contains(of));
        let seldom: BTreeSet<i64> = of_role.flat_map(|(_, calls, _)| calls.iter().copied()).collect();
        let calls: BTreeSet<i64> = calls.split(' ').map(|call| call.parse().unwrap()).collect();
        let used: BTreeSet<i64> = roles.iter().filter_map(|role| used.get(*role)).flatten().copied().collect();
        let unused: Vec<i64> = calls.difference(&used).filter(|call| !seldom.contains(call)).copied().collect();
        never.insert(role.to_owned(), unused);
    }
    assert!(never.values().all(Vec::is_empty), "allowed and never used: {never:?}");
}

/// The system calls of each role's threads once their filter is in place, out of strace's lines: `PID [NUMBER] CALL(...) = ...`.
/// What a thread does before it has its own it does behind that of who started it.
fn calls_by_role(traces: &str) -> BTreeMap<String, BTreeSet<i64>> {
    let mut used = BTreeMap::<String, BTreeSet<i64>>::new();
    let mut threads = BTreeMap::<String, (String, bool)>::new();
    for line in traces.lines() {
        let mut words = line.split(|char: char| char.is_whitespace() || "[]".contains(char)).filter(|word| !word.is_empty());
        let (Some(thread), Some(Ok(call))) = (words.next(), words.next().map(str::parse::<i64>)) else { continue };
        let (name, filtered) = threads.entry(thread.to_owned()).or_insert_with(|| ("control".into(), false));
        if let Some(new) = line.split("PR_SET_NAME, \"").nth(1).and_then(|rest| rest.split('"').next()) {
            let role = match new {
                "vcpu0" => "vcpu",
                new if new.starts_with("vcpu") => "spare",
                new if new.starts_with("disk") => "disk",
                new => new,
            };
            role.clone_into(name);
        }
        let role = match (name.as_str(), *filtered) {
            (role, true) => Some(role),
            ("disk", false) => Some("control"),
            ("spare", false) => Some("spare"),
            _ => None,
        };
        if let Some(role) = role {
            used.entry(role.to_owned()).or_default().insert(call);
        }
        *filtered |= line.contains("SECCOMP_SET_MODE_FILTER");
    }
    used
}

/// Has a pod use all that its monitor has.
fn do_all(disk: &str) {
    let mut pod = cri::Pod::start(|_| ());
    let device = Device { container_path: "/dev/disk".into(), host_path: disk.into(), permissions: "rwm".into() };
    let first = pod.run("first", cri::SLEEP, |config| config.devices = vec![device]);
    pod.output(&first, "dd if=/dev/disk of=/dev/null bs=64k; dd if=/dev/zero of=/dev/disk bs=64k count=64 conv=fsync");
    pod.output(&first, "blkdiscard /dev/disk 2> /dev/null; ping -c 3 10.88.0.1; head -c 300000 /dev/zero | tr '\\0' x; :");
    let limits = LinuxContainerResources { memory_limit_in_bytes: 1 << 30, cpu_quota: 300_000, cpu_period: 100_000, ..Default::default() };
    let second = pod.run("second", cri::SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits));
    pod.output(&second, "head -c 20000000 /dev/zero | tail | wc -c; nproc");
    pod.remove(&second);
    pod.remove(&first);
}

fn a_pod_that_does_its_worst_keeps_its_bounds_and_can_be_killed() {
    let before = Inventory::take();
    {
        let neighbour = Pod::start("neighbour", &[], "sleep 1000");
        // A logger that says that it is ready and never reads.
        let logger = format!("/tmp/{}", id("logger"));
        shell(&format!("printf '#!/bin/sh\\nexec 5>&-\\nexec sleep 999\\n' > {logger} && chmod 755 {logger}"));
        let script = "yes & yes >&2 & tail /dev/zero & bomb() { bomb | bomb & }; bomb; \
                      while :; do mkdir -p /tmp/a/b/c; mv /tmp/a /tmp/d; rm -r /tmp/d; done";
        let worst = Pod::start("worst", &["--log-uri", &format!("binary://{logger}"), "--memory-limit", "67108864"], script);
        for _ in 0..5 {
            assert_eq!(neighbour.exec(&[], &["echo", "alive"]).stdout, "alive\n");
            for role in ["shim", "vmm", "fs"] {
                let memory = status(worst.host_pid(role), "RssAnon");
                let memory: u64 = memory.trim_end_matches(" kB").parse().unwrap();
                assert!(memory < MOST_MEMORY, "{role} has {memory} KiB");
            }
        }
        ctr_ok(&["task", "kill", "--signal", "SIGKILL", &worst.id]);
        worst.wait_for("STOPPED");
        assert_eq!(worst.delete(), 137);
        shell(&format!("pkill -f '^sleep 999'; rm {logger}"));
    }
    assert_nothing_left(&before);
}

/// What `caisson check --security` says of the processes of a pod, by role and check.
fn security_of(pod: &str) -> BTreeMap<(String, String), String> {
    let output = run("caisson", &["check", "--security", "--json"]);
    let findings = output.stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let text = |finding: &serde_json::Value, field: &str| finding[field].as_str().unwrap().to_owned();
    let of_pod = findings.filter(|finding| finding["pod"] == pod);
    of_pod.map(|finding| ((text(&finding, "process"), text(&finding, "check")), text(&finding, "verdict"))).collect()
}

fn check_security_tells_a_process_that_is_held_from_one_that_is_not() {
    let pod = Pod::start("held", &[], "sleep 1000");
    let held = security_of(&pod.id);
    let output = run("caisson", &["check", "--security"]);
    assert!(output.code == 0 && output.stdout.ends_with("all hold\n"), "{output:?}");
    // The file server is the host's root, as nothing else is configured.
    let weak: Vec<_> = held
        .iter()
        .filter(|(_, verdict)| *verdict != "ok")
        .map(|((process, check), verdict)| format!("{process} {check} {verdict}"))
        .collect();
    assert_eq!(weak, ["fs user weak"]);
    // The same checks find nothing that holds a process which is only said to be a monitor.
    let mut free = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let folder = "/run/caisson/default/free";
    let start = shell(&format!("cut -d' ' -f22 /proc/{}/stat", free.id()));
    std::fs::create_dir_all(folder).unwrap();
    let change = format!(
        "sed -E 's/\"pod\":\"[^\"]*\"/\"pod\":\"free\"/; s/\"processes\":\\[[^]]*\\]/\"processes\":[{{\"role\":\"vmm\",\"pid\":{},\"start_time\":{start}}}]/'",
        free.id()
    );
    shell(&format!("{change} /run/caisson/default/{}/record.json > {folder}/record.json", pod.id));
    let found = security_of("free");
    let code = run("caisson", &["check", "--security"]).code;
    free.kill().unwrap();
    free.wait().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    assert_eq!(code, 1);
    let wrong: Vec<&str> = found.iter().filter(|(_, verdict)| *verdict == "wrong").map(|((_, check), _)| check.as_str()).collect();
    let expected =
        ["capabilities", "environment", "guest memory", "limits", "namespaces", "new privileges", "root folder", "system calls", "user"];
    assert!(expected.iter().all(|check| wrong.contains(check)), "{found:?}");
    // No check of a monitor is left out of a real one.
    assert!(found.keys().all(|check| held.contains_key(check)), "{held:?}");
}
