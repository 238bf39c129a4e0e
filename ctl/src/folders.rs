//! Where folders lead that a process has open.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, fstat, open, openat};

/// Folders within one another that are gone through.
const MAX_DEPTH: usize = 4096;

/// The folder that `..` leads to in the end, by device and inode; `None` for one that is gone meanwhile.
///
/// # Errors
/// When one on the way cannot be looked at.
pub fn top_of(path: &str) -> Result<Option<(u64, u64)>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(mut folder) = open(path, flags, Mode::empty()) else { return Ok(None) };
    let mut last = None;
    for _ in 0..MAX_DEPTH {
        let stat = fstat(&folder).context("look at a folder")?;
        let here = (stat.st_dev, stat.st_ino);
        if last == Some(here) {
            break;
        }
        last = Some(here);
        let Ok(above) = openat(&folder, "..", flags, Mode::empty()) else { break };
        folder = above;
    }
    Ok(last)
}
