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
use crate::vmm::{Added, Vmm};

/// `cpu.period` when a quota comes without one, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// The size of huge pages that a guest has, as `hugepageLimits` writes it, their limit among the
/// `unified` ones, and the most bytes in them.
const HUGE_PAGE: &str = "2MB";
const HUGE_PAGES_MAX: &str = "hugetlb.2MB.max";
const MOST_HUGE_PAGES: u64 = 1 << 40;
/// From this much memory on Linux may give blocks of memory another size than [`ADDED_MIB_STEP`].
const LARGE_MIB: u64 = 64 << 10;
/// The guest takes memory in blocks of this many MiB: the largest that its kernel keeps free lists of.
const BLOCK_MIB: u64 = 4;

/// What a container may use; `None` where it has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub cpus: Option<u64>,
    /// Bytes in huge pages of 2 MiB, which are no part of `memory`; 0 for none.
    pub huge_pages: u64,
}

impl Limits {
    /// Of a memory limit in bytes, and a quota and period in microseconds; what is not positive limits nothing.
    pub fn new(memory: Option<i64>, quota: Option<i64>, period: Option<i64>) -> Self {
        let positive = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0);
        let cpus = positive(quota).map(|quota| quota.saturating_mul(1000) / positive(period).unwrap_or(DEFAULT_PERIOD));
        Self { memory: positive(memory), cpus, huge_pages: 0 }
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

    /// These with what such an object says anew.
    pub fn updated(self, resources: &Value) -> Self {
        let new = Self::of(resources);
        // Zero means that nothing is said.
        let says = |value: &Value| value.as_i64().is_some_and(|value| value != 0);
        Self {
            memory: if says(&resources["memory"]["limit"]) { new.memory } else { self.memory },
            cpus: if says(&resources["cpu"]["quota"]) { new.cpus } else { self.cpus },
            // Set aside when the container is made, for as long as it is there.
            huge_pages: self.huge_pages,
        }
    }
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
}

