//! Standard streams: whole, apart, in order, with back-pressure, and terminals.

use std::time::{Duration, Instant};

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr_ok, id, run, run_pod, run_with_input};

pub const TESTS: &[Test] = &[
    ("stdin_ends_when_its_writer_does", stdin_ends_when_its_writer_does),
    ("stdout_and_stderr_are_kept_apart", stdout_and_stderr_are_kept_apart),
    ("a_flood_of_output_arrives_whole", a_flood_of_output_arrives_whole),
    ("a_flood_of_input_arrives_whole", a_flood_of_input_arrives_whole),
    ("a_slow_reader_gets_everything_after_the_exit", a_slow_reader_gets_everything_after_the_exit),
    ("a_terminal_has_the_callers_size", a_terminal_has_the_callers_size),
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

/// How often a file of 20 MB goes through: `CAISSON_TEST_FLOOD=26` makes it half a gigabyte.
/// Emulation does less in the time that a test run has.
fn flood() -> String {
    let times = std::env::var("CAISSON_TEST_FLOOD").ok().and_then(|text| text.parse().ok()).unwrap_or(1u32);
    format!("for i in $(seq {times}); do cat /usr/share/caisson/vmlinux; done")
}

fn a_flood_of_output_arrives_whole() {
    let (id, flood) = (id("out"), flood());
    let mount = "type=bind,src=/usr/share/caisson,dst=/usr/share/caisson,options=rbind:ro";
    let got = shell(&format!("ctr run --rm --mount {mount} --runtime {RUNTIME} {IMAGE} {id} sh -c '{flood}' | md5sum"));
    assert_eq!(got, shell(&format!("({flood}) | md5sum")));
}

fn a_flood_of_input_arrives_whole() {
    let (id, flood) = (id("big-in"), flood());
    let got = shell(&format!("({flood}) | ctr run --rm --runtime {RUNTIME} {IMAGE} {id} md5sum"));
    assert_eq!(got, shell(&format!("({flood}) | md5sum")));
}

fn a_slow_reader_gets_everything_after_the_exit() {
    let id = id("slow");
    // The container is done long before its reader: what is in flight is in pipes and buffers.
    let got = shell(&format!("ctr run --rm --runtime {RUNTIME} {IMAGE} {id} sh -c 'seq 1 60000' | (sleep 6; md5sum)"));
    assert_eq!(got, shell("seq 1 60000 | md5sum"));
}

/// Runs `ctr` on a terminal of 33 rows and 101 columns, types `keys` once the shell is there, and
/// returns what the terminal showed.
fn on_terminal(ctr: &str, keys: &str) -> String {
    let script = format!("/tmp/{}.sh", id("terminal"));
    std::fs::write(&script, format!("stty rows 33 cols 101; exec ctr {ctr}\n")).unwrap();
    let typed = format!("(sleep 12; printf '{keys}'; sleep 3; printf 'exit\\n'; sleep 2)");
    let output = run("bash", &["-c", &format!("{typed} | timeout 60 socat - 'EXEC:bash {script},pty,setsid,ctty'")]);
    output.stdout
}

fn a_terminal_has_the_callers_size() {
    let id = id("tty");
    let seen = on_terminal(&format!("run --rm --tty --runtime {RUNTIME} {IMAGE} {id} sh"), "tty; stty size\\n");
    assert!(seen.contains("/dev/pts/0") && seen.contains("33 101"), "{seen:?}");
}

fn an_exec_can_have_a_terminal() {
    let pod = Pod::start("exec-tty", &[], "sleep 1000");
    let seen = on_terminal(&format!("task exec --tty --exec-id x {} sh", pod.id), "tty; echo $((40+2))\\n");
    assert!(seen.contains("/dev/pts/") && seen.contains("42"), "{seen:?}");
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
