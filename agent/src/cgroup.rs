//! A container's cgroup (Linux `Documentation/admin-guide/cgroup-v2.rst`).

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_protocol::agent::{IoStats, StatsResponse};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

const MOUNT: &str = "/sys/fs/cgroup";
/// All containers' cgroups are children of this one.
const PARENT: &str = "/caisson";
/// How long processes that were killed may take to disappear.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// The cgroup of one container.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The cgroup of a container, which need not exist.
    pub fn of(container: &str) -> Self {
        Self(PathBuf::from(format!("{MOUNT}{PARENT}/{container}")))
    }

    /// The one that all containers' lie in.
    pub fn all() -> Self {
        Self(PathBuf::from(format!("{MOUNT}{PARENT}")))
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        std::fs::write(self.0.join(file), value).with_context(|| format!("write {value:?} to the container's {file}"))
    }

    /// Makes it, with the limits that a specification asks for.
    pub fn create(&self, resources: Option<&oci_spec::runtime::LinuxResources>) -> Result<()> {
        let parent = Path::new(MOUNT).join(PARENT.trim_start_matches('/'));
        if !parent.exists() {
            std::fs::create_dir(&parent).context("create the containers' cgroup")?;
            enable_controllers(&parent)?;
        }
        std::fs::create_dir(&self.0).context("create the container's cgroup")?;
        resources.map_or(Ok(()), |resources| self.update(resources))
    }

    /// Moves the calling process into it.
    pub fn enter(&self) -> Result<()> {
        self.write("cgroup.procs", "0")
    }

    /// Kills every process in it; it may be gone.
    pub fn kill_all(&self) -> Result<()> {
        if self.0.exists() { self.write("cgroup.kill", "1") } else { Ok(()) }
    }

    /// Sends a signal to every process in it.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        for pid in self.pids()? {
            // A process that has just exited needs no signal.
            let _ = sys::kill(Pid::from_raw(pid.cast_signed()), signal);
        }
        Ok(())
    }

    /// Processes in it and below.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_pids(&self.0, &mut pids).context("read the container's processes")?;
        Ok(pids)
    }

    /// Stops or continues every process in it.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let start = Instant::now();
        let wanted = if frozen { "frozen 1" } else { "frozen 0" };
        while !std::fs::read_to_string(self.0.join("cgroup.events")).context("read cgroup.events")?.contains(wanted) {
            if start.elapsed() > EMPTY_TIMEOUT {
                bail!("the container did not reach the state {wanted:?} within {} s", EMPTY_TIMEOUT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Removes it with its children, waiting for killed processes to disappear.
    pub fn remove(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match remove_tree(&self.0) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                Err(error) if start.elapsed() > EMPTY_TIMEOUT => return Err(error).context("remove the container's cgroup"),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Applies new limits. What is not mentioned stays.
    ///
    /// Limits on what only the host has (its processors and memory nodes by number, its page
    /// sizes, its disks) are not the guest's to enforce; they are passed over.
    pub fn update(&self, resources: &oci_spec::runtime::LinuxResources) -> Result<()> {
        for (file, value) in limits(resources) {
            if self.is_of_the_host(&file, &value) {
                continue;
            }
            match std::fs::write(self.0.join(&file), &value) {
                Err(error) if file == "io.max" && error.raw_os_error() == Some(libc::ENODEV) => {}
                outcome => outcome.with_context(|| format!("write {value:?} to the container's {file}"))?,
            }
        }
        Ok(())
    }

    fn is_of_the_host(&self, file: &str, value: &str) -> bool {
        match file {
            "cpuset.cpus" | "cpuset.mems" => {
                let has = std::fs::read_to_string(Path::new(MOUNT).join(format!("{file}.effective"))).unwrap_or_default();
                !is_within(value, &has)
            }
            _ => file.starts_with("hugetlb.") && !self.0.join(file).exists(),
        }
    }

    /// Follows how often processes in it are killed for want of memory.
    pub fn memory_events(&self) -> Result<MemoryEvents> {
        let file = File::open(self.0.join("memory.events")).context("open the container's memory.events")?;
        Ok(MemoryEvents(sys::watch_exceptions(file).context("watch the container's memory.events")?))
    }

    /// Its counters.
    pub fn stats(&self) -> StatsResponse {
        let number = |file: &str| std::fs::read_to_string(self.0.join(file)).ok().and_then(|text| parse_number(text.trim())).unwrap_or(0);
        let table = |file: &str| std::fs::read_to_string(self.0.join(file)).map(|text| parse_table(&text)).unwrap_or_default();
        let cpu = table("cpu.stat");
        let of = |name: &str| cpu.get(name).copied().unwrap_or(0);
        StatsResponse {
            pids_current: number("pids.current"),
            pids_limit: number("pids.max"),
            cpu_usage_us: of("usage_usec"),
            cpu_user_us: of("user_usec"),
            cpu_system_us: of("system_usec"),
            cpu_periods: of("nr_periods"),
            cpu_throttled: of("nr_throttled"),
            cpu_throttled_us: of("throttled_usec"),
            memory_usage: number("memory.current"),
            memory_limit: number("memory.max"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            memory_stat: table("memory.stat"),
            memory_events: table("memory.events"),
            io: std::fs::read_to_string(self.0.join("io.stat")).map(|text| parse_io(&text)).unwrap_or_default(),
            ..StatsResponse::default()
        }
    }

    /// How often a process in it was killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        std::fs::read_to_string(self.0.join("memory.events")).map_or(0, |text| oom_kills(&text))
    }
}

/// The count in the text of a memory.events.
fn oom_kills(text: &str) -> u64 {
    parse_table(text).get("oom_kill").copied().unwrap_or(0)
}

/// An open memory.events.
pub struct MemoryEvents(AsyncFd<File>);

impl MemoryEvents {
    /// How many processes were killed for want of memory.
    pub fn oom_kills(&self) -> Result<u64> {
        let mut text = [0; 512];
        let size = self.0.get_ref().read_at(&mut text, 0).context("read memory.events")?;
        Ok(oom_kills(&String::from_utf8_lossy(&text[..size])))
    }

    /// Waits until something in the file has changed since it was read.
    pub async fn changed(&mut self) -> Result<()> {
        self.0.ready_mut(Interest::PRIORITY).await.context("wait for memory.events")?.clear_ready();
        Ok(())
    }
}

/// Whether every number of a kernel list (`0-2,5`) is in another one.
fn is_within(list: &str, other: &str) -> bool {
    let numbers = |list: &str| -> Option<Vec<std::ops::RangeInclusive<u32>>> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
        };
        list.trim().split(',').map(range).collect()
    };
    let (Some(list), Some(other)) = (numbers(list), numbers(other)) else { return false };
    // Ranges of the kernel's own list never touch, so one of them holds all of a range.
    list.iter().all(|range| other.iter().any(|has| has.contains(range.start()) && has.contains(range.end())))
}

/// Lets the children of a cgroup use every controller that it has.
pub fn enable_controllers(cgroup: &Path) -> Result<()> {
    let controllers = std::fs::read_to_string(cgroup.join("cgroup.controllers")).context("read the cgroup controllers")?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    std::fs::write(cgroup.join("cgroup.subtree_control"), enable.join(" ")).context("enable the cgroup controllers")
}

fn collect_pids(dir: &Path, pids: &mut Vec<u32>) -> std::io::Result<()> {
    pids.extend(std::fs::read_to_string(dir.join("cgroup.procs"))?.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_pids(&path, pids)?;
        }
    }
    Ok(())
}

