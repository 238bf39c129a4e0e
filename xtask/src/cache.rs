//! Where things that are expensive to make are kept between builds.
//!
//! Everything lives outside the tree under one folder, each in a folder named by the hash of
//! what it was made from. A folder exists only when it is complete: it is made under a temporary
//! name and renamed, so an interrupted build leaves nothing that a later one would believe.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The cache's root: `$CAISSON_CACHE`, else `$XDG_CACHE_HOME/caisson`, else `~/.cache/caisson`.
pub fn root() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CAISSON_CACHE") {
        return Ok(PathBuf::from(dir));
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("caisson"));
    }
    let home = std::env::var_os("HOME").context("find a cache folder: set HOME or CAISSON_CACHE")?;
    Ok(PathBuf::from(home).join(".cache/caisson"))
}

/// The first 16 hex digits of the SHA-256 over `parts`, each preceded by its length.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// How many entries of a kind are kept: a node's image alone takes more than two gigabytes.
const KEPT: usize = 3;

/// Removes the oldest entries of a kind, never `newest`.
fn prune(kind_dir: &Path, newest: &Path) {
    let mut entries: Vec<_> = std::fs::read_dir(kind_dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path() != newest && !entry.file_name().to_string_lossy().starts_with('.'))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    entries.sort();
    entries.reverse();
    for (_, path) in entries.into_iter().skip(KEPT - 1) {
        // What cannot be removed now is tried again with the next entry.
        let _ = std::fs::remove_dir_all(path);
    }
}

/// The folder `<root>/<kind>/<key>`, made by `make` (which is given an empty folder) when absent.
pub fn entry(kind: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let kind_dir = root()?.join(kind);
    let done = kind_dir.join(key);
    if done.is_dir() {
        return Ok(done);
    }
    std::fs::create_dir_all(&kind_dir).with_context(|| format!("create {}", kind_dir.display()))?;
    let scratch = tempfile::Builder::new().prefix(".making-").tempdir_in(&kind_dir)?;
    make(scratch.path())?;
    let scratch = scratch.keep();
    match std::fs::rename(&scratch, &done) {
        Ok(()) => {
            prune(&kind_dir, &done);
            Ok(done)
        }
        // Another process finished the same entry first: its result is as good.
        Err(_) if done.is_dir() => {
            std::fs::remove_dir_all(&scratch)?;
            Ok(done)
        }
        Err(error) => Err(error).with_context(|| format!("rename {} into place", scratch.display())),
    }
}
