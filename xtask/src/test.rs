//! `cargo xtask test`: unit and property tests and fuzz targets here, node tests in a node, one closing line.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use xshell::{Shell, cmd};

use crate::node::{self, NodeArgs};
use crate::{build, fuzz, interrupt, progress};

/// Passed and failed, and what was said where one failed.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    said: Vec<String>,
}

impl Tally {
    /// One that failed.
    fn fail(&mut self, said: String) {
        self.failed += 1;
        self.said.push(said);
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.said.extend(other.said);
    }
}

/// A node for tests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    /// For most of them.
    Usual,
    /// With cgroup v1, for those whose names begin with [`CGROUP_V1`].
    CgroupV1,
    /// With two threads a core, for those whose names begin with [`THREADS`].
    Threads,
}

/// What the names of the tests begin with that have a node of their own.
const CGROUP_V1: &str = "cgroup_v1";
const THREADS: &str = "two_threads_a_core";

/// Runs the tests whose name contains `filter`, all without one, and those that take `long`; returns the exit code.
pub fn run(filter: Option<&str>, long: bool) -> Result<i32> {
    build::all()?;
    let mut all = unit_tests(filter)?;
    all.add(fuzz_targets(filter, if long { LONG_FUZZ_SECONDS } else { FUZZ_SECONDS })?);
    let share = tempfile::tempdir()?;
    build_node_tests(share.path())?;
    all.add(node_tests(share.path(), Node::Usual, filter, long)?);
    if filter.is_none_or(|filter| filter.starts_with(CGROUP_V1)) {
        all.add(node_tests(share.path(), Node::CgroupV1, filter, long)?);
    }
    if filter.map_or(long, |filter| filter.starts_with(THREADS)) {
        all.add(node_tests(share.path(), Node::Threads, filter, long)?);
    }
    // Again at the end, where a reader of a long log looks.
    for said in &all.said {
        println!("\nfailed: {said}");
    }
    println!("{} passed, {} failed", all.passed, all.failed);
    Ok(i32::from(all.failed > 0))
}

/// For each fuzz target, and the number that its inputs are drawn from: two runs of a fresh tree try much the same.
/// `cargo xtask fuzz` runs them for longer and goes other ways each time.
const FUZZ_SECONDS: u32 = 5;
const LONG_FUZZ_SECONDS: u32 = 60;
const FUZZ_CHANCE: u32 = 1;

/// The fuzz targets, from their seeds on for a short while; each counts as a test, `fuzz_` and its name.
fn fuzz_targets(filter: Option<&str>, seconds: u32) -> Result<Tally> {
    let wanted = |target: &&str| filter.is_none_or(|filter| format!("fuzz_{target}").contains(filter));
    let targets: Vec<&str> = fuzz::TARGETS.iter().copied().filter(wanted).collect();
    let mut tally = Tally::default();
    if targets.is_empty() {
        return Ok(tally);
    }
    for target in fuzz::build_targets()?.of(&targets) {
        match target.run(seconds, Some(FUZZ_CHANCE)) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                println!("{error:#}");
                tally.fail(format!("{error:#}"));
            }
        }
    }
    Ok(tally)
}

/// All unit tests end within this time, once they are built.
const UNIT_TESTS_TIMEOUT: Duration = Duration::from_secs(900);

