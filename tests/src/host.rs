//! What a host has, for comparing before and after.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// Processes, mounts, sockets, folders and cgroups that pods make.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Takes stock.
    pub fn take() -> Self {
        let mut items = BTreeSet::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid.parse::<u32>().is_ok()
                && let Ok(name) = std::fs::read_to_string(entry.path().join("comm"))
                && ["containerd-shim", "caisson", "passt"].iter().any(|part| name.contains(part))
            {
                items.insert(format!("process {pid} {}", name.trim()));
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        items.extend(mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| format!("mount {point}")));
        // Not /run/containerd/fifo: ctr makes that, and removes it when it deletes a task, which a task
        // whose shim died never comes to.
        for dir in ["/run/caisson", "/run/containerd/s"] {
            walk(Path::new(dir), &mut items, true);
        }
        // A folder for each of its namespaces is containerd's own.
        for namespace in std::fs::read_dir("/run/containerd/io.containerd.runtime.v2.task").into_iter().flatten().flatten() {
            walk(&namespace.path(), &mut items, true);
        }
        walk(Path::new("/sys/fs/cgroup"), &mut items, false);
        Self(items)
    }

    /// What is here and was not in `before`.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// This and all mounts that are now below a folder.
    pub fn with_mounts_below(mut self, folder: &str) -> Self {
        self.0.extend(Self::take().0.into_iter().filter(|item| item.starts_with(&format!("mount {folder}/"))));
        self
    }
}

/// The last lines that shims wrote to containerd's log: why a machine ended, say.
pub fn shim_log() -> String {
    let log = std::fs::read("/var/log/containerd.log").unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("runtime=io.containerd.caisson.v2")).collect();
    lines[lines.len().saturating_sub(6)..].join("\n")
}

/// What the node's kernel said since `since`, in seconds after its start, as of a killed process or
/// an oops, and which of its tasks are stuck.
pub fn kernel_log(since: f64) -> String {
    // Lists the tasks that wait without being interruptible (Documentation/admin-guide/sysrq.rst).
    let _ = std::fs::write("/proc/sysrq-trigger", "w");
    let output = std::process::Command::new("dmesg").output().map(|output| output.stdout).unwrap_or_default();
    let time = |line: &str| line.strip_prefix('[')?.split(']').next()?.trim().parse::<f64>().ok();
    let text = String::from_utf8_lossy(&output);
    let lines: Vec<&str> = text.lines().filter(|line| time(line).is_some_and(|time| time >= since)).collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// A number from the environment: emulation does less in the time that a test run has, and `cargo xtask test --long` sets more.
pub fn number<N: std::str::FromStr>(variable: &str, default: N) -> N {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Seconds since the node's start.
pub fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

fn walk(dir: &Path, items: &mut BTreeSet<String>, files: bool) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_dir = path.is_dir();
        if is_dir || files {
            items.insert(format!("path {}", path.display()));
        }
        if is_dir {
            walk(&path, items, files);
        }
    }
}

/// Fails when something stays that was not there before; ends of processes are waited for.
pub fn assert_nothing_left(before: &Inventory) {
    let start = Instant::now();
    loop {
        let left = Inventory::take().beyond(before);
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "left behind: {left:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits for what comes in time, at most a minute.
pub fn eventually(mut holds: impl FnMut() -> bool, otherwise: &str) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "{otherwise}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
