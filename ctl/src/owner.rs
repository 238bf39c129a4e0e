//! What a pod's owners do with it, root or not: the way to its shim, and the requests that have one answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control::Control;
use caisson_host::records;
use caisson_protocol::config::Config;
use caisson_protocol::owner::{Answer, PodProcess, Request, SOCKET, Usage};
use caisson_protocol::record::PodRecord;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use serde::de::DeserializeOwned;

/// Between two looks at what may have more to show.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Bytes of an answer that is held in memory: a shim's answers are far smaller.
const MAX_ANSWER: u64 = 64 << 20;

/// The pods that the caller may see.
///
/// # Errors
/// When the run folder cannot be read.
fn pods(config: &Config) -> Result<Vec<PodRecord>> {
    records::all(&config.run_dir).with_context(|| format!("read {}", config.run_dir.display()))
}

/// The pod of an id or the beginning of one.
///
/// # Errors
/// When there is none, or more than one.
pub fn find(config: &Config, wanted: &str) -> Result<PodRecord> {
    let mut pods = pods(config)?;
    if let Some(exact) = pods.iter().position(|pod| pod.pod == wanted) {
        return Ok(pods.swap_remove(exact));
    }
    pods.retain(|pod| pod.pod.starts_with(wanted));
    match pods.len() {
        1 => Ok(pods.remove(0)),
        0 => bail!("there is no pod {wanted:?} here that is yours; `caisson list` shows those that are"),
        count => bail!("{wanted:?} is the beginning of {count} pods' ids"),
    }
}

/// Connects to a pod's shim.
///
/// # Errors
/// When the caller is none of the pod's owners, or its shim is gone.
pub fn connect(config: &Config, pod: &PodRecord) -> Result<Control> {
    let folder = records::pod_dir(&config.run_dir, &pod.namespace, &pod.pod);
    let connect = |folder: &Path| File::open(folder).and_then(|folder| Control::connect(folder, SOCKET));
    connect(&folder).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => anyhow::anyhow!("pod {}: you are none of its owners (pod.owners)", pod.pod),
        ErrorKind::ConnectionRefused | ErrorKind::NotFound => anyhow::anyhow!("pod {}: its shim is gone", pod.pod),
        _ => anyhow::Error::from(error).context(format!("connect to the shim of pod {}", pod.pod)),
    })
}

/// The next answer on a connection.
///
/// # Errors
/// What the shim says that failed, or that it is gone.
pub fn hear(shim: &Control) -> Result<(Answer, Option<File>)> {
    match shim.receive::<Answer>(true).context("hear from the pod's shim")? {
        None => bail!("the pod's shim is gone"),
        Some((Answer::Failed(reason), _)) => bail!("{reason}"),
        Some((answer, fds)) => Ok((answer, fds.into_iter().next().map(File::from))),
    }
}

