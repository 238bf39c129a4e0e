//! Exit codes, identity, limits and signals of processes.

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr, ctr_ok, id, run_pod, shell};
use crate::host::{self, eventually, number};

pub const TESTS: &[Test] = &[
    ("a_setuid_program_is_its_owners_where_privileges_may_be_gained", a_setuid_program_is_its_owners_where_privileges_may_be_gained),
    ("exit_codes_come_back", exit_codes_come_back),
    ("a_missing_program_is_named_and_exits_127", a_missing_program_is_named_and_exits_127),
    ("environment_folder_user_and_groups_are_the_specs", environment_folder_user_and_groups_are_the_specs),
    ("capabilities_are_the_specs", capabilities_are_the_specs),
    ("an_ambient_capability_is_there_for_who_is_not_root", an_ambient_capability_is_there_for_who_is_not_root),
    ("a_read_only_root_cannot_be_written", a_read_only_root_cannot_be_written),
    ("a_bind_mount_is_seen_both_ways", a_bind_mount_is_seen_both_ways),
    ("device_rules_are_enforced", device_rules_are_enforced),
    ("signals_end_a_task_with_128_plus_their_number", signals_end_a_task_with_128_plus_their_number),
    ("an_exec_has_its_own_exit_code_and_streams", an_exec_has_its_own_exit_code_and_streams),
    ("many_execs_at_once_each_have_their_own", many_execs_at_once_each_have_their_own),
    ("a_program_starts_with_no_signal_blocked", a_program_starts_with_no_signal_blocked),
    ("kill_all_reaches_every_process", kill_all_reaches_every_process),
    ("what_cannot_be_done_is_said", what_cannot_be_done_is_said),
    ("pause_stops_and_resume_continues", pause_stops_and_resume_continues),
    ("annotations_size_the_machine", annotations_size_the_machine),
    ("what_a_container_writes_is_in_the_snapshot", what_a_container_writes_is_in_the_snapshot),
    ("a_snapshot_may_be_a_plain_folder", a_snapshot_may_be_a_plain_folder),
    ("a_memory_limit_kills_the_process_and_not_the_pod", a_memory_limit_kills_the_process_and_not_the_pod),
];

fn exit_codes_come_back() {
    for code in [0, 1, 42] {
        let output = run_pod(&[], &["sh", "-c", &format!("exit {code}")]);
        assert_eq!(output.code, code, "{output:?}");
    }
}

fn a_missing_program_is_named_and_exits_127() {
    let output = run_pod(&[], &["/no/such/program"]);
    assert_eq!(output.code, 127, "{output:?}");
    assert!(output.stderr.contains("/no/such/program: No such file or directory"), "{output:?}");
}

fn environment_folder_user_and_groups_are_the_specs() {
    let output =
        run_pod(&["--env", "A=b c", "--cwd", "/made/for/it", "--user", "33:33"], &["sh", "-c", "echo $A; pwd; id -u; id -g; hostname"]);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(&lines[..4], ["b c", "/made/for/it", "33", "33"], "{output:?}");
    assert!(lines[4].starts_with("t-"), "{output:?}");
}

fn capabilities_are_the_specs() {
    let sets = |options: &[&str]| run_pod(options, &["grep", "-E", "^Cap(Eff|Bnd)|^NoNewPrivs", "/proc/self/status"]).stdout;
    // containerd's defaults: 14 capabilities, no new privileges.
    assert_eq!(
        sets(&[]).split_whitespace().collect::<Vec<_>>(),
        ["CapEff:", "00000000a80425fb", "CapBnd:", "00000000a80425fb", "NoNewPrivs:", "1"]
    );
    assert!(sets(&["--cap-drop", "CAP_CHOWN"]).contains("00000000a80425fa"));
    assert!(sets(&["--cap-add", "CAP_SYS_TIME"]).contains("00000000aa0425fb"));
}

