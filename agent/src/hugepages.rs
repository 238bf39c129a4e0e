//! Huge pages of 2 MiB: as many as the containers' limits come to are set aside while they live
//! (Linux `Documentation/admin-guide/mm/hugetlbpage.rst`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::guest::HUGE_PAGES_DIR;
use nix::mount::{MsFlags, mount};

const BYTES: u64 = 2 << 20;
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Pages by container.
#[derive(Default)]
pub struct HugePages(Mutex<HashMap<String, u64>>);

impl HugePages {
    /// Sets pages aside for a container.
    ///
    /// # Errors
    /// When the guest has no such pieces of memory left; then none are set aside for it.
    pub fn reserve(&self, container: &str, bytes: u64) -> Result<()> {
        let pages = bytes.div_ceil(BYTES);
        if pages == 0 {
            return Ok(());
        }
        let mut reserved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reserved.insert(container.to_owned(), pages);
        let (wanted, has) = (total(&reserved), set(total(&reserved))?);
        if has < wanted {
            reserved.remove(container);
            set(total(&reserved))?;
            bail!("set {pages} huge pages of 2 MiB aside: the guest has {} left", pages - (wanted - has).min(pages));
        }
        Ok(())
    }

    /// Mounts a volume of huge pages that the pod's containers share; it may be there.
    ///
    /// # Errors
    /// When `name` is no plain name, or the mount fails.
    pub fn mount_volume(&self, name: &str) -> Result<()> {
        let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric());
        ensure!(plain, "volume of huge pages {name:?}: it is no plain name");
        // One at a time: what is there is mounted.
        let _turn = self.0.lock();
        let target = Path::new(HUGE_PAGES_DIR).join(name);
        if target.exists() {
            return Ok(());
        }
        std::fs::create_dir_all(&target).context("create a volume of huge pages")?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let mounted = mount(Some("hugetlbfs"), &target, Some("hugetlbfs"), flags, Some("pagesize=2M,mode=0777"));
        mounted.inspect_err(|_| drop(std::fs::remove_dir(&target))).context("mount a volume of huge pages")
    }

    /// Gives a container's pages back.
    pub fn release(&self, container: &str) {
        let mut reserved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if reserved.remove(container).is_some() {
            // Pages in use stay until they are free; the next change counts anew.
            let _ = set(total(&reserved));
        }
    }
}

fn total(reserved: &HashMap<String, u64>) -> u64 {
    reserved.values().sum()
}

/// Asks for so many pages; how many there are then.
fn set(pages: u64) -> Result<u64> {
    std::fs::write(COUNT, pages.to_string()).context("set huge pages aside")?;
    std::fs::read_to_string(COUNT)?.trim().parse().context("count the huge pages")
}
