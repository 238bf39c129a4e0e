//! Copies of volumes that the host replaces as a whole, so that inotify watchers hear of each change.
//!
//! Such a volume holds a folder for its present state, the link `..data` to that folder, and for each
//! entry of it a link through `..data`. A copy goes from one state to the next in the steps and the
//! order of Kubernetes' `pkg/volume/util/atomic_writer.go`: what reads or watches it sees what it would
//! see on any host.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use caisson_protocol::guest::{VOLUME_STATE, VOLUMES_DIR, shared_mount};

use crate::machine::memory_kib;
use crate::names::check_file_name;

/// The link before it replaces the one that readers follow.
const NEXT_STATE: &str = "..data_tmp";
/// What of the free memory one state may take.
const SHARE_OF_MEMORY: u64 = 4;
/// What an entry takes besides its bytes.
const ENTRY_BYTES: u64 = 4096;
/// Folders within one another.
const MAX_DEPTH: usize = 32;

/// Brings a container's copy of a volume to a state, which is a folder in the volume.
///
/// # Errors
/// When a name is no plain one, or the state cannot be copied; then the copy is as it was.
pub fn publish(container: &str, volume: &str, state: &str) -> Result<()> {
    for name in [container, volume, state] {
        check_file_name(name).with_context(|| format!("volume {volume:?}"))?;
    }
    ensure!(state.starts_with(".."), "volume {volume}: state {state:?} does not begin with \"..\"");
    let source = PathBuf::from(shared_mount(container, volume));
    let budget = (memory_kib("MemAvailable")? << 10) / SHARE_OF_MEMORY;
    replace(&source, &folder(container).join(volume), state, budget).with_context(|| format!("copy volume {volume}"))
}

/// Removes a container's copies.
pub fn remove(container: &str) {
    // Most have none.
    let _ = std::fs::remove_dir_all(folder(container));
}

fn folder(container: &str) -> PathBuf {
    Path::new(VOLUMES_DIR).join(container)
}

fn replace(source: &Path, copy: &Path, state: &str, mut budget: u64) -> Result<()> {
    std::fs::create_dir_all(copy)?;
    own(copy, &source.metadata()?)?;
    let fresh = copy.join(state);
    if !fresh.exists()
        && let Err(error) = copy_folder(&source.join(state), &fresh, &mut budget, MAX_DEPTH)
    {
        let _ = std::fs::remove_dir_all(&fresh);
        return Err(error);
    }
    let next = copy.join(NEXT_STATE);
    // A copy that broke off may have left it.
    let _ = std::fs::remove_file(&next);
    symlink(state, &next)?;
    std::fs::rename(&next, copy.join(VOLUME_STATE))?;
    for entry in fresh.read_dir()? {
        let name = entry?.file_name();
        match symlink(Path::new(VOLUME_STATE).join(&name), copy.join(&name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
    }
    for entry in copy.read_dir()? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            if name != state {
                std::fs::remove_dir_all(entry.path())?;
            }
        } else if name != VOLUME_STATE && fresh.join(&name).symlink_metadata().is_err() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Copies what a folder holds, with owners and modes.
fn copy_folder(from: &Path, to: &Path, budget: &mut u64, depth: usize) -> Result<()> {
    ensure!(depth > 0, "its folders are more than {MAX_DEPTH} within one another");
    std::fs::create_dir(to)?;
    for entry in from.read_dir()? {
        let entry = entry?;
        let (from, to, meta) = (entry.path(), to.join(entry.file_name()), entry.metadata()?);
        let left = budget.checked_sub(meta.len().saturating_add(ENTRY_BYTES));
        *budget = left.context("it has more bytes than a quarter of the guest's free memory")?;
        if meta.is_dir() {
            copy_folder(&from, &to, budget, depth - 1)?;
        } else if meta.is_symlink() {
            symlink(from.read_link()?, &to)?;
            lchown(&to, Some(meta.uid()), Some(meta.gid()))?;
        } else if meta.is_file() {
            copy_file(&from, &to, &meta)?;
        }
    }
    own(to, &from.metadata()?)
}

fn copy_file(from: &Path, to: &Path, meta: &Metadata) -> Result<()> {
    // No more than was counted, should it grow.
    let mut source = io::Read::take(File::open(from)?, meta.len());
    io::copy(&mut source, &mut File::create_new(to)?)?;
    own(to, meta)
}

fn own(path: &Path, like: &Metadata) -> Result<()> {
    chown(path, Some(like.uid()), Some(like.gid()))?;
    // Not before: a change of the owner takes bits away.
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(like.mode() & 0o7777))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_copy_goes_from_state_to_state() {
        let place = tempfile::tempdir().unwrap();
        let (source, copy) = (place.path().join("source"), place.path().join("copy"));
        std::fs::create_dir_all(source.join("..one/inner")).unwrap();
        std::fs::write(source.join("..one/key"), "first").unwrap();
        std::fs::write(source.join("..one/inner/deep"), "deep").unwrap();
        std::fs::set_permissions(source.join("..one/key"), std::fs::Permissions::from_mode(0o640)).unwrap();
        replace(&source, &copy, "..one", u64::MAX).unwrap();
        assert_eq!(names(&copy), ["..data", "..one", "inner", "key"]);
        assert_eq!(std::fs::read_to_string(copy.join("key")).unwrap(), "first");
        assert_eq!(std::fs::read_to_string(copy.join("inner/deep")).unwrap(), "deep");
        assert_eq!(std::fs::metadata(copy.join("key")).unwrap().mode() & 0o7777, 0o640);

        std::fs::create_dir(source.join("..two")).unwrap();
        std::fs::write(source.join("..two/key"), "second").unwrap();
        std::fs::write(source.join("..two/more"), "more").unwrap();
        // One that does not fit changes nothing.
        assert!(replace(&source, &copy, "..two", ENTRY_BYTES + 8).unwrap_err().to_string().contains("a quarter of"));
        assert_eq!((names(&copy).len(), std::fs::read_to_string(copy.join("key")).unwrap().as_str()), (4, "first"));
        for _ in 0..2 {
            replace(&source, &copy, "..two", u64::MAX).unwrap();
            assert_eq!(names(&copy), ["..data", "..two", "key", "more"]);
            assert_eq!(std::fs::read_to_string(copy.join("key")).unwrap(), "second");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for (container, volume, state) in [("../x", "0", "..a"), ("c", "..", "..a"), ("c", "0", ".."), ("c", "0", "../.."), ("c", "0", "a")]
        {
            assert!(publish(container, volume, state).is_err(), "{container} {volume} {state}");
        }
    }
}
