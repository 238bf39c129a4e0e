//! Standard streams: whole, apart, in order, with back-pressure, and terminals.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr_ok, id, run_pod, run_with_input, shell};
use crate::host::number;

pub const TESTS: &[Test] = &[
    ("stdin_ends_when_its_writer_does", stdin_ends_when_its_writer_does),
    ("stdout_and_stderr_are_kept_apart", stdout_and_stderr_are_kept_apart),
    ("a_flood_of_output_arrives_whole", a_flood_of_output_arrives_whole),
    ("a_flood_of_input_arrives_whole", a_flood_of_input_arrives_whole),
    ("a_slow_reader_gets_everything_after_the_exit", a_slow_reader_gets_everything_after_the_exit),
    ("a_terminal_has_the_callers_size_and_follows_it", a_terminal_has_the_callers_size_and_follows_it),
    ("an_exec_can_have_a_terminal", an_exec_can_have_a_terminal),
    ("a_task_whose_caller_died_can_be_attached_to_again", a_task_whose_caller_died_can_be_attached_to_again),
    ("a_log_file_uri_gets_the_output", a_log_file_uri_gets_the_output),
    ("a_logging_program_gets_both_streams", a_logging_program_gets_both_streams),
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

/// How often a file of 20 MB goes through: `CAISSON_TEST_FLOOD=26` makes it half a gigabyte.
/// Emulation does less in the time that a test run has.
fn flood() -> String {
    let times = number("CAISSON_TEST_FLOOD", 1);
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
    // The container is done before its reader goes on: what is in flight is more than pipes hold.
    let reader = "(head -c 1; sleep 3; cat) | md5sum";
    let got = shell(&format!("ctr run --rm --runtime {RUNTIME} {IMAGE} {id} sh -c 'seq 1 40000' | {reader}"));
    assert_eq!(got, shell("seq 1 40000 | md5sum"));
}

/// `ctr` on a terminal of its own, 33 rows by 101 columns, typed at and looked at by a test.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    seen: Arc<Mutex<String>>,
    grow: String,
}

impl Terminal {
    fn start(ctr: &str) -> Self {
        let name = id("/tmp/terminal");
        let (script, grow) = (format!("{name}.sh"), format!("{name}.grow"));
        // The terminal grows when the test says so: a change of size is a signal to what runs on it.
        let watch = format!("(until [ -e {grow} ]; do sleep 0.1; done; stty -F $terminal rows 40 cols 120) &");
        let text = format!("terminal=$(tty)\nstty rows 33 cols 101\n{watch}\nctr {ctr}\necho ctr ended with $?\n");
        std::fs::write(&script, text).unwrap();
        let mut child = Command::new("socat")
            .args(["-", &format!("EXEC:bash {script},pty,setsid,ctty")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It complains of the terminal that a test does not have.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (keys, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(String::new()));
        let shown = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, keys, seen, grow }
    }

    /// Waits until the terminal has shown `text` after what it had shown before.
    fn wait_for(&self, text: &str) {
        let start = Instant::now();
        loop {
            let mut seen = self.seen.lock().unwrap();
            if let Some(at) = seen.find(text) {
                seen.drain(..at + text.len());
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the terminal shows {:?} and not {text:?}", *seen);
            drop(seen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn enter(&mut self, line: &str) {
        self.keys.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn grow(&self) {
        std::fs::write(&self.grow, "").unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn a_terminal_has_the_callers_size_and_follows_it() {
    let id = id("tty");
    let mut terminal = Terminal::start(&format!("run --rm --tty --runtime {RUNTIME} {IMAGE} {id} sh"));
    terminal.wait_for("# ");
    terminal.enter("tty; stty size");
    terminal.wait_for("/dev/pts/0");
    terminal.wait_for("33 101");
    terminal.wait_for("# ");
    terminal.enter("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.1; done; echo gr''ew");
    terminal.grow();
    terminal.wait_for("grew");
    terminal.enter("exit 3");
    terminal.wait_for("ctr ended with 3");
}

fn an_exec_can_have_a_terminal() {
    let pod = Pod::start("exec-tty", &[], "sleep 1000");
    let mut terminal = Terminal::start(&format!("task exec --tty --exec-id x {} sh", pod.id));
    terminal.wait_for("# ");
    terminal.enter("tty; echo $((40+2))");
    terminal.wait_for("/dev/pts/");
    terminal.wait_for("42");
    terminal.enter("exit 4");
    terminal.wait_for("ctr ended with 4");
}

fn a_task_whose_caller_died_can_be_attached_to_again() {
    let id = id("attach");
    let mut caller = Command::new("ctr")
        .args([
            "run",
            "--runtime",
            RUNTIME,
            IMAGE,
            &id,
            "sh",
            "-c",
            "n=0; while read line; do n=$((n+1)); echo $n $line; [ $line = two ] && exit 6; done",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pod = Pod { id };
    let mut keys = caller.stdin.take().unwrap();
    let mut screen = BufReader::new(caller.stdout.take().unwrap());
    keys.write_all(b"one\n").unwrap();
    let mut line = String::new();
    screen.read_line(&mut line).unwrap();
    assert_eq!(line, "1 one\n");
    caller.kill().unwrap();
    caller.wait().unwrap();
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
    let output = run_with_input("ctr", &["task", "attach", &pod.id], b"two\n");
    assert_eq!((output.code, output.stdout.as_str()), (6, "2 two\n"), "{output:?}");
}

fn a_logging_program_gets_both_streams() {
    let name = id("/tmp/logger");
    let program = format!("{name}.sh");
    std::fs::write(&program, "#!/bin/bash\nexec 5>&-\ncat <&4 > $2.err & cat <&3 > $2.out; wait\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let id = id("binary");
    let uri = format!("binary://{program}?to={name}");
    ctr_ok(&["run", "--detach", "--log-uri", &uri, "--runtime", RUNTIME, IMAGE, &id, "sh", "-c", "echo to out; echo to err >&2"]);
    let pod = Pod { id };
    pod.wait_for("STOPPED");
    eventually_contains(&format!("{name}.out"), "to out\n");
    eventually_contains(&format!("{name}.err"), "to err\n");
}

/// Waits until a file contains `text`.
fn eventually_contains(path: &str, text: &str) {
    let start = Instant::now();
    while !std::fs::read_to_string(path).is_ok_and(|content| content.contains(text)) {
        assert!(start.elapsed() < Duration::from_secs(10), "{path}: {:?}", std::fs::read_to_string(path));
        std::thread::sleep(Duration::from_millis(100));
    }
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
    eventually_contains(&path, "to the file\n");
    eventually_contains(&path, "and this\n");
}
