//! `caisson list`: the pods of this host, from their records.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use caisson_host::records;
use caisson_protocol::config::Config;
use caisson_protocol::record::PodRecord;

/// Prints one line a pod.
///
/// # Errors
/// When the run dir cannot be read.
pub fn print(config: &Config, json: bool) -> Result<()> {
    let pods = records::all(&config.run_dir).with_context(|| format!("read {}", config.run_dir.display()))?;
    if json {
        for pod in pods {
            println!("{}", serde_json::to_string(&pod)?);
        }
        return Ok(());
    }
    println!("{:<16} {:<40} {:<10} {:>5} {:>8} {:>10} {:>8}", "NAMESPACE", "POD", "STATE", "VCPUS", "MEMORY", "CONTAINERS", "AGE");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    for pod in pods {
        let age = now.saturating_sub(pod.created);
        println!(
            "{:<16} {:<40} {:<10} {:>5} {:>5}MiB {:>10} {:>7}s",
            pod.namespace,
            pod.pod,
            state(&pod),
            pod.vcpus,
            pod.memory_mib,
            pod.containers.len(),
            age
        );
        if let Some(failure) = &pod.failure {
            println!("{:<16} {failure}", "");
        }
    }
    Ok(())
}

/// What the processes of a pod say of it.
fn state(pod: &PodRecord) -> &'static str {
    let alive = |role: &str| pod.processes.iter().any(|process| process.role == role && records::is_alive(process));
    match (alive("shim"), alive("vmm")) {
        _ if pod.failure.is_some() => "failed",
        (true, true) => "running",
        (true, false) => "stopped",
        // The shim died; containerd's `delete` undoes the rest.
        (false, _) => "orphaned",
    }
}
