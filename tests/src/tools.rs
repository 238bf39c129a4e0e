//! What a pod's owners do with it by `caisson`, without being root, and that nobody else can.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::Test;
use crate::cri;
use crate::ctr::{Output, Pod, ctr_ok, id, run, run_with_input, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const TESTS: &[Test] = &[
    ("an_owners_program_has_its_streams_and_its_exit_code", an_owners_program_has_its_streams_and_its_exit_code),
    ("an_owners_terminal_is_a_terminal_of_its_size", an_owners_terminal_is_a_terminal_of_its_size),
    ("an_owners_program_ends_with_who_asked_for_it", an_owners_program_ends_with_who_asked_for_it),
    ("a_container_is_found_by_the_name_that_kubernetes_gave_it", a_container_is_found_by_the_name_that_kubernetes_gave_it),
    ("top_and_metrics_say_what_a_pod_does", top_and_metrics_say_what_a_pod_does),
];

pub const ALONE: &[Test] =
    &[("owners_use_their_pods_without_root_and_others_cannot", owners_use_their_pods_without_root_and_others_cannot)];

const OWNER: &str = "4321";
const STRANGER: &str = "5555";

/// `caisson ARGUMENTS`, by a user who is not root.
fn by(user: &str, arguments: &[&str]) -> Output {
    let mut line = vec!["--reuid", user, "--regid", user, "--clear-groups", "caisson"];
    line.extend_from_slice(arguments);
    run("setpriv", &line)
}

fn an_owners_program_has_its_streams_and_its_exit_code() {
    let pod = Pod::start("exec", &["--env", "A=container"], "sleep 1000");
    let script = "echo $A $B $PWD; echo wrong >&2; cat; exit 42";
    let arguments = ["exec", "--env", "B=caller", "--cwd", "/tmp", &pod.id, "sh", "-c", script];
    let output = run_with_input("caisson", &arguments, b"from the caller\n");
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (42, "container caller /tmp\nfrom the caller\n", "wrong\n"));
    // Far more than any pipe holds, both ways.
    let line = format!("head -c 4000000 /dev/urandom > /tmp/big; caisson exec {} cat < /tmp/big | cmp - /tmp/big; rm /tmp/big", pod.id);
    assert_eq!(shell(&line), "");
    let missing = run("caisson", &["exec", &pod.id, "no-such-program"]);
    assert!(missing.code == 1 && missing.stderr.contains("no-such-program"), "{missing:?}");
    let elsewhere = run("caisson", &["exec", "--container", "other", &pod.id, "true"]);
    assert!(elsewhere.stderr.contains(&format!("container \"other\": the pod has {}", pod.id)), "{elsewhere:?}");
    let nowhere = run("caisson", &["exec", "no-such-pod", "true"]);
    assert!(nowhere.code == 1 && nowhere.stderr.contains("there is no pod \"no-such-pod\""), "{nowhere:?}");
}

