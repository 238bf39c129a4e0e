//! Paths within a container's root, which was entered: where they lead is for the image's links to
//! say, but never out of the root.
//!
//! A link such as `/proc/self/fd/4` leads to whatever this process has open, which while the root is
//! filled is the guest's own root. So paths are opened with openat2(2), which follows no such links,
//! and what is found is used by its descriptor.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open as open_plain, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, mkdirat};

/// Steps that one path may take: each makes a folder or follows a link that leads nowhere.
const MAX_STEPS: usize = 256;

/// Opens what is at a path.
///
/// # Errors
/// The kernel's; ELOOP for a link that leads out.
pub fn open(path: &Path) -> nix::Result<OwnedFd> {
    let root = open_plain("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let how =
        OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(&root, path, how)
}

/// Opens what is at a path, made where there is nothing: a folder or an empty file at its end, folders
/// on the way. Links of the image that lead nowhere are followed to where they would.
///
/// # Errors
/// What could not be made, and links that lead out.
pub fn ensure(path: &Path, is_folder: bool) -> Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..MAX_STEPS {
        match open(&path) {
            Ok(found) => return Ok(found),
            Err(Errno::ENOENT) => path = step(&path, is_folder)?,
            Err(errno) => return Err(errno).with_context(|| format!("open {}", path.display())),
        }
    }
    bail!("{}: it takes more than {MAX_STEPS} steps", path.display())
}

/// Makes the first part of a path that is not there, or follows it when it is a link; returns the
/// path to go on with.
fn step(path: &Path, is_folder: bool) -> Result<PathBuf> {
    let mut there = PathBuf::from("/");
    let mut parts = path.strip_prefix("/").unwrap_or(path).components();
    while let Some(part) = parts.next() {
        let next = there.join(part);
        match open(&next) {
            Ok(_) => there = next,
            Err(Errno::ENOENT) => {
                let what = || format!("create {}", next.display());
                let folder = open(&there).with_context(what)?;
                let rest = parts.as_path();
                match readlinkat(&folder, part.as_os_str()) {
                    // Joining nothing would leave a slash at the end.
                    Ok(target) if rest.as_os_str().is_empty() => return Ok(there.join(target)),
                    Ok(target) => return Ok(there.join(target).join(rest)),
                    Err(_) if is_folder || !rest.as_os_str().is_empty() => {
                        mkdirat(&folder, part.as_os_str(), Mode::from_bits_truncate(0o755)).with_context(what)?;
                    }
                    Err(_) => {
                        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                        openat(&folder, part.as_os_str(), flags, Mode::from_bits_truncate(0o644)).with_context(what)?;
                    }
                }
                return Ok(path.to_owned());
            }
            Err(errno) => return Err(errno).with_context(|| format!("open {}", next.display())),
        }
    }
    Ok(path.to_owned())
}
