//! `cargo xtask tidy`: the house rules, as far as a program can check them.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use crate::build;

/// Longest file and function of Rust, in lines. The first is what reads well; tests count.
const MAX_FILE: usize = 500;
const MAX_FUNCTION: usize = 90;
/// Crates that may depend on which of ours. `tests` drive built programs and depend on none.
const LAYERS: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("sys", &[]),
    ("host", &["caisson-protocol", "caisson-sys"]),
    ("vmm", &["caisson-protocol", "caisson-host"]),
    ("fs", &["caisson-protocol", "caisson-host"]),
    ("shim", &["caisson-protocol", "caisson-sys", "caisson-host"]),
    ("ctl", &["caisson-protocol", "caisson-sys", "caisson-host"]),
    ("agent", &["caisson-protocol", "caisson-sys"]),
    ("guest-kernel", &[]),
    ("image-builder", &[]),
    ("tests", &[]),
    ("fuzz", &["caisson-protocol", "caisson-sys", "caisson-host", "caisson-vmm", "caisson-fs", "caisson-shim"]),
    ("xtask", &["caisson-guest-kernel", "caisson-image-builder"]),
];
/// Words that mark unfinished work, put together so that this file does not hold them.
const MARKS: &[&str] =
    &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("unimpl", "emented!"), concat!("#[ign", "ore")];

/// Checks all rules and prints each violation; returns the exit code.
pub fn run() -> Result<i32> {
    let sh = Shell::new()?;
    let top = build::source_dir()?;
    sh.change_dir(&top);
    let files: Vec<String> = cmd!(sh, "git ls-files --cached --others --exclude-standard")
        .quiet()
        .read()?
        .lines()
        .map(str::to_owned)
        .filter(|file| top.join(file).is_file())
        .collect();
    let mut problems = Vec::new();
    layers(&top, &mut problems)?;
    for file in &files {
        let text = std::fs::read_to_string(top.join(file)).unwrap_or_default();
        if file.ends_with(".rs") {
            rust_file(file, &text, &mut problems);
        }
        if file.ends_with(".md") && !file.starts_with("docs/decisions/") {
            named_paths(&top, file, &text, &mut problems);
        }
    }
    one_version_of_vm_memory(&top, &mut problems)?;
    for problem in &problems {
        println!("{problem}");
    }
    println!("tidy: {} files, {} problems", files.len(), problems.len());
    Ok(i32::from(!problems.is_empty()))
}

/// Which of our crates each of our crates depends on.
fn layers(top: &Path, problems: &mut Vec<String>) -> Result<()> {
    for (folder, allowed) in LAYERS {
        let path = top.join(folder).join("Cargo.toml");
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let dependencies = text.split("[dependencies]").nth(1).and_then(|rest| rest.split("\n[").next()).unwrap_or_default();
        for line in dependencies.lines() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if name.starts_with("caisson-") && !allowed.contains(&name) {
                problems.push(format!("{folder}/Cargo.toml: depends on {name}; allowed are {allowed:?}"));
            }
        }
    }
    // Devices know memory and interrupts, never KVM nor the shim.
    for entry in walk(&top.join("vmm/src/devices"))? {
        let text = std::fs::read_to_string(&entry)?;
        for word in ["kvm_ioctls", "kvm_bindings"] {
            if text.contains(word) {
                problems.push(format!("{}: a device must not know {word}", entry.display()));
            }
        }
    }
    Ok(())
}

fn walk(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(walk(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

fn rust_file(file: &str, text: &str, problems: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > MAX_FILE {
        problems.push(format!("{file}: {} lines; at most {MAX_FILE} read well", lines.len()));
    }
    if !text.starts_with("//!") {
        problems.push(format!("{file}: begins without saying what it is for (//!)"));
    }
    for (number, line) in lines.iter().enumerate() {
        for mark in MARKS {
            if line.contains(mark) {
                problems.push(format!("{file}:{}: {mark} marks unfinished work", number + 1));
            }
        }
        // Each opens with a SAFETY comment within the lines above it.
        if line.contains("unsafe {") && !lines[number.saturating_sub(6)..=number].iter().any(|line| line.contains("SAFETY:")) {
            problems.push(format!("{file}:{}: unsafe without SAFETY", number + 1));
        }
    }
    function_lengths(file, &lines, problems);
}

/// rustfmt puts a function's first and last line at the same indentation.
fn function_lengths(file: &str, lines: &[&str], problems: &mut Vec<String>) {
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let code = line.trim_start();
        let is_function =
            ["fn ", "pub fn ", "async fn ", "pub async fn ", "const fn ", "pub const fn "].iter().any(|prefix| code.starts_with(prefix));
        if !is_function || !line.ends_with('{') {
            continue;
        }
        let close = format!("{}}}", " ".repeat(indent));
        if let Some(length) = lines[start..].iter().position(|line| **line == close)
            && length > MAX_FUNCTION
        {
            problems.push(format!("{file}:{}: function of {length} lines; at most {MAX_FUNCTION} read well", start + 1));
        }
    }
}

/// Paths of the tree that documents name in backquotes must exist.
fn named_paths(top: &Path, file: &str, text: &str, problems: &mut Vec<String>) {
    let folders: BTreeSet<&str> = LAYERS.iter().map(|(folder, _)| *folder).chain(["docs", ".ci"]).collect();
    for quoted in text.split('`').skip(1).step_by(2) {
        let Some(first) = quoted.split('/').next() else { continue };
        let is_path = quoted.contains('/') && folders.contains(first) && !quoted.contains([' ', '*', '<', '{', '…']);
        if is_path && !top.join(quoted.trim_end_matches('/')).exists() {
            problems.push(format!("{file}: names `{quoted}`, which does not exist"));
        }
    }
}

fn one_version_of_vm_memory(top: &Path, problems: &mut Vec<String>) -> Result<()> {
    let lock = std::fs::read_to_string(top.join("Cargo.lock")).context("read Cargo.lock")?;
    let versions = lock.matches("name = \"vm-memory\"").count();
    if versions != 1 {
        problems.push(format!("Cargo.lock: {versions} versions of vm-memory instead of one"));
    }
    Ok(())
}
