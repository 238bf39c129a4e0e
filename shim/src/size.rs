//! The size of a pod's machine: what it starts with, what its containers need, what it may become.
//!
//! A machine has at least what it started with. When containers that come, go, or get other limits
//! need more, vCPUs are made and the guest takes memory; when they need less, it gives back what
//! it took.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use caisson_protocol::config::Config;
use caisson_protocol::vmm::ADDED_MIB_STEP;
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;

use crate::agent::Agent;
use crate::vmm::Vmm;

/// `cpu.period` when a quota comes without one, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// The size of huge pages that a guest has, as `hugepageLimits` writes it, their limit among the
/// `unified` ones, and the most bytes in them.
const HUGE_PAGE: &str = "2MB";
const HUGE_PAGES_MAX: &str = "hugetlb.2MB.max";
const MOST_HUGE_PAGES: u64 = 1 << 40;
/// From this much memory on Linux may give blocks of memory another size than [`ADDED_MIB_STEP`]: where
/// memory ends behind 64 GiB, with the devices' 768 MiB in between.
const LARGE_MIB: u64 = (64 << 10) - 768;
/// The kernel keeps memory for each CPU that may come: at most so many times those that it starts with.
const VCPU_FACTOR: u32 = 8;
/// What is added is a multiple of this many MiB: no kernel takes memory in larger blocks.
const BLOCK_MIB: u64 = 4;

/// What a container may use; `None` where it has no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Microseconds of a CPU in each period, and the period.
    quota: Option<u64>,
    period: u64,
    /// Bytes in huge pages of 2 MiB, which are no part of `memory`; 0 for none.
    pub huge_pages: u64,
}

impl Limits {
    /// Of a memory limit in bytes, and a quota and period in microseconds; what is not positive limits nothing.
    pub fn new(memory: Option<i64>, quota: Option<i64>, period: Option<i64>) -> Self {
        Self { memory: positive(memory), quota: positive(quota), period: positive(period).unwrap_or(DEFAULT_PERIOD), huge_pages: 0 }
    }

    /// Of an OCI `linux.resources` object.
    pub fn of(resources: &Value) -> Self {
        let cpu = &resources["cpu"];
        let pages = resources["hugepageLimits"].as_array().into_iter().flatten().filter(|limit| limit["pageSize"] == HUGE_PAGE);
        let unified = resources["unified"][HUGE_PAGES_MAX].as_str().and_then(|limit| limit.parse().ok());
        // A limit beyond any machine is none.
        let huge_pages = pages.filter_map(|limit| limit["limit"].as_u64()).chain(unified).filter(|bytes| *bytes <= MOST_HUGE_PAGES).max();
        let limits = Self::new(resources["memory"]["limit"].as_i64(), cpu["quota"].as_i64(), cpu["period"].as_i64());
        Self { huge_pages: huge_pages.unwrap_or(0), ..limits }
    }

    /// These with what such an object says anew; huge pages are set aside when a container is made.
    pub fn updated(self, resources: &Value) -> Self {
        // Zero means that nothing is said.
        let said = |value: &Value| value.as_i64().filter(|value| *value != 0);
        let cpu = &resources["cpu"];
        Self {
            memory: said(&resources["memory"]["limit"]).map_or(self.memory, |limit| positive(Some(limit))),
            quota: said(&cpu["quota"]).map_or(self.quota, |quota| positive(Some(quota))),
            period: positive(said(&cpu["period"])).unwrap_or(self.period),
            huge_pages: self.huge_pages,
        }
    }

    /// Thousandths of a CPU.
    pub fn cpus(&self) -> Option<u64> {
        self.quota.map(|quota| quota.saturating_mul(1000) / self.period)
    }
}

fn positive(value: Option<i64>) -> Option<u64> {
    value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0)
}

/// A machine's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u32,
    /// MiB of memory.
    pub memory_mib: u64,
}

impl Size {
    /// As much of each as the larger of two has.
    pub fn or_more(self, other: Self) -> Self {
        Self { vcpus: self.vcpus.max(other.vcpus), memory_mib: self.memory_mib.max(other.memory_mib) }
    }
}

/// Between which sizes a machine can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// What it starts with, and never has less than.
    pub least: Size,
    /// What the configuration and the host allow.
    pub most: Size,
    overhead_mib: u64,
    /// Whether it starts with what its pod's containers may use in all.
    fitted: bool,
}