/// `cargo test`, its own summary lines added up.
fn unit_tests(filter: Option<&str>) -> Result<Tally> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let sh = Shell::new()?;
    sh.change_dir(build::source_dir()?);
    progress::step("building the unit tests", || Ok(cmd!(sh, "{cargo} test --quiet --workspace --no-run").quiet().run()?))?;
    let mut command = Command::new(cargo);
    command.current_dir(build::source_dir()?).args(["test", "--quiet", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    // A group of its own, which ends as a whole when a test does not.
    let mut child = command.stdout(Stdio::piped()).process_group(0).spawn().context("run cargo test")?;
    let (ended, end) = mpsc::channel::<()>();
    let group = Pid::from_raw(child.id().cast_signed());
    let watch = std::thread::spawn(move || kill_late(group, &end));
    let (mut tally, mut failures) = (Tally::default(), Vec::new());
    for line in BufReader::new(child.stdout.take().context("read cargo's output")?).lines() {
        let line = line?;
        if let Some(counts) = line.strip_prefix("test result: ") {
            tally.passed += count(counts, " passed");
            tally.failed += counts.split("; ").find(|part| part.ends_with(" failed")).map_or(0, |part| count(part, " failed"));
            tally.said.extend((!failures.is_empty()).then(|| std::mem::take(&mut failures).join("\n")));
            continue;
        }
        println!("{line}");
        if line == "failures:" || !failures.is_empty() {
            failures.push(line);
        }
    }
    drop(ended);
    let late = watch.join().is_ok_and(|late| late);
    let status = child.wait()?;
    if late {
        tally.fail(format!("unit tests: no end after {} s; the last lines name the test", UNIT_TESTS_TIMEOUT.as_secs()));
    }
    // A test program that does not build or crashes has no summary line.
    if !status.success() && tally.failed == 0 {
        tally.fail(format!("cargo test ended with {status}"));
    }
    println!("unit and property tests: {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

/// Kills a process group that does not end in time, or is to end by Ctrl-C; returns whether it was late.
fn kill_late(group: Pid, end: &mpsc::Receiver<()>) -> bool {
    let start = Instant::now();
    while end.recv_timeout(Duration::from_millis(200)) == Err(mpsc::RecvTimeoutError::Timeout) {
        let late = start.elapsed() > UNIT_TESTS_TIMEOUT;
        if late || interrupt::seen() {
            // It may just have ended.
            let _ = killpg(group, Signal::SIGKILL);
            return late;
        }
    }
    false
}

/// The number before a word.
fn count(text: &str, word: &str) -> u64 {
    text.split(word).next().and_then(|before| before.rsplit([' ', '.']).next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Builds the node tests' program, what tries the monitor's jail from inside, and an agent that lies, and puts them into a
/// folder that a node will share.
pub fn build_node_tests(share: &Path) -> Result<()> {
    let sh = Shell::new()?;
    sh.change_dir(build::source_dir()?);
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    progress::step("building the node tests", || {
        cmd!(sh, "{cargo} build --quiet --package caisson-tests").quiet().run()?;
        cmd!(sh, "{cargo} build --quiet --package caisson-vmm --package caisson-fs --examples").quiet().run()?;
        build::hostile_initramfs(&share.join("hostile-initramfs"))
    })?;
    for probe in ["jail-probe", "register-probe", "share-probe"] {
        sh.copy_file(Path::new("target/debug/examples").join(probe), share.join(probe))?;
    }
    Ok(sh.copy_file("target/debug/node-tests", share.join("node-tests"))?)
}

/// The node tests' program, run in a node.
fn node_tests(share: &Path, node: Node, filter: Option<&str>, long: bool) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut done: Vec<String> = Vec::new();
    for attempt in 1.. {
        let script = if long { format!("{LONG} {NODE_SCRIPT}") } else { NODE_SCRIPT.to_owned() };
        let mut command: Vec<String> = ["bash", "-c", &script, "node-tests"].map(str::to_owned).to_vec();
        command.extend(filter.map(str::to_owned));
        command.extend(done.iter().flat_map(|name| ["--skip".to_owned(), name.clone()]));
        // Results of the run before are no results of this one.
        let _ = std::fs::remove_file(share.join("output"));
        let (cgroup_v1, threads) = (node == Node::CgroupV1, node == Node::Threads);
        let ended = node::run(&NodeArgs { cgroup_v1, threads, ..NodeArgs::usual(share, command) });
        let output = std::fs::read_to_string(share.join("output")).unwrap_or_default();
        for (name, failed) in results(&output) {
            match failed {
                None => tally.passed += 1,
                Some(said) => tally.fail(format!("{name}: {said}")),
            }
            done.push(name);
        }
        match ended {
            Ok(0) => break,
            // One test did not end, and the node may no longer be as the others need it.
            Ok(HUNG) if attempt < NODE_ATTEMPTS => println!("node tests: going on in a new node after {} tests", done.len()),
            Ok(_) if tally.failed > 0 => break,
            Ok(code) => {
                tally.fail(format!("node tests: the test program ended with code {code}"));
                break;
            }
            // The node itself went down, which its emulated processor does once in a while. The
            // tests that it had not finished get another node; a test that fails is not run again.
            Err(error) if attempt < NODE_ATTEMPTS && !interrupt::seen() => {
                println!("node tests: {error:#}\nnode tests: going on in a new node after {} tests", done.len())
            }
            Err(error) => return Err(error),
        }
    }
    println!("node tests: {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

/// The exit code of the tests' program when a test did not end.
const HUNG: i32 = 102;
/// Nodes that may go down under one test run.
const NODE_ATTEMPTS: u32 = 4;
/// Runs the tests' program; what it prints is kept outside of the node as it comes.
const NODE_SCRIPT: &str = "/share/node-tests \"$@\" > >(tee /share/output) 2>&1; code=$?; sleep 0.2; exit $code";

/// How much those tests do that can do more.
const LONG: &str = "export CAISSON_TEST_LONG=1 CAISSON_TEST_FLOOD=10 CAISSON_TEST_PODS=50 CAISSON_TEST_AT_ONCE=6 CAISSON_TEST_CALLS=600 CAISSON_TEST_SEEDS=20;";

/// The tests that a run finished, those that failed with what they said. What a test prints itself stands between its
/// name and its result.
fn results(output: &str) -> Vec<(String, Option<String>)> {
    let mut results = Vec::new();
    let mut running: Option<(String, Vec<&str>)> = None;
    for line in output.lines() {
        let mut rest = line;
        if let Some((name, after)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
            running = Some((name.trim().to_owned(), Vec::new()));
            rest = after;
        }
        let Some((_, said)) = &mut running else { continue };
        if !matches!(rest.trim(), "ok" | "FAILED") {
            said.push(rest);
        } else if let Some((name, said)) = running.take() {
            results.push((name, (rest.trim() == "FAILED").then(|| said.join("\n"))));
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use super::{count, results};

    #[test]
    fn finished_tests_are_found_in_the_output_of_a_run_that_broke_off() {
        let output = "running 4 tests\ntest a_works      ... ok\ntest b_works ... thread panicked\nat x\nFAILED\ntest c_works ... noise\nok\ntest d_wor";
        let expected = [("a_works", None), ("b_works", Some("thread panicked\nat x")), ("c_works", None)];
        assert_eq!(results(output), expected.map(|(name, said)| (name.to_owned(), said.map(str::to_owned))));
    }

    #[test]
    fn summaries_are_counted() {
        let line = "ok. 12 passed; 3 failed; 0 ignored";
        assert_eq!((count(line, " passed"), count("3 failed", " failed"), count("x", " passed")), (12, 3, 0));
        assert_eq!(count("FAILED. 4 passed; 1 failed", " passed"), 4);
    }
}
