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
        Ok(()) => Ok(done),
        // Another process finished the same entry first: its result is as good.
        Err(_) if done.is_dir() => {
            std::fs::remove_dir_all(&scratch)?;
            Ok(done)
        }
        Err(error) => Err(error).with_context(|| format!("rename {} into place", scratch.display())),
    }
}
