//! `cargo xtask test`: unit and property tests here, node tests in a node, one closing line.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use crate::node::{self, NodeArgs};
use crate::{build, progress};

/// Passed and failed.
#[derive(Default, Clone, Copy)]
struct Tally {
    passed: u64,
    failed: u64,
}

/// Runs the tests whose name contains `filter`, all without one; returns the exit code.
pub fn run(filter: Option<&str>) -> Result<i32> {
    build::all()?;
    let unit = unit_tests(filter)?;
    let node = node_tests(filter)?;
    println!("{} passed, {} failed", unit.passed + node.passed, unit.failed + node.failed);
    Ok(i32::from(unit.failed + node.failed > 0))
}

/// `cargo test`, its own summary lines added up.
fn unit_tests(filter: Option<&str>) -> Result<Tally> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(build::source_dir()?).args(["test", "--quiet", "--workspace", "--no-fail-fast"]);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let mut tally = Tally::default();
    for line in BufReader::new(child.stdout.take().context("read cargo's output")?).lines() {
        let line = line?;
        if let Some(counts) = line.strip_prefix("test result: ") {
            tally.passed += count(counts, " passed");
            tally.failed += counts.split("; ").find(|part| part.ends_with(" failed")).map_or(0, |part| count(part, " failed"));
        } else {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    // A test program that does not build or crashes has no summary line.
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    println!("unit and property tests: {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

/// The number before a word.
fn count(text: &str, word: &str) -> u64 {
    text.split(word).next().and_then(|before| before.rsplit([' ', '.']).next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// The node tests' program, run in a node.
fn node_tests(filter: Option<&str>) -> Result<Tally> {
    let sh = Shell::new()?;
    sh.change_dir(build::source_dir()?);
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    progress::step("building the node tests", || Ok(cmd!(sh, "{cargo} build --quiet --release --package caisson-tests").quiet().run()?))?;
    let share = tempfile::tempdir()?;
    sh.copy_file("target/release/node-tests", share.path().join("node-tests"))?;
    let mut command = vec!["bash".to_owned(), "-c".to_owned(), "/share/node-tests \"$@\" > >(tee /share/output) 2>&1; code=$?; sleep 0.2; exit $code".to_owned(), "node-tests".to_owned()];
    command.extend(filter.map(str::to_owned));
    let code = node::run(&NodeArgs::usual(share.path(), command))?;
    let output = std::fs::read_to_string(share.path().join("output")).unwrap_or_default();
    // The program's own closing line.
    let mut tally = Tally::default();
    if let Some(line) = output.lines().rev().find(|line| line.contains(" passed, ") && line.ends_with(" failed")) {
        tally.passed = count(line, " passed");
        tally.failed = line.rsplit(", ").next().map_or(0, |text| count(text, " failed"));
    }
    if code != 0 && tally.failed == 0 {
        tally.failed = 1;
    }
    println!("node tests: {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn summaries_are_counted() {
        let line = "ok. 12 passed; 3 failed; 0 ignored";
        assert_eq!((count(line, " passed"), count("3 failed", " failed"), count("x", " passed")), (12, 3, 0));
        assert_eq!(count("FAILED. 4 passed; 1 failed", " passed"), 4);
    }
}