fn ask(config: &Config, pod: &PodRecord, request: &Request) -> Result<(Answer, Option<File>)> {
    let shim = connect(config, pod)?;
    shim.send(request, &[] as &[BorrowedFd<'_>], true).context("ask the pod's shim")?;
    hear(&shim)
}

/// A file that was asked for, and what to ask for next.
fn ask_for_file(config: &Config, pod: &PodRecord, request: &Request) -> Result<(File, u64)> {
    match ask(config, pod, request)? {
        (Answer::File { next }, Some(file)) => Ok((file, next)),
        (answer, _) => bail!("the pod's shim answered {answer:?}"),
    }
}

fn ask_for<T: DeserializeOwned>(config: &Config, pod: &PodRecord, request: &Request) -> Result<T> {
    let (file, _) = ask_for_file(config, pod, request)?;
    let mut bytes = Vec::new();
    file.take(MAX_ANSWER).read_to_end(&mut bytes).context("read the answer of the pod's shim")?;
    serde_json::from_slice(&bytes).context("read the answer of the pod's shim")
}

/// Ends a pod.
///
/// # Errors
/// When its shim does not do so.
pub fn stop(config: &Config, pod: &str, timeout: Duration) -> Result<()> {
    let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    ask(config, &find(config, pod)?, &Request::Stop { timeout_ms }).map(drop)
}

/// Prints a container's output, as far as it is in a file.
///
/// # Errors
/// When it is not, or cannot be read.
pub fn logs(config: &Config, pod: &str, container: Option<String>, follow: bool) -> Result<()> {
    let (file, _) = ask_for_file(config, &find(config, pod)?, &Request::Log { container })?;
    let mut lines = io::BufReader::new(file);
    let mut line = Vec::new();
    loop {
        if io::BufRead::read_until(&mut lines, b'\n', &mut line).context("read the log")? == 0 {
            if !follow {
                return Ok(());
            }
            std::thread::sleep(LOOK_AGAIN);
            continue;
        }
        // The rest of a line may still come.
        if !line.ends_with(b"\n") && follow {
            continue;
        }
        let (text, is_error, part) = message(&line);
        let (mut out, is_terminal): (Box<dyn Write>, bool) = if is_error {
            (Box::new(io::stderr()), io::stderr().is_terminal())
        } else {
            (Box::new(io::stdout()), io::stdout().is_terminal())
        };
        // A file or another program gets what the container wrote.
        let safe = is_terminal.then(|| printable(&String::from_utf8_lossy(text)));
        let text = safe.as_ref().map_or(text, |safe| safe.as_bytes());
        let end: &[u8] = if part { b"" } else { b"\n" };
        if out.write_all(text).and_then(|()| out.write_all(end)).and_then(|()| out.flush()).is_err() {
            // Nobody reads any more.
            return Ok(());
        }
        line.clear();
    }
}

/// What a line of a log holds, whether it was an error's, and whether the next continues it: kubelet's
/// lines say so, "2026-01-31T12:00:00.0Z stderr P text"; others are as they are.
fn message(line: &[u8]) -> (&[u8], bool, bool) {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    match (fields.next(), fields.next(), fields.next(), fields.next()) {
        (Some(time), Some(stream @ (b"stdout" | b"stderr")), Some(tag @ (b"F" | b"P")), Some(text)) if time.contains(&b'T') => {
            (text, stream == b"stderr", tag == b"P")
        }
        _ => (line, false, false),
    }
}

/// Prints what the guest's kernel said.
///
/// # Errors
/// When the guest does not tell.
pub fn console(config: &Config, pod: &str, follow: bool) -> Result<()> {
    let pod = find(config, pod)?;
    let mut after = 0;
    loop {
        let (file, next) = ask_for_file(config, &pod, &Request::Console { after })?;
        let mut text = String::new();
        file.take(MAX_ANSWER).read_to_string(&mut text).context("read the kernel's log")?;
        if text.lines().try_for_each(|line| writeln!(io::stdout(), "{}", printable(line))).is_err() {
            return Ok(());
        }
        // An answer is bounded: there may be more at once.
        if next == after {
            if !follow {
                return Ok(());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        after = next;
    }
}

/// What a guest says, without what a terminal would take as a command, or which would have it show the rest in another
/// order (Unicode Standard Annex 9, 2).
fn printable(text: &str) -> String {
    let turns = |c| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if (c.is_control() && c != '\t') || turns(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Prints the processes of one pod, or of all that the caller owns.
///
/// # Errors
/// When the named pod cannot be asked.
pub fn top(config: &Config, pod: Option<&str>) -> Result<()> {
    println!("{:<16} {:<24} {:>7} {:>7} {:>11} COMMAND", "POD", "CONTAINER", "PID", "USER", "HOST-USER");
    of_each(config, pod, |pod| {
        let processes: Vec<PodProcess> = ask_for(config, pod, &Request::Top)?;
        for process in processes {
            let short = |id: &str, length: usize| printable(id).chars().take(length).collect::<String>();
            println!(
                "{:<16} {:<24} {:>7} {:>7} {:>11} {}",
                short(&pod.pod, 16),
                short(&process.container, 24),
                process.pid,
                process.user,
                process.host_user,
                printable(&process.command)
            );
        }
        Ok(())
    })
}

/// Does something with one pod, or with all that the caller owns; of these one that ends meanwhile is no failure.
fn of_each(config: &Config, pod: Option<&str>, mut act: impl FnMut(&PodRecord) -> Result<()>) -> Result<()> {
    if let Some(pod) = pod {
        return act(&find(config, pod)?);
    }
    let mut failures = Vec::new();
    for pod in pods(config)? {
        if let Err(error) = act(&pod)
            && pod.processes.iter().any(|process| process.role == "shim" && records::is_alive(process))
        {
            failures.push(format!("{error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    namespace: String,
    pod: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ContainerLabels {
    namespace: String,
    pod: String,
    container: String,
}

/// Prints what pods and containers use, as Prometheus reads it (OpenMetrics 1.0).
///
/// # Errors
/// When the named pod cannot be asked.
pub fn metrics(config: &Config, pod: Option<&str>) -> Result<()> {
    let (vcpus, machine_memory) = (Family::<PodLabels, Gauge>::default(), Family::<PodLabels, Gauge>::default());
    let cpu = Family::<ContainerLabels, Counter<f64, std::sync::atomic::AtomicU64>>::default();
    let gauges: BTreeMap<&str, Family<ContainerLabels, Gauge>> =
        ["memory", "memory_limit", "processes"].into_iter().map(|name| (name, Family::default())).collect();
    let oom_kills = Family::<ContainerLabels, Counter>::default();
    of_each(config, pod, |record| {
        let usage: Usage = ask_for(config, record, &Request::Metrics)?;
        let pod = PodLabels { namespace: record.namespace.clone(), pod: record.pod.clone() };
        vcpus.get_or_create(&pod).set(usage.vcpus.into());
        machine_memory.get_or_create(&pod).set(signed(usage.memory_mib << 20));
        for used in usage.containers {
            let labels = ContainerLabels { namespace: pod.namespace.clone(), pod: pod.pod.clone(), container: used.container };
            cpu.get_or_create(&labels).inc_by(used.cpu_us as f64 / 1e6);
            oom_kills.get_or_create(&labels).inc_by(used.oom_kills);
            for (name, value) in [("memory", used.memory), ("memory_limit", used.memory_limit), ("processes", used.pids)] {
                gauges[name].get_or_create(&labels).set(signed(value));
            }
        }
        Ok(())
    })?;
    let mut registry = Registry::with_prefix("caisson");
    registry.register("pod_vcpus", "vCPUs of a pod's machine", vcpus);
    registry.register_with_unit("pod_memory", "Memory of a pod's machine", Unit::Bytes, machine_memory);
    registry.register_with_unit("container_cpu", "Time on processors", Unit::Seconds, cpu);
    registry.register("container_oom_kills", "Processes killed for want of memory", oom_kills);
    for (name, family) in gauges {
        match name {
            "memory" => registry.register_with_unit("container_memory", "Memory in use", Unit::Bytes, family),
            "memory_limit" => {
                registry.register_with_unit("container_memory_limit", "Memory that may be used, 0 without limit", Unit::Bytes, family)
            }
            _ => registry.register("container_processes", "Processes and threads", family),
        }
    }
    let mut text = String::new();
    encode(&mut text, &registry).context("write the metrics")?;
    print!("{text}");
    Ok(())
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_kubelets_is_what_the_container_wrote() {
        assert_eq!(message(b"2026-11-23T20:00:00.1Z stderr F went wrong\n"), (&b"went wrong"[..], true, false));
        assert_eq!(message(b"2026-11-23T20:00:00.1Z stdout P half\n"), (&b"half"[..], false, true));
        assert_eq!(message(b"its own words\n"), (&b"its own words"[..], false, false));
    }

    #[test]
    fn what_a_guest_says_is_no_command_to_a_terminal() {
        assert_eq!(printable("a\x1b[2Jb\tc"), "a\u{fffd}[2Jb\tc");
        assert_eq!(printable("rm \u{202e}fdp.exe\u{2069} \u{9b}1m"), "rm \u{fffd}fdp.exe\u{fffd} \u{fffd}1m");
    }
}
