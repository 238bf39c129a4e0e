//! Standard streams: whole, apart, in order, with back-pressure, and terminals.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr_ok, id, run, run_pod, run_with_input};

pub const TESTS: &[Test] = &[
    ("stdin_ends_when_its_writer_does", stdin_ends_when_its_writer_does),
    ("stdout_and_stderr_are_kept_apart", stdout_and_stderr_are_kept_apart),
    ("half_a_gigabyte_of_output_arrives_whole", half_a_gigabyte_of_output_arrives_whole),
    ("an_eighth_of_a_gigabyte_of_input_arrives_whole", an_eighth_of_a_gigabyte_of_input_arrives_whole),
    ("a_slow_reader_gets_everything_after_the_exit", a_slow_reader_gets_everything_after_the_exit),
    ("a_terminal_has_the_callers_size_and_follows_it", a_terminal_has_the_callers_size_and_follows_it),
    ("an_exec_can_have_a_terminal", an_exec_can_have_a_terminal),
    ("a_log_file_uri_gets_the_output", a_log_file_uri_gets_the_output),
];

fn stdin_ends_when_its_writer_does() {
    let id = id("in");
    let output = run_with_input("ctr", &["run", "--rm", "--runtime", RUNTIME, IMAGE, &id, "sh", "-c", "cat; echo end"], b"one\ntwo\n");
    assert_eq!((output.code, output.stdout.as_str()), (0, "one\ntwo\nend\n"), "{output:?}");
}

fn stdout_and_stderr_are_kept_apart() {
    let output = run_pod(&[], &["sh", "-c", "for i in 1 2 3; do echo out $i; echo err $i >&2; done"]);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out 1\nout 2\nout 3\n", "err 1\nerr 2\nerr 3\n"));
}

/// Runs a shell line on the node.
fn shell(line: &str) -> String {
    let output = run("bash", &["-o", "pipefail", "-c", line]);
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.stdout.trim().to_owned()
}

fn half_a_gigabyte_of_output_arrives_whole() {
    let id = id("out");
    // 512 MiB with a pattern that shows loss, doubling and exchange.
    let line = "yes caisson-0123456789 | head -c 536870912";
    let got = shell(&format!("ctr run --rm --runtime {RUNTIME} {IMAGE} {id} sh -c '{line}' | md5sum"));
    assert_eq!(got, shell("set +o pipefail; yes caisson-0123456789 | head -c 536870912 | md5sum"));
}

fn an_eighth_of_a_gigabyte_of_input_arrives_whole() {
    let id = id("big-in");
    let got = shell(&format!("head -c 134217728 /dev/zero | tr '\\0' 'x' | ctr run --rm --runtime {RUNTIME} {IMAGE} {id} md5sum"));
    assert_eq!(got, shell("head -c 134217728 /dev/zero | tr '\\0' 'x' | md5sum"));
}

fn a_slow_reader_gets_everything_after_the_exit() {
    let id = id("slow");
    // The container is done long before its reader: what is in flight is in pipes and buffers.
    let got = shell(&format!("ctr run --rm --runtime {RUNTIME} {IMAGE} {id} sh -c 'seq 1 60000' | (sleep 6; md5sum)"));
    assert_eq!(got, shell("seq 1 60000 | md5sum"));
}

/// Runs `ctr` on a terminal of a size; `talk` speaks to the terminal's other side.
fn on_terminal<T>(arguments: &[&str], talk: impl FnOnce(&mut std::fs::File, u32) -> T) -> T {
    let size = Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    let slave = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
    let mut child =
        Command::new("ctr").args(arguments).stdin(slave(&pty.slave)).stdout(slave(&pty.slave)).stderr(slave(&pty.slave)).spawn().unwrap();
    drop(pty.slave);
    let mut master = std::fs::File::from(pty.master);
    let result = talk(&mut master, child.id());
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
            panic!("ctr {} did not end", arguments.join(" "));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    result
}

/// Reads from a terminal until `wanted` appears.
fn read_until(terminal: &mut std::fs::File, wanted: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    let start = Instant::now();
    while !seen.contains(wanted) {
        assert!(start.elapsed() < Duration::from_secs(60), "{wanted:?} did not appear in {seen:?}");
        match terminal.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => seen.push_str(&String::from_utf8_lossy(&buffer[..count])),
        }
    }
    assert!(seen.contains(wanted), "{wanted:?} did not appear in {seen:?}");
    seen
}

fn a_terminal_has_the_callers_size_and_follows_it() {
    let id = id("tty");
    on_terminal(&["run", "--rm", "--tty", "--runtime", RUNTIME, IMAGE, &id, "sh"], |terminal, ctr| {
        read_until(terminal, "# ");
        // The caller's size arrives a moment after the shell does.
        std::thread::sleep(Duration::from_secs(1));
        terminal.write_all(b"tty; stty size; echo first\n").unwrap();
        let seen = read_until(terminal, "first\r\n");
        assert!(seen.contains("/dev/pts/0") && seen.contains("33 101"), "{seen:?}");
        run("bash", &["-c", &format!("stty -F /proc/{ctr}/fd/0 rows 44 cols 120 && kill -WINCH {ctr}")]);
        std::thread::sleep(Duration::from_secs(1));
        terminal.write_all(b"stty size; exit\n").unwrap();
        read_until(terminal, "44 120");
    });
}

fn an_exec_can_have_a_terminal() {
    let pod = Pod::start("exec-tty", &[], "sleep 1000");
    on_terminal(&["task", "exec", "--tty", "--exec-id", "x", &pod.id, "sh"], |terminal, _| {
        read_until(terminal, "# ");
        terminal.write_all(b"tty && echo $((40+2)); exit\n").unwrap();
        let seen = read_until(terminal, "42\r\n");
        assert!(seen.contains("/dev/pts/"), "{seen:?}");
    });
}

fn a_log_file_uri_gets_the_output() {
    let path = format!("/tmp/{}.log", id("log"));
    let id = id("log");
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
        "echo to the file; echo and this >&2",
    ]);
    let pod = Pod { id };
    pod.wait_for("STOPPED");
    let start = Instant::now();
    while !std::fs::read_to_string(&path).is_ok_and(|text| text.contains("to the file\n") && text.contains("and this\n")) {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", std::fs::read_to_string(&path));
        std::thread::sleep(Duration::from_millis(100));
    }
}
