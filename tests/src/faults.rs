//! What happens when something is killed, missing, broken, full or too small.

use std::time::{Duration, Instant};

use crate::Test;
use crate::containerd::Containerd;
use crate::cri;
use crate::ctr::{IMAGE, Output, Pod, RUNTIME, ctr, ctr_ok, id, run, run_pod};
use crate::events::Events;
use crate::host::{Inventory, assert_nothing_left, eventually, shim_log};

pub const TESTS: &[Test] = &[("a_bad_annotation_is_one_sentence", a_bad_annotation_is_one_sentence)];

/// These change the node's configuration or count what is on it, so they run alone.
pub const ALONE: &[Test] = &[
    ("a_killed_monitor_exits_137_and_leaves_nothing", a_killed_monitor_exits_137_and_leaves_nothing),
    ("a_killed_file_server_exits_137_and_leaves_nothing", a_killed_file_server_exits_137_and_leaves_nothing),
    ("a_killed_shim_exits_137_and_leaves_nothing", a_killed_shim_exits_137_and_leaves_nothing),
    ("a_panicking_guest_exits_137_and_leaves_nothing", a_panicking_guest_exits_137_and_leaves_nothing),
    ("output_and_exit_survive_a_containerd_restart", output_and_exit_survive_a_containerd_restart),
    ("a_pods_log_is_whole_across_a_containerd_restart", a_pods_log_is_whole_across_a_containerd_restart),
    ("an_exit_while_containerd_is_down_is_not_lost", an_exit_while_containerd_is_down_is_not_lost),
    ("broken_files_are_one_clear_sentence", broken_files_are_one_clear_sentence),
    ("bad_settings_are_one_clear_sentence", bad_settings_are_one_clear_sentence),
    ("without_kvm_create_says_so", without_kvm_create_says_so),
    ("a_guest_that_is_never_ready_fails_within_the_time_out", a_guest_that_is_never_ready_fails_within_the_time_out),
    ("too_few_open_files_are_one_clear_sentence", too_few_open_files_are_one_clear_sentence),
    ("a_full_run_folder_is_one_clear_sentence", a_full_run_folder_is_one_clear_sentence),
    ("older_containerds_work_with_the_same_binary", older_containerds_work_with_the_same_binary),
];

/// The last line of what ctr says, which must be the only one that it says.
fn sentence(output: &Output) -> String {
    assert_ne!(output.code, 0, "{output:?}");
    let lines: Vec<&str> = output.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "not one sentence: {output:?}");
    lines[0].to_owned()
}

/// Runs a pod that must fail with a sentence that contains `words`, and leave nothing.
fn assert_refused(options: &[&str], words: &[&str]) {
    let before = Inventory::take();
    let said = sentence(&run_pod(options, &["true"]));
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
    assert_nothing_left(&before);
}

/// A configuration for one test.
pub struct Config;

impl Config {
    pub fn set(text: &str) -> Self {
        std::fs::create_dir_all("/etc/caisson").unwrap();
        std::fs::write("/etc/caisson/config.toml", text).unwrap();
        Self
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = std::fs::remove_file("/etc/caisson/config.toml");
        let _ = std::fs::remove_dir("/etc/caisson");
    }
}

fn a_bad_annotation_is_one_sentence() {
    let said = sentence(&run_pod(&["--annotation", "io.caisson.vm.memory_mib=1"], &["true"]));
    assert!(said.contains("vm.memory_mib = \"1\" is not allowed; allowed is 64 to 1048576"), "{said}");
    let said = sentence(&run_pod(&["--annotation", "io.caisson.vm.vcpus=0"], &["true"]));
    assert!(said.contains("vm.vcpus = \"0\" is not allowed; allowed is 1 to 32"), "{said}");
    let said = sentence(&run_pod(&["--annotation", "io.caisson.kernel.path=/x"], &["true"]));
    assert!(said.contains("not allowed on this host"), "{said}");
}

fn kill_and_expect_137(role: &str) {
    let before = Inventory::take();
    {
        let pod = Pod::start("kill", &[], "sleep 1000");
        let events = Events::listen();
        run("kill", &["-9", &pod.host_pid(role).to_string()]);
        let start = Instant::now();
        // After the shim's death containerd forgets the task; otherwise it is stopped.
        while pod.status().is_some_and(|status| status == "RUNNING") {
            assert!(start.elapsed() < Duration::from_secs(30), "the task still runs");
            std::thread::sleep(Duration::from_millis(100));
        }
        // Who subscribed hears of it, whoever tells.
        let exit = |line: &str| line.contains("/tasks/exit") && line.contains(&pod.id) && line.contains("137");
        eventually(|| events.so_far().lines().any(exit), &format!("no exit of 137 among the events: {}", events.so_far()));
        if role != "shim" {
            let listed = run("caisson", &["list"]).stdout;
            assert!(listed.contains("was killed by SIGKILL"), "{listed}");
            assert_eq!(pod.delete(), 137);
        }
    }
    assert_nothing_left(&before);
}