impl Bounds {
    /// Of a machine with this configuration on this host.
    ///
    /// # Errors
    /// When the host does not say what it has.
    pub fn new(config: &Config) -> Result<Self> {
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).context("count the host's CPUs")?.unwrap_or(1);
        let memory = nix::sys::sysinfo::sysinfo().context("ask for the host's memory")?.ram_total() >> 20;
        let host = Size { vcpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory_mib: memory };
        Ok(Self::within(config, host))
    }

    fn within(config: &Config, host: Size) -> Self {
        let least = Size { vcpus: config.vcpus, memory_mib: config.memory_mib };
        let room = match least.memory_mib {
            // Larger machines have larger blocks of memory, which they may reach as a whole only.
            LARGE_MIB.. => 0,
            memory_mib => config.max_memory_mib.min(host.memory_mib).saturating_sub(memory_mib),
        };
        let most = Size {
            vcpus: config.max_vcpus.min(host.vcpus).max(least.vcpus),
            memory_mib: least.memory_mib + room / ADDED_MIB_STEP * ADDED_MIB_STEP,
        };
        Self { least, most, overhead_mib: config.overhead_mib }
    }

    /// The most MiB that may be added.
    pub const fn max_added_mib(&self) -> u64 {
        self.most.memory_mib - self.least.memory_mib
    }

    /// What containers with these limits need. One without a limit of memory counts on what the
    /// machine starts with; CPUs are shared.
    pub fn needed(&self, containers: &[Limits]) -> Size {
        let (mut bytes, mut cpus, mut unlimited) = (0u64, 0u64, false);
        for limits in containers {
            bytes = bytes.saturating_add(limits.memory.unwrap_or(0)).saturating_add(limits.huge_pages);
            cpus = cpus.saturating_add(limits.cpus.unwrap_or(0));
            unlimited |= limits.memory.is_none();
        }
        let base = if unlimited { self.least.memory_mib } else { self.overhead_mib };
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

    /// Between which sizes it can change.
    pub const fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// The size that it has now.
    pub async fn size(&self) -> Size {
        *self.now.lock().await
    }

    /// Gives the machine another size, and waits until the guest has what is more of it.
    ///
    /// # Errors
    /// What could not be had; the size is what it was, or in between.
    pub async fn resize(&self, vmm: &Vmm, agent: &Agent, size: Size, timeout: Duration) -> Result<()> {
        let mut now = self.now.lock().await;
        if *now == size {
            return Ok(());
        }
        let added_mib = size.memory_mib - self.bounds.least.memory_mib;
        if size.memory_mib > now.memory_mib {
            self.set_len(added_mib.max(vmm.added().borrow().end_mib))?;
        }
        if size.memory_mib != now.memory_mib {
            vmm.add_memory(added_mib).await?;
        }
        if size.vcpus > now.vcpus {
            tokio::time::timeout(timeout, vmm.add_vcpus(size.vcpus)).await.context("make vCPUs: the monitor does not answer")??;
        }
        agent.resize_machine(size.vcpus, added_mib).await?;
        log::info!("the machine has {} vCPUs and {} MiB of memory", size.vcpus, size.memory_mib);
        *now = size;
        Ok(())
    }

    /// Cuts the file whenever the guest has given back the end of it.
    pub async fn follow(&self, mut added: tokio::sync::watch::Receiver<Added>) {
        while added.changed().await.is_ok() {
            let now = self.now.lock().await;
            let end = added.borrow_and_update().end_mib.max(now.memory_mib - self.bounds.least.memory_mib);
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

    const MIB: u64 = 1 << 20;

    fn bounds() -> Bounds {
        let config = Config { memory_mib: 256, vcpus: 1, overhead_mib: 96, max_memory_mib: 65_536, max_vcpus: 32, ..Config::default() };
        Bounds::within(&config, Size { vcpus: 4, memory_mib: 2000 })
    }

    fn limits(memory: u64, cpus: u64) -> Limits {
        Limits { memory: Some(memory * MIB), cpus: Some(cpus), huge_pages: 0 }
    }

    #[test]
    fn a_machine_grows_to_what_the_host_has() {
        assert_eq!(bounds().most, Size { vcpus: 4, memory_mib: 256 + 13 * 128 });
        let larger = Config { memory_mib: 4096, vcpus: 8, ..Config::default() };
        let bounds = Bounds::within(&larger, Size { vcpus: 4, memory_mib: 2000 });
        assert_eq!((bounds.most, bounds.max_added_mib()), (bounds.least, 0));
    }

    #[test]
    fn it_needs_the_sum_of_its_containers_limits() {
        let needed = |containers: &[Limits]| {
            let Size { vcpus, memory_mib } = bounds().needed(containers);
            (vcpus, memory_mib)
        };
        assert_eq!(needed(&[]), (1, 256));
        assert_eq!(needed(&[Limits::default()]), (1, 256));
        assert_eq!(needed(&[limits(100, 500)]), (1, 256));
        assert_eq!(needed(&[limits(300, 1500), limits(100, 600)]), (3, 496));
        assert_eq!(needed(&[limits(301, 100), Limits::default()]), (1, 560));
        assert_eq!(needed(&[limits(1 << 30, u64::MAX)]), (4, 256 + 13 * 128));
        assert_eq!(needed(&[Limits { huge_pages: 64 << 20, ..limits(160, 100) }]), (1, 320));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let first = Limits::of(&json!({"memory": {"limit": 1024}, "cpu": {"quota": 150_000, "period": 100_000}}));
        assert_eq!(first, Limits { memory: Some(1024), cpus: Some(1500), huge_pages: 0 });
        assert_eq!(first.updated(&json!({"cpu": {"quota": 50_000}})), Limits { memory: Some(1024), cpus: Some(500), huge_pages: 0 });
        assert_eq!(first.updated(&json!({"memory": {"limit": -1}})), Limits { memory: None, cpus: Some(1500), huge_pages: 0 });
        let huge = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}, {"pageSize": "1GB", "limit": 1 << 30}]});
        assert_eq!(Limits::of(&huge).huge_pages, 4096);
        assert_eq!(first.updated(&json!({"memory": {"limit": 0}, "cpu": {"shares": 2}})), first);
    }
}