fn an_ambient_capability_is_there_for_who_is_not_root() {
    // No option of ctr's asks for it.
    let (folder, name) = (format!("/tmp/{}", id("ambient")), id("ambient"));
    let sets = r#"(.bounding, .permitted, .effective, .inheritable, .ambient) = ["CAP_NET_ADMIN"]"#;
    let change = format!(
        r#".root.path = "{folder}" | .process.user = {{"uid": 1000, "gid": 1000}} | .process.capabilities |= ({sets})
        | .process.args = ["/bin/busybox", "grep", "-E", "^Cap(Eff|Amb)", "/proc/self/status"]"#
    );
    shell(&format!("mkdir -p {folder}/bin && cp /usr/bin/busybox {folder}/bin/ && ctr oci spec | jq '{change}' > {folder}.json"));
    let output = ctr(&["run", "--rm", "--runtime", RUNTIME, "--config", &format!("{folder}.json"), &name]);
    shell(&format!("rm -r {folder} {folder}.json"));
    assert_eq!(output.stdout, "CapEff:\t0000000000001000\nCapAmb:\t0000000000001000\n", "{output:?}");
}

fn a_read_only_root_cannot_be_written() {
    let output = run_pod(&["--read-only"], &["sh", "-c", "touch /x || echo refused; touch /run/y && echo run"]);
    assert_eq!(output.stdout, "refused\nrun\n", "{output:?}");
}

fn a_bind_mount_is_seen_both_ways() {
    let dir = std::path::Path::new("/tmp/bind-test");
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("from-host"), "host").unwrap();
    let output = run_pod(
        &["--mount", "type=bind,src=/tmp/bind-test,dst=/data,options=rbind:rw"],
        &["sh", "-c", "cat /data/from-host; echo guest > /data/from-guest"],
    );
    assert_eq!((output.code, output.stdout.as_str()), (0, "host"), "{output:?}");
    assert_eq!(std::fs::read_to_string(dir.join("from-guest")).unwrap(), "guest\n");
    let output = run_pod(&["--mount", "type=bind,src=/tmp/bind-test,dst=/data,options=rbind:ro"], &["touch", "/data/x"]);
    assert_ne!(output.code, 0, "{output:?}");
}

fn device_rules_are_enforced() {
    // Making a node is allowed by default; opening one that is not on the list is not.
    let output = run_pod(
        &[],
        &[
            "sh",
            "-c",
            "mknod /tmp/vda b 254 0 && mknod /tmp/mem c 1 1 && echo made; cat /tmp/mem; cat /tmp/vda; echo x > /dev/null && echo null",
        ],
    );
    assert_eq!(output.stdout, "made\nnull\n", "{output:?}");
    assert_eq!(output.stderr.matches("Operation not permitted").count(), 2, "{output:?}");
}

fn signals_end_a_task_with_128_plus_their_number() {
    for (signal, code) in [("SIGKILL", 137), ("SIGTERM", 143)] {
        let pod = Pod::start("sig", &[], "trap 'exit 143' TERM; touch /trapped; while :; do sleep 0.1; done");
        let start = std::time::Instant::now();
        while pod.exec(&[], &["test", "-e", "/trapped"]).code != 0 {
            assert!(start.elapsed().as_secs() < 30, "the container does not run");
        }
        ctr_ok(&["task", "kill", "--signal", signal, &pod.id]);
        pod.wait_for("STOPPED");
        assert_eq!(pod.delete(), code);
    }
}

fn an_exec_has_its_own_exit_code_and_streams() {
    let pod = Pod::start("exec", &[], "sleep 1000");
    // Of a signal that it does not know.
    assert_eq!(pod.exec(&[], &["sh", "-c", "kill -TERM $$"]).code, 143);
    let output = pod.exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (7, "out\n", "err\n"));
    // As runc has it: the exec does not start.
    let output = pod.exec(&[], &["no-such-program"]);
    assert!(output.code != 0 && output.stderr.contains("exec no-such-program: executable file not found"), "{output:?}");
    // Not even SIGPIPE, which the agent ignores for itself.
    assert_eq!(pod.exec(&[], &["grep", "SigIgn", "/proc/self/status"]).stdout, "SigIgn:\t0000000000000000\n");
    let output = pod.exec(&["--cwd", "/tmp", "--user", "33"], &["sh", "-c", "pwd; id -u"]);
    assert_eq!(output.stdout, "/tmp\n33\n", "{output:?}");
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
}

