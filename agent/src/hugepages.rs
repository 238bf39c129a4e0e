//! Huge pages of 2 MiB: as many as the containers' limits come to are set aside while they live
//! (Linux `Documentation/admin-guide/mm/hugetlbpage.rst`).

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

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