fn a_killed_monitor_exits_137_and_leaves_nothing() {
    kill_and_expect_137("vmm");
}

fn a_killed_file_server_exits_137_and_leaves_nothing() {
    kill_and_expect_137("fs");
}

fn a_killed_shim_exits_137_and_leaves_nothing() {
    kill_and_expect_137("shim");
}

fn a_panicking_guest_exits_137_and_leaves_nothing() {
    let before = Inventory::take();
    {
        let pod = Pod::start("panic", &["--privileged"], "sleep 1000");
        // A privileged container may tell its own kernel to panic when memory runs out.
        let script = "mkdir /m; mount -t tmpfs -o size=2g none /m; echo 1 > /proc/sys/vm/panic_on_oom; dd if=/dev/zero of=/m/fill bs=1M";
        let output = pod.exec(&[], &["sh", "-c", script]);
        assert_ne!(output.code, 0, "{output:?}");
        pod.wait_for("STOPPED");
        let list = run("caisson", &["list"]);
        assert!(list.stdout.contains("failed") && list.stdout.contains("the guest kernel panicked: Kernel panic"), "{list:?}");
        assert!(shim_log().contains("the guest kernel panicked"), "containerd's log does not say why: {}", shim_log());
        assert_eq!(pod.delete(), 137);
    }
    assert_nothing_left(&before);
}

fn output_and_exit_survive_a_containerd_restart() {
    let path = format!("/tmp/{}.log", id("restart"));
    let id = id("restart");
    ctr_ok(&[
        "run",
        "--detach",
        "--log-uri",
        &format!("file://{path}"),
        "--runtime",
        RUNTIME,
        IMAGE,
        &id,
        "sh",
        "-c",
        "for i in $(seq 1 80); do echo line $i; sleep 0.1; done; exit 9",
    ]);
    let pod = Pod { id };
    let output = run("/usr/lib/node/containerd.sh", &[]);
    assert_eq!(output.code, 0, "{output:?}");
    pod.wait_for("STOPPED");
    let text = std::fs::read_to_string(&path).unwrap();
    let expected: String = (1..=80).map(|number| format!("line {number}\n")).collect();
    assert_eq!(text, expected);
    assert_eq!(pod.delete(), 9);
}

fn a_pods_log_is_whole_across_a_containerd_restart() {
    let mut pod = cri::Pod::start(|_| ());
    let container = pod.run("printer", "for i in $(seq 1 150); do echo line $i; sleep 0.1; done; exit 9", |_| ());
    // Killed, not asked to end: what the container says meanwhile waits in its pipes.
    let output = run("bash", &["-c", "pkill -9 -x containerd; sleep 3; /usr/lib/node/containerd.sh"]);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(pod.wait_for_exit(&container), 9);
    let said = || {
        let log = std::fs::read_to_string(format!("{}/printer.log", pod.config.log_directory)).unwrap();
        log.lines().filter_map(|line| Some(line.split_once(" stdout F ")?.1.to_owned())).collect::<Vec<_>>()
    };
    eventually(|| said().len() >= 150, "lines are missing");
    assert_eq!(said(), (1..=150).map(|number| format!("line {number}")).collect::<Vec<_>>());
}

fn an_exit_while_containerd_is_down_is_not_lost() {
    let pod = Pod::start("gap", &[], "sleep 5; exit 9");
    run("bash", &["-c", "kill -9 $(cat /run/containerd.pid)"]);
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(run("/usr/lib/node/containerd.sh", &[]).code, 0);
    pod.wait_for("STOPPED");
    assert_eq!(pod.delete(), 9);
}

/// Replaces a file for as long as it lives.
pub struct Replaced {
    path: &'static str,
    kept: Vec<u8>,
}

impl Replaced {
    pub fn with(path: &'static str, bytes: Option<&[u8]>) -> Self {
        let kept = std::fs::read(path).unwrap();
        match bytes {
            Some(bytes) => std::fs::write(path, bytes).unwrap(),
            None => std::fs::remove_file(path).unwrap(),
        }
        Self { path, kept }
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        std::fs::write(self.path, &self.kept).unwrap();
    }
}