/// cgroups are removed folder by folder; the files in them are the kernel's.
fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_tree(&path)?;
        }
    }
    std::fs::remove_dir(dir)
}

/// A counter; "max" is the largest number, as containerd's own statistics have it.
fn parse_number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// Lines of a name and a number.
fn parse_table(text: &str) -> HashMap<String, u64> {
    text.lines().filter_map(|line| line.split_once(' ')).filter_map(|(name, value)| Some((name.to_owned(), parse_number(value)?))).collect()
}

/// Lines of `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...`.
fn parse_io(text: &str) -> Vec<IoStats> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let values: HashMap<&str, u64> =
                words.filter_map(|word| word.split_once('=')).filter_map(|(name, value)| Some((name, value.parse().ok()?))).collect();
            let of = |name: &str| values.get(name).copied().unwrap_or(0);
            Some(IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                read_bytes: of("rbytes"),
                write_bytes: of("wbytes"),
                read_ios: of("rios"),
                write_ios: of("wios"),
                ..IoStats::default()
            })
        })
        .collect()
}

/// The files and values that an OCI resources object asks for (runtime-spec `config-linux.md`,
/// translated to cgroup v2 as runc and crun do).
fn limits(resources: &oci_spec::runtime::LinuxResources) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut set = |file: &str, value: String| files.push((file.to_owned(), value));
    let or_max = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };
    if let Some(memory) = resources.memory() {
        // Zero means that nothing is asked for.
        if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
            set("memory.max", or_max(limit));
        }
        if let (Some(swap), Some(limit)) = (memory.swap().filter(|swap| *swap != 0), memory.limit()) {
            // OCI counts memory and swap together.
            set("memory.swap.max", if swap < 0 { "max".into() } else { (swap - limit).max(0).to_string() });
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
            set("memory.low", or_max(reservation));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            // 2..262144 to 1..10000.
            set("cpu.weight", (1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142).to_string());
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|quota| *quota > 0).map_or_else(|| "max".to_owned(), |quota| quota.to_string());
            set("cpu.max", format!("{quota} {}", cpu.period().filter(|period| *period > 0).unwrap_or(100_000)));
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            set("cpuset.cpus", cpus.clone());
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            set("cpuset.mems", mems.clone());
        }
    }
    if let Some(idle) = resources.cpu().as_ref().and_then(|cpu| cpu.idle()) {
        set("cpu.idle", idle.to_string());
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        set(&format!("hugetlb.{}.max", limit.page_size()), limit.limit().to_string());
        // What is reserved by mmap counts as well as what is touched.
        set(&format!("hugetlb.{}.rsvd.max", limit.page_size()), limit.limit().to_string());
    }
    if let Some(io) = resources.block_io() {
        if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
            // 10..1000 to 1..10000.
            set("io.weight", format!("default {}", 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990));
        }
        for (devices, key) in [
            (io.throttle_read_bps_device(), "rbps"),
            (io.throttle_write_bps_device(), "wbps"),
            (io.throttle_read_iops_device(), "riops"),
            (io.throttle_write_iops_device(), "wiops"),
        ] {
            for device in devices.iter().flatten() {
                set("io.max", format!("{}:{} {key}={}", device.major(), device.minor(), device.rate()));
            }
        }
    }
    if let Some(pids) = resources.pids() {
        set("pids.max", if pids.limit() <= 0 { "max".into() } else { pids.limit().to_string() });
    }
    if let Some(unified) = resources.unified() {
        let mut unified: Vec<_> = unified.iter().collect();
        unified.sort();
        for (file, value) in unified {
            // A file's name, never a path.
            if !file.contains('/') {
                set(file, value.clone());
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_number("max"), Some(u64::MAX));
        assert_eq!(parse_table("low 0\noom_kill 2\n")["oom_kill"], 2);
        let io = parse_io("253:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n\n");
        assert_eq!((io[0].major, io[0].read_bytes, io[0].read_ios), (253, 4096, 1));
    }

    #[test]
    fn a_processor_that_the_guest_lacks_is_found() {
        assert!(is_within("0", "0-1\n") && is_within("0-1,3", "0-3") && is_within("1", "0-1"));
        assert!(!is_within("2-3", "0-1\n") && !is_within("1-2", "0-1") && !is_within("x", "0-1"));
    }

    #[test]
    fn limits_become_the_files_of_cgroup_v2() {
        let resources: oci_spec::runtime::LinuxResources = serde_json::from_str(
            r#"{"memory":{"limit":1048576,"swap":2097152},"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0"},"pids":{"limit":10},"unified":{"memory.high":"5","a/b":"6"}}"#,
        )
        .unwrap();
        let files: HashMap<String, String> = limits(&resources).into_iter().collect();
        let expected = [
            ("memory.max", "1048576"),
            ("memory.swap.max", "1048576"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0"),
            ("pids.max", "10"),
            ("memory.high", "5"),
        ];
        assert_eq!(files, expected.into_iter().map(|(file, value)| (file.to_owned(), value.to_owned())).collect());
    }
}