/// How many: `CAISSON_TEST_EXECS=100` makes it a hundred, of which an emulated containerd may turn one away.
fn many_execs_at_once_each_have_their_own() {
    let count = number("CAISSON_TEST_EXECS", 10);
    let pod = Pod::start("execs", &[], "sleep 1000");
    std::thread::scope(|scope| {
        for number in 1..=count {
            let pod = &pod;
            scope.spawn(move || {
                let output = pod.exec(&[], &["sh", "-c", &format!("echo {number}; exit {}", number % 100)]);
                assert_eq!((output.code, output.stdout), (number % 100, format!("{number}\n")), "{}", output.stderr);
            });
        }
    });
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
}

fn a_program_starts_with_no_signal_blocked() {
    let output = run_pod(&[], &["grep", "SigBlk", "/proc/self/status"]);
    assert_eq!(output.stdout, "SigBlk:\t0000000000000000\n", "{output:?}");
}

fn kill_all_reaches_every_process() {
    let pod = Pod::start("all", &[], "sleep 1000 & sleep 1000");
    ctr_ok(&["task", "kill", "--all", "--signal", "SIGKILL", &pod.id]);
    pod.wait_for("STOPPED");
    assert_eq!(pod.delete(), 137);
}

fn what_cannot_be_done_is_said() {
    let pod = Pod::start("unable", &["--apparmor-profile", "the-profile"], "sleep 1000");
    let checkpoint = ctr(&["task", "checkpoint", &pod.id]);
    assert!(checkpoint.stderr.contains("checkpointing a container is not implemented"), "{checkpoint:?}");
    assert!(host::shim_log().contains("the guest cannot honour the AppArmor profile"), "{}", host::shim_log());
}

fn pause_stops_and_resume_continues() {
    let folder = format!("/tmp/{}", id("paused"));
    std::fs::create_dir(&folder).unwrap();
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let script = "turn=0; while :; do turn=$((turn + 1)); echo $turn > /data/turn; sleep 0.05; done";
    let pod = Pod::start("pause", &["--mount", &mount], script);
    // It is empty for a moment at each turn.
    let turn = || std::fs::read_to_string(format!("{folder}/turn")).ok().and_then(|text| text.trim().parse::<u64>().ok());
    eventually(|| turn() > Some(3), "the container does not run");
    ctr_ok(&["task", "pause", &pod.id]);
    assert_eq!(pod.status().as_deref(), Some("PAUSED"));
    let paused = turn();
    std::thread::sleep(std::time::Duration::from_millis(1000));
    assert_eq!(turn(), paused);
    ctr_ok(&["task", "resume", &pod.id]);
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
    eventually(|| turn() > paused.or(Some(0)), "the container does not go on");
    drop(pod);
    std::fs::remove_dir_all(folder).unwrap();
}

fn annotations_size_the_machine() {
    // The least there is; one that has memory on both sides of the hole below 4 GiB; and the most vCPUs.
    for (vcpus, mib, least) in [(1, 64, 32), (2, 384, 300), (4, 4096, 3900), (32, 512, 400)] {
        let (vcpus_is, memory_is) = (format!("io.caisson.vm.vcpus={vcpus}"), format!("io.caisson.vm.memory_mib={mib}"));
        let output = run_pod(
            &["--annotation", &vcpus_is, "--annotation", &memory_is],
            &["sh", "-c", "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo"],
        );
        let numbers: Vec<u64> = output.stdout.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers[0], vcpus, "{output:?}");
        assert!((least << 10..mib << 10).contains(&numbers[1]), "{output:?}");
    }
}