fn broken_files_are_one_clear_sentence() {
    const KERNEL: &str = "/usr/share/caisson/vmlinux";
    const INITRAMFS: &str = "/usr/share/caisson/initramfs";
    {
        let _missing = Replaced::with(KERNEL, None);
        assert_refused(&[], &["guest kernel /usr/share/caisson/vmlinux", "No such file", "cargo xtask install", "kernel.path"]);
    }
    {
        let truncated = std::fs::read(KERNEL).unwrap();
        let _truncated = Replaced::with(KERNEL, Some(&truncated[..truncated.len() / 2]));
        assert_refused(&[], &["load the guest kernel"]);
    }
    {
        let _missing = Replaced::with(INITRAMFS, None);
        assert_refused(&[], &["initramfs /usr/share/caisson/initramfs", "No such file"]);
    }
    {
        let _empty = Replaced::with(INITRAMFS, Some(b""));
        assert_refused(&[], &["initramfs is no cpio archive"]);
    }
    {
        let truncated = std::fs::read(INITRAMFS).unwrap();
        let _truncated = Replaced::with(INITRAMFS, Some(&truncated[..truncated.len() / 2]));
        assert_refused(&[], &["the initramfs is truncated"]);
    }
}

fn bad_settings_are_one_clear_sentence() {
    for (text, words) in [
        ("[vm]\nmemory_mib = 1\n", ["vm.memory_mib = 1 is not allowed", "64 to 1048576"]),
        ("[vm]\nvcpus = 0\n", ["vm.vcpus = 0 is not allowed", "1 to 32"]),
        ("[vm]\nram = 1\n", ["unknown key vm.ram", "known keys are"]),
        ("[vm\n", ["/etc/caisson/config.toml", "TOML"]),
    ] {
        let _config = Config::set(text);
        assert_refused(&[], &words);
        assert_ne!(run("caisson", &["config"]).code, 0);
    }
}

fn without_kvm_create_says_so() {
    std::fs::rename("/dev/kvm", "/dev/kvm.away").unwrap();
    let refused = std::panic::catch_unwind(|| {
        assert_refused(&[], &["/dev/kvm", "hardware virtualization", "caisson check"]);
        let check = run("caisson", &["check"]);
        assert!(check.code != 0 && check.stdout.contains("MISSING KVM runs an unmodified guest"), "{check:?}");
    });
    std::fs::rename("/dev/kvm.away", "/dev/kvm").unwrap();
    if let Err(panic) = refused {
        std::panic::resume_unwind(panic);
    }
    assert_eq!(run("caisson", &["check"]).code, 0);
}

fn a_guest_that_is_never_ready_fails_within_the_time_out() {
    // A kernel that is told to wait for a root device never starts the agent.
    let _config = Config::set("[kernel]\nargs = \"rdinit=/none root=/dev/none rootwait\"\n[timeouts]\nboot_ms = 6000\n");
    let start = Instant::now();
    assert_refused(&[], &["not ready within 6000 ms", "booting the guest kernel"]);
    assert!(start.elapsed() < Duration::from_secs(40));
}

fn too_few_open_files_are_one_clear_sentence() {
    const SHIM: &str = "/usr/bin/containerd-shim-caisson-v2";
    std::fs::copy(SHIM, "/tmp/shim").unwrap();
    let limited = |limit: u32| Replaced::with(SHIM, Some(format!("#!/bin/sh\nulimit -n {limit}\nexec /tmp/shim \"$@\"\n").as_bytes()));
    {
        let _limited = limited(64);
        assert_refused(&[], &["the limit of open files is 64", "a pod needs 256", "LimitNOFILE"]);
    }
    let _limited = limited(256);
    assert_eq!(run_pod(&[], &["true"]).code, 0);
}

fn a_full_run_folder_is_one_clear_sentence() {
    let dir = "/tmp/full-run";
    std::fs::create_dir_all(dir).unwrap();
    assert_eq!(run("mount", &["-t", "tmpfs", "-o", "size=64k,nr_inodes=200", "tmpfs", dir]).code, 0);
    let _config = Config::set(&format!("[run]\ndir = \"{dir}\"\n"));
    run("bash", &["-c", &format!("head -c 1000000 /dev/zero > {dir}/fill")]);
    let refused = std::panic::catch_unwind(|| assert_refused(&[], &["No space left on device"]));
    run("umount", &[dir]);
    if let Err(panic) = refused {
        std::panic::resume_unwind(panic);
    }
}

fn older_containerds_work_with_the_same_binary() {
    for version in ["1.6", "1.7", "2"] {
        let containerd = Containerd::start(version, "", "");
        let imported = containerd.ctr(&["images", "import", "/usr/lib/node/busybox.tar"]);
        assert_eq!(imported.code, 0, "containerd {version}: {imported:?}");
        let command = ["sh", "-c", "echo from $(uname -s); exit 5"];
        let output = containerd.ctr(&[&["run", "--rm", "--runtime", RUNTIME, IMAGE, &id("old")], &command[..]].concat());
        assert_eq!((output.code, output.stdout.as_str()), (5, "from Linux\n"), "containerd {version}: {output:?}");
    }
    // The node's own still answers.
    assert_eq!(ctr(&["version"]).code, 0);
}