fn an_owners_terminal_is_a_terminal_of_its_size() {
    let pod = Pod::start("terminal", &[], "sleep 1000");
    let (mut ours, theirs) = terminal(33, 101);
    let script = "stty size; tty; read word; echo got $word; exit 9";
    let lend = || Stdio::from(theirs.try_clone().unwrap());
    let mut caller = Command::new("caisson");
    caller.args(["exec", "--tty", &pod.id, "sh", "-c", script]).stdin(lend()).stdout(lend()).stderr(lend());
    let mut caller = caller.spawn().unwrap();
    let mut screen = String::new();
    let mut read_until = |ours: &mut File, text: &str| {
        while !screen.contains(text) {
            let mut bytes = [0; 1024];
            let count = ours.read(&mut bytes).unwrap();
            screen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    read_until(&mut ours, "33 101\r\n/dev/pts/0\r\n");
    let wide = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&ours, wide).unwrap();
    shell(&format!("kill -WINCH {}", caller.id()));
    let resized = || pod.exec(&[], &["stty", "-F", "/dev/pts/0", "size"]).stdout == "40 120\n";
    eventually(resized, "the terminal keeps its size");
    ours.write_all(b"typed\n").unwrap();
    read_until(&mut ours, "got typed\r\n");
    assert_eq!(caller.wait().unwrap().code(), Some(9));
    let without = run("caisson", &["exec", "--tty", &pod.id, "true"]);
    assert!(without.stderr.contains("standard input is no terminal"), "{without:?}");
}

/// Both sides of a terminal of a size.
fn terminal(rows: u16, columns: u16) -> (File, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    tcsetwinsize(&ours, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    (ours.into(), File::options().read(true).write(true).open(name).unwrap())
}

fn an_owners_program_ends_with_who_asked_for_it() {
    let pod = Pod::start("gone", &[], "sleep 1000");
    let mut caller = Command::new("caisson").args(["exec", &pod.id, "sleep", "4242"]).spawn().unwrap();
    let runs = || run("caisson", &["top", &pod.id]).stdout.contains("sleep 4242");
    eventually(runs, "the program does not run");
    caller.kill().unwrap();
    caller.wait().unwrap();
    eventually(|| !runs(), "the program runs on without its caller");
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
}

fn top_and_metrics_say_what_a_pod_does() {
    let pod = Pod::start("busy", &["--user", "7:8", "--memory-limit", "33554432"], "while :; do :; done");
    let top = run("caisson", &["top", &pod.id]).stdout;
    let process = top.lines().find(|line| line.contains("sh -c while")).unwrap_or_else(|| panic!("{top}"));
    let fields: Vec<&str> = process.split_whitespace().collect();
    assert_eq!((fields[0], fields[1], fields[3], fields[4]), (pod.id.as_str(), pod.id.as_str(), "7", "7"), "{top}");
    let metric = |name: &str| -> Option<f64> {
        let text = run("caisson", &["metrics", &pod.id]).stdout;
        let labels = format!("{name}{{namespace=\"default\",pod=\"{0}\"", pod.id);
        text.lines().find_map(|line| line.strip_prefix(&labels)?.rsplit(' ').next()?.parse().ok())
    };
    assert_eq!(metric("caisson_container_memory_limit_bytes"), Some(33_554_432.0));
    assert_eq!(metric("caisson_container_processes"), Some(1.0));
    assert!(metric("caisson_pod_memory_bytes") >= Some(64.0 * 1_048_576.0));
    let before = metric("caisson_container_cpu_seconds_total").unwrap();
    eventually(|| metric("caisson_container_cpu_seconds_total") > Some(before), "a busy container uses no time");
    let console = run("caisson", &["console", &pod.id]).stdout;
    assert!(console.contains("Linux version"), "{console}");
}

fn owners_use_their_pods_without_root_and_others_cannot() {
    let _config = Config::set(&format!("[pod]\nowners = \"{OWNER}\"\n"));
    let log = format!("/tmp/{}.log", id("owned"));
    let before = Inventory::take();
    {
        let script = "trap 'exit 7' TERM; echo said; while :; do sleep 1; done";
        let pod = Pod::start("owned", &["--log-uri", &format!("file://{log}")], script);
        let theirs = by(OWNER, &["exec", &pod.id, "sh", "-c", "id -u; exit 3"]);
        assert_eq!((theirs.code, theirs.stdout.as_str()), (3, "0\n"), "{theirs:?}");
        eventually(|| by(OWNER, &["logs", &pod.id]).stdout == "said\n", "the log does not say what the container said");
        assert!(by(OWNER, &["console", &pod.id]).stdout.contains("Linux version"));
        assert!(by(OWNER, &["top"]).stdout.contains("sh -c trap") && by(OWNER, &["metrics"]).stdout.contains(&pod.id));
        assert!(by(OWNER, &["list"]).stdout.contains(&pod.id));
        // To all others the pod is not there, and its socket is closed.
        for refused in [&["exec", &pod.id, "true"][..], &["logs", &pod.id], &["console", &pod.id], &["stop", &pod.id], &["top", &pod.id]] {
            let output = by(STRANGER, refused);
            assert!(output.code == 1 && output.stderr.contains("there is no pod"), "{refused:?}: {output:?}");
        }
        assert!(!by(STRANGER, &["list"]).stdout.contains(&pod.id));
        let folder = format!("/run/caisson/default/{}", pod.id);
        assert_eq!(shell(&format!("stat -c %u:%g:%a {folder} {folder}/owner.sock")), format!("0:{OWNER}:750\n0:{OWNER}:660"));
        assert_eq!(pod.status().as_deref(), Some("RUNNING"));
        let stopped = by(OWNER, &["stop", &pod.id]);
        assert_eq!(stopped.code, 0, "{stopped:?}");
        pod.wait_for("STOPPED");
        assert_eq!(pod.delete(), 7);
        std::fs::remove_file(&log).unwrap();
        let config = Config::set("[pod]\nowners = \"no-such-group\"\n");
        let refused = run("ctr", &["run", "--rm", "--runtime", crate::ctr::RUNTIME, crate::ctr::IMAGE, &id("nobody"), "true"]);
        assert!(refused.stderr.contains("pod.owners is \"no-such-group\", and this host has no such group"), "{refused:?}");
        drop(config);
        ctr_ok(&["task", "ls"]);
    }
    assert_nothing_left(&before);
}

fn a_container_is_found_by_the_name_that_kubernetes_gave_it() {
    let mut pod = cri::Pod::start(|_| {});
    std::fs::create_dir_all(format!("{}/web", pod.config.log_directory)).unwrap();
    pod.run("web", "echo served; echo failed >&2; sleep 1000", |config| config.log_path = "web/0.log".into());
    pod.run("side", "sleep 1000", |_| {});
    let caisson = |arguments: &[&str]| run("caisson", arguments);
    eventually(|| caisson(&["logs", "-c", "web", &pod.id]).stdout == "served\n", "the log does not say what the container said");
    assert_eq!(caisson(&["logs", "-c", "web", &pod.id[..12]]).stderr, "failed\n");
    assert_eq!(caisson(&["exec", "-c", "side", &pod.id, "cat", "/proc/self/cmdline"]).stdout, "cat\0/proc/self/cmdline\0");
    let which = caisson(&["exec", &pod.id, "true"]);
    assert!(which.stderr.contains("which container: the pod has side, web"), "{which:?}");
    // Its sandbox is nobody's to look into.
    assert!(!caisson(&["top", &pod.id]).stdout.contains(&pod.id[..24]));
}
