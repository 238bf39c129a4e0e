//! The machine that the guest runs on, as it changes: devices that appear, CPUs, memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::guest::MEMORY_DEVICE;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
const DEVICES: &str = "/sys/bus/platform/devices";
/// For the kernel to take memory into use; for it to give memory back, which it need not manage; for the
/// device to be there; and between two looks.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(10);
const SHRINK_TIMEOUT: Duration = Duration::from_secs(3);
const SHOW_TIMEOUT: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(2);

/// Makes the kernel forget files that nobody uses (Linux `Documentation/admin-guide/sysctl/vm.rst`, `drop_caches`).
///
/// # Errors
/// Those of the kernel.
pub fn forget_files() -> Result<()> {
    // 4 keeps it from saying each time that somebody asked.
    ["4", "2"].into_iter().try_for_each(|word| std::fs::write(DROP_CACHES, word)).with_context(|| format!("write {DROP_CACHES}"))
}

/// Makes the kernel look at a device again, by its number, where it found nothing before. The host
/// shows it in a moment.
///
/// # Errors
/// When there still is nothing.
pub fn find_device(number: u32) -> Result<()> {
    let begin = Instant::now();
    let device = name(number);
    while let Err(error) = std::fs::write(format!("{DRIVER}/bind"), &device) {
        ensure!(begin.elapsed() < SHOW_TIMEOUT, "look for {device}: {error}");
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}

/// Makes the kernel let go of a device, by its number.
///
/// # Errors
/// When it has none of that number.
pub fn forget_device(number: u32) -> Result<()> {
    let device = name(number);
    std::fs::write(format!("{DRIVER}/unbind"), &device).with_context(|| format!("let go of {device}"))
}

/// What a device is to programs: the kernel's folder for the one thing of a class that it has, as
/// `net` or `block` (`<device>/virtioN/<class>/<name>`).
///
/// # Errors
/// When it has none.
pub fn class_dir(number: u32, class: &str) -> Result<PathBuf> {
    let only = |dir: PathBuf, prefix: &str| -> Result<PathBuf> {
        let entries = std::fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        entries.filter_map(|entry| Some(entry.ok()?.path())).find(named).with_context(|| format!("{} is empty", dir.display()))
    };
    only(only(Path::new(DEVICES).join(name(number)), "virtio")?.join(class), "")
}

/// The kernel's name for a device.
fn name(number: u32) -> String {
    format!("virtio-mmio.{number}")
}

/// The machine's size.
pub struct Machine {
    /// KiB of memory that the kernel had at its start.
    memory_kib: u64,
    /// Whether memory was ever added.
    has_added: bool,
}

impl Machine {
    /// The machine as it started.
    ///
    /// # Errors
    /// When the kernel does not say how much memory it has.
    pub fn new() -> Result<Self> {
        Ok(Self { memory_kib: memory_kib("MemTotal")?, has_added: false })
    }

    /// Uses so many CPUs, and waits for so much added memory to be in use. For memory that is to go it
    /// waits a while: the kernel first moves what is in it, where it can.
    ///
    /// # Errors
    /// The CPU that could not be changed, or how much memory there is after a while.
    pub fn resize(&mut self, vcpus: u32, added_mib: u64) -> Result<()> {
        // The first CPU stays.
        for cpu in 1.. {
            let online = PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}/online"));
            let Ok(is) = std::fs::read_to_string(&online) else { break };
            let wanted = if cpu < vcpus { "1" } else { "0" };
            if is.trim() != wanted {
                std::fs::write(&online, wanted).with_context(|| format!("write {wanted} to {}", online.display()))?;
            }
        }
        let begin = Instant::now();
        if added_mib > 0 && !self.has_added {
            find_device(MEMORY_DEVICE)?;
            self.has_added = true;
        }
        let wanted = self.memory_kib + (added_mib << 10);
        loop {
            let has = memory_kib("MemTotal")?;
            if has == wanted || (has > wanted && begin.elapsed() > SHRINK_TIMEOUT) {
                return Ok(());
            }
            if begin.elapsed() > MEMORY_TIMEOUT {
                let added = has.saturating_sub(self.memory_kib) >> 10;
                bail!(
                    "the guest took {added} MiB of the {added_mib} MiB that were added to its memory within {} s",
                    MEMORY_TIMEOUT.as_secs()
                );
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

/// What the kernel says of its memory by a name, as `MemTotal`, in KiB (proc(5), `/proc/meminfo`).
///
/// # Errors
/// When it does not say.
pub fn memory_kib(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    parse(&text, name).with_context(|| format!("find {name} in /proc/meminfo"))
}

/// The number of the line `NAME: N kB`.
fn parse(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernels_numbers_are_read() {
        let text = "MemTotal:         240312 kB\nMemFree:  1 kB\n";
        assert_eq!((super::parse(text, "MemTotal"), super::parse(text, "MemFree")), (Some(240_312), Some(1)));
        assert_eq!(super::parse(text, "Mem"), None);
    }
}