impl Bounds {
    /// Of a machine with this configuration on this host, for a pod with these limits.
    ///
    /// # Errors
    /// When the host does not say what it has.
    pub fn new(config: &Config, pod: Limits) -> Result<Self> {
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).context("count the host's CPUs")?.unwrap_or(1);
        let memory = nix::sys::sysinfo::sysinfo().context("ask for the host's memory")?.ram_total() >> 20;
        let host = Size { vcpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory_mib: memory };
        Ok(Self::within(config, pod, host))
    }

    fn within(config: &Config, pod: Limits, host: Size) -> Self {
        let least = Size { vcpus: config.vcpus, memory_mib: config.memory_mib };
        let room = match least.memory_mib {
            // Larger machines have larger blocks of memory, which they may reach as a whole only.
            LARGE_MIB.. => 0,
            memory_mib => config.max_memory_mib.min(host.memory_mib).saturating_sub(memory_mib),
        };
        let most = Size {
            vcpus: config.max_vcpus.min(host.vcpus).min(least.vcpus * VCPU_FACTOR).max(least.vcpus),
            memory_mib: least.memory_mib + room / ADDED_MIB_STEP * ADDED_MIB_STEP,
        };
        Self { least, most, overhead_mib: config.overhead_mib, fitted: pod.memory.is_some() }
    }

    /// The most MiB that may be added.
    pub const fn max_added_mib(&self) -> u64 {
        self.most.memory_mib - self.least.memory_mib
    }

    /// What containers with these limits need. In a pod without limits those that have none count on what
    /// the machine starts with; otherwise they share what there is, as they share CPUs.
    pub fn needed(&self, containers: &[Limits]) -> Size {
        let (mut bytes, mut cpus, mut unlimited) = (0u64, 0u64, false);
        for limits in containers {
            bytes = bytes.saturating_add(limits.memory.unwrap_or(0)).saturating_add(limits.huge_pages);
            cpus = cpus.saturating_add(limits.cpus().unwrap_or(0));
            unlimited |= limits.memory.is_none();
        }
        let base = if unlimited && !self.fitted { self.least.memory_mib } else { self.overhead_mib };
        let memory_mib = bytes.div_ceil(1 << 20).saturating_add(base).clamp(self.least.memory_mib, self.most.memory_mib);
        let added = (memory_mib - self.least.memory_mib).next_multiple_of(BLOCK_MIB);
        let vcpus = u32::try_from(cpus.div_ceil(1000)).unwrap_or(u32::MAX);
        Size { vcpus: vcpus.clamp(self.least.vcpus, self.most.vcpus), memory_mib: self.least.memory_mib + added }
    }
}

/// A machine whose size changes.
pub struct Growth {
    bounds: Bounds,
    /// The memory that is added: no larger than what the guest may have of it.
    file: File,
    now: tokio::sync::Mutex<Size>,
}

impl Growth {
    /// A machine that has just started. The file has been mapped by all that do; from now on it is empty.
    ///
    /// # Errors
    /// When the file cannot be emptied.
    pub fn new(bounds: Bounds, file: File) -> Result<Self> {
        file.set_len(0).context("empty the file of added memory")?;
        Ok(Self { bounds, file, now: tokio::sync::Mutex::new(bounds.least) })
    }

    /// Gives the machine the size that `choose` says when its turn has come, and waits until the guest
    /// has what is more of it.
    ///
    /// # Errors
    /// What could not be had; the size is what it was, or in between.
    pub async fn resize(&self, vmm: &Vmm, agent: &Agent, timeout: Duration, choose: impl FnOnce(&Bounds, Size) -> Size) -> Result<Size> {
        let mut now = self.now.lock().await;
        let size = choose(&self.bounds, *now);
        if *now == size {
            return Ok(size);
        }
        let added_mib = size.memory_mib - self.bounds.least.memory_mib;
        if size.memory_mib > now.memory_mib {
            self.set_len(added_mib.max(*vmm.added().borrow()))?;
        }
        if size.memory_mib != now.memory_mib {
            vmm.add_memory(added_mib).await?;
            // Whatever else fails, the guest may take it from now on.
            now.memory_mib = size.memory_mib;
        }
        if size.vcpus > now.vcpus {
            tokio::time::timeout(timeout, vmm.add_vcpus(size.vcpus)).await.context("make vCPUs: the monitor does not answer")??;
        }
        agent.resize_machine(size.vcpus, added_mib).await?;
        log::info!("the machine has {} vCPUs and {} MiB of memory", size.vcpus, size.memory_mib);
        *now = size;
        Ok(size)
    }