fn what_a_container_writes_is_in_the_snapshot() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    // busybox sets no extended attributes; the node's program does.
    let script = "cd /root; echo data > file; chown 33:100 file; chmod 6751 file; ln -s file link; rm /bin/vi; \
                  u=/node; $u/lib64/ld-linux-x86-64.so.2 --library-path $u/lib/x86_64-linux-gnu $u/bin/setfattr -n user.caisson -v kept file; \
                  mkfifo fifo; sleep 1000";
    let pod = Pod::start("snap", &["--mount", "type=bind,src=/usr,dst=/node,options=rbind:ro"], script);
    let start = std::time::Instant::now();
    while pod.exec(&[], &["test", "-p", "/root/fifo"]).code != 0 {
        assert!(start.elapsed().as_secs() < 30, "the container did not write");
    }
    // `ctr snapshot mounts` prints the mount command of the container's own snapshot.
    let target = format!("/tmp/{}", pod.id);
    std::fs::create_dir_all(&target).unwrap();
    let upper = ctr_ok(&["snapshot", "mounts", &target, &pod.id]);
    let upper = upper.split(',').find_map(|word| word.split("upperdir=").nth(1)).unwrap_or_else(|| panic!("no upperdir in {upper}"));
    let root = std::path::Path::new(upper).join("root");
    let meta = std::fs::metadata(root.join("file")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (33, 100, 0o6751));
    assert_eq!(shell(&format!("getfattr --only-values -n user.caisson {}", root.join("file").display())), "kept");
    assert_eq!(std::fs::read_to_string(root.join("link")).unwrap(), "data\n");
    assert!(std::fs::metadata(root.join("fifo")).unwrap().file_type().is_fifo());
    // What was removed is a whiteout: a character device 0:0.
    assert!(std::fs::symlink_metadata(std::path::Path::new(upper).join("bin/vi")).unwrap().file_type().is_char_device());
}

fn a_snapshot_may_be_a_plain_folder() {
    // The native snapshotter copies each layer, and its mount is a bind.
    let name = id("native");
    let output = ctr(&["run", "--runtime", RUNTIME, "--snapshotter", "native", IMAGE, &name, "sh", "-c", "echo kept > /root/file; exit 3"]);
    let folder = ctr_ok(&["snapshots", "--snapshotter", "native", "mounts", "/tmp/root", &name]);
    let folder = folder.split_whitespace().find(|word| word.contains("snapshotter.v1.native")).unwrap_or_else(|| panic!("{folder}"));
    let kept = std::fs::read_to_string(format!("{folder}/root/file"));
    ctr_ok(&["container", "delete", &name]);
    assert_eq!((output.code, kept.unwrap().as_str()), (3, "kept\n"), "{output:?}");
}

fn a_memory_limit_kills_the_process_and_not_the_pod() {
    let pod = Pod::start("oom", &["--memory-limit", "33554432"], "sleep 1000");
    // tmpfs pages are charged to the container that writes them.
    let output = pod.exec(&[], &["sh", "-c", "dd if=/dev/zero of=/dev/shm/fill bs=1M count=60; echo code $?"]);
    assert!(output.stdout.contains("code 137") && output.stderr.contains("Killed"), "{output:?}");
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
}

fn a_setuid_program_is_its_owners_where_privileges_may_be_gained() {
    // busybox drops such rights by itself.
    let folder = format!("/tmp/{}", id("setuid"));
    shell(&format!("mkdir {folder} && cp /usr/bin/id {folder}/id && chmod 4755 {folder}/id"));
    let programs = format!("type=bind,src={folder},dst=/setuid,options=rbind:ro");
    let library = |from: &str, to: &str| format!("type=bind,src={from},dst={to},options=rbind:ro");
    let libraries = [library("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu"), library("/usr/lib64", "/lib64")];
    let usual = ["--user", "1000", "--mount", &programs, "--mount", &libraries[0], "--mount", &libraries[1]];
    for (options, user) in [(&["--allow-new-privs"][..], "0\n"), (&[], "1000\n")] {
        let output = run_pod(&[options, &usual].concat(), &["/setuid/id", "-u"]);
        assert_eq!((output.code, output.stdout.as_str()), (0, user), "{options:?}: {output:?}");
    }
    shell(&format!("rm -r {folder}"));
}
