//! containerd's command line, as the tests use it.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const RUNTIME: &str = "io.containerd.caisson.v2";
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// Containers that have the node's programs.
pub const NODES_PROGRAMS: [&str; 6] = [
    "--mount",
    "type=bind,src=/usr,dst=/usr,options=rbind:ro",
    "--mount",
    "type=bind,src=/usr/lib,dst=/lib,options=rbind:ro",
    "--mount",
    "type=bind,src=/usr/lib64,dst=/lib64,options=rbind:ro",
];
/// Longer than any command takes here, shorter than a test run's patience.
const LIMIT: Duration = Duration::from_secs(300);

/// What a command left.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// An id that no other test has.
pub fn id(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs a command to its end, with bytes on standard input.
pub fn run_with_input(program: &str, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A command that does not read its input closes it.
        let _ = stdin.write_all(&input);
    });
    let output = finish(child, program, arguments);
    writer.join().unwrap();
    output
}

/// Waits for a child within the limit and collects its output.
pub fn finish(mut child: Child, program: &str, arguments: &[&str]) -> Output {
    fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            bytes
        })
    }
    let (stdout, stderr) = (collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap()));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("{program} {} did not end within {} s", arguments.join(" "), LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Output {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout.join().unwrap()).into_owned(),
        stderr: String::from_utf8_lossy(&stderr.join().unwrap()).into_owned(),
    }
}

/// Runs a command to its end.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    run_with_input(program, arguments, b"")
}

/// Runs a shell line on the node, which must succeed; returns its output.
pub fn shell(line: &str) -> String {
    let output = run("bash", &["-o", "pipefail", "-c", line]);
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.stdout.trim().to_owned()
}

/// `ctr ARGUMENTS`.
pub fn ctr(arguments: &[&str]) -> Output {
    run("ctr", arguments)
}

/// `ctr ARGUMENTS`, which must succeed; returns standard output.
pub fn ctr_ok(arguments: &[&str]) -> String {
    let output = ctr(arguments);
    assert_eq!(output.code, 0, "ctr {}: {output:?}", arguments.join(" "));
    output.stdout
}

/// `ctr run --rm` of a command in a fresh pod.
pub fn run_pod(options: &[&str], command: &[&str]) -> Output {
    let id = id("t");
    let mut arguments = vec!["run", "--rm", "--runtime", RUNTIME];
    arguments.extend_from_slice(options);
    arguments.extend_from_slice(&[IMAGE, &id]);
    arguments.extend_from_slice(command);
    ctr(&arguments)
}

/// A detached pod, removed when the test ends however it ends.
pub struct Pod {
    pub id: String,
}

impl Pod {
    /// Starts a detached pod that runs `script` in a shell.
    pub fn start(name: &str, options: &[&str], script: &str) -> Self {
        let id = id(name);
        let mut arguments = vec!["run", "--detach", "--runtime", RUNTIME];
        arguments.extend_from_slice(options);
        arguments.extend_from_slice(&[IMAGE, &id, "sh", "-c", script]);
        ctr_ok(&arguments);
        Self { id }
    }

    /// Runs a command in it.
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Output {
        let exec = id("e");
        let mut arguments = vec!["task", "exec", "--exec-id", &exec];
        arguments.extend_from_slice(options);
        arguments.push(&self.id);
        arguments.extend_from_slice(command);
        ctr(&arguments)
    }

    /// What `ctr task ls` says of it, or nothing.
    pub fn status(&self) -> Option<String> {
        let list = ctr_ok(&["task", "ls"]);
        list.lines()
            .find(|line| line.split_whitespace().next() == Some(self.id.as_str()))
            .and_then(|line| line.split_whitespace().last().map(str::to_owned))
    }

    /// Waits for a status.
    pub fn wait_for(&self, status: &str) {
        let start = Instant::now();
        while self.status().as_deref() != Some(status) {
            assert!(start.elapsed() < Duration::from_secs(30), "{} is {:?} instead of {status}", self.id, self.status());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Deletes the stopped task; returns the task's exit code, which ctr 2 gives in a warning.
    pub fn delete(&self) -> i32 {
        let output = ctr(&["task", "delete", &self.id]);
        let warned =
            output.stderr.split("exit code ").nth(1).and_then(|rest| rest.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok());
        warned.unwrap_or(output.code)
    }

    /// Process id of one of the pod's host processes, by role.
    pub fn host_pid(&self, role: &str) -> u32 {
        host_pid(&self.id, role)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = ctr(&["task", "kill", "--signal", "SIGKILL", &self.id]);
        let _ = ctr(&["task", "delete", "--force", &self.id]);
        let _ = ctr(&["container", "delete", &self.id]);
    }
}

/// What `caisson list` says of a pod.
pub fn record(pod: &str) -> serde_json::Value {
    let records = run("caisson", &["list", "--json"]);
    let mut records_of_pods = records.stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records_of_pods.find(|record| record["pod"] == pod).unwrap_or_else(|| panic!("{pod} is not in {records:?}"))
}

/// Process id of one of a pod's host processes, by role.
pub fn host_pid(pod: &str, role: &str) -> u32 {
    let record = record(pod);
    let process = record["processes"].as_array().unwrap().iter().find(|process| process["role"] == role);
    let process = process.unwrap_or_else(|| panic!("no {role} in {record}"));
    u32::try_from(process["pid"].as_u64().unwrap()).unwrap()
}