    /// Cuts the file whenever the guest has given back the end of it, until the machine ends.
    pub async fn follow(&self, vmm: &Vmm) {
        let (mut added, mut ended) = (vmm.added(), vmm.ended());
        loop {
            tokio::select! {
                changed = added.changed() => if changed.is_err() { return },
                _ = ended.wait_for(Option::is_some) => return,
            }
            let now = self.now.lock().await;
            let end = (*added.borrow_and_update()).max(now.memory_mib - self.bounds.least.memory_mib);
            if let Err(error) = self.set_len(end) {
                log::error!("{error:#}");
            }
        }
    }

    /// Makes the file large enough for `mib`.
    fn set_len(&self, mib: u64) -> Result<()> {
        let mib = mib.next_multiple_of(ADDED_MIB_STEP);
        ensure!(mib <= self.bounds.max_added_mib(), "{mib} MiB of added memory: there is room for {}", self.bounds.max_added_mib());
        self.file.set_len(mib << 20).with_context(|| format!("size the file of added memory to {mib} MiB"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const MIB: i64 = 1 << 20;
    const HOST: Size = Size { vcpus: 4, memory_mib: 2000 };
    const NONE: Limits = Limits { memory: None, quota: None, period: DEFAULT_PERIOD, huge_pages: 0 };

    fn bounds(pod: Limits) -> Bounds {
        let config = Config { memory_mib: 256, vcpus: 1, overhead_mib: 96, max_memory_mib: 65_536, max_vcpus: 32, ..Config::default() };
        Bounds::within(&config, pod, HOST)
    }

    /// MiB of memory, and thousandths of a CPU.
    fn limits(memory: i64, cpus: i64) -> Limits {
        Limits::new(Some(memory * MIB), Some(cpus * 100), None)
    }

    #[test]
    fn a_machine_grows_to_what_the_host_has() {
        assert_eq!(bounds(NONE).most, Size { vcpus: 4, memory_mib: 256 + 13 * 128 });
        let large = Size { vcpus: 64, memory_mib: 1 << 20 };
        let of = |config: Config| Bounds::within(&config, NONE, large).most;
        assert_eq!(of(Config { vcpus: 2, ..Config::default() }).vcpus, 16);
        assert_eq!(of(Config { memory_mib: 64 << 10, ..Config::default() }).memory_mib, 64 << 10);
        let larger = Bounds::within(&Config { memory_mib: 4096, vcpus: 8, ..Config::default() }, NONE, HOST);
        assert_eq!((larger.most, larger.max_added_mib()), (larger.least, 0));
    }

    #[test]
    fn it_needs_the_sum_of_its_containers_limits() {
        let needed = |pod: Limits, containers: &[Limits]| {
            let Size { vcpus, memory_mib } = bounds(pod).needed(containers);
            (vcpus, memory_mib)
        };
        assert_eq!(needed(NONE, &[]), (1, 256));
        assert_eq!(needed(NONE, &[NONE]), (1, 256));
        assert_eq!(needed(NONE, &[limits(100, 500)]), (1, 256));
        assert_eq!(needed(NONE, &[limits(300, 1500), limits(100, 600)]), (3, 496));
        assert_eq!(needed(NONE, &[limits(301, 100), NONE]), (1, 560));
        assert_eq!(needed(NONE, &[limits(1 << 30, 1 << 40)]), (4, 256 + 13 * 128));
        assert_eq!(needed(NONE, &[Limits { huge_pages: 64 << 20, ..limits(160, 100) }]), (1, 320));
        // A container that comes to a pod of limits without one, as to debug it, makes nothing larger.
        assert_eq!(needed(limits(160, 1000), &[limits(160, 1000), NONE]), (1, 256));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let first = Limits::of(&json!({"memory": {"limit": 1024}, "cpu": {"quota": 150_000, "period": 100_000}}));
        assert_eq!((first.memory, first.cpus()), (Some(1024), Some(1500)));
        let updated = |resources: Value| (first.updated(&resources).memory, first.updated(&resources).cpus());
        assert_eq!(updated(json!({"cpu": {"quota": 50_000}})), (Some(1024), Some(500)));
        assert_eq!(updated(json!({"cpu": {"period": 50_000}})), (Some(1024), Some(3000)));
        assert_eq!(updated(json!({"memory": {"limit": -1}})), (None, Some(1500)));
        assert_eq!(updated(json!({"memory": {"limit": 0}, "cpu": {"shares": 2}})), (Some(1024), Some(1500)));
        let huge = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}, {"pageSize": "1GB", "limit": 1 << 30}]});
        assert_eq!(Limits::of(&huge).huge_pages, 4096);
    }
}
