//! The initramfs: a "newc" cpio archive (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! It is not compressed: unpacking costs more boot time than copying.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

/// Writes the guest's initramfs to `target`: `/init` is the agent, `/dev` (with `null`), `/proc`, `/sys` and
/// `/run` are the empty folders that it mounts on.
pub fn initramfs(agent: &Path, target: &Path) -> Result<()> {
    let program = std::fs::read(agent).with_context(|| format!("read the agent {}", agent.display()))?;
    let mut out = File::create(target).with_context(|| format!("create {}", target.display()))?;
    let mut inode = 0;
    for dir in ["dev", "proc", "run", "sys"] {
        entry(&mut out, &mut inode, dir, ModeFileType::Directory, 0o755, &[])?;
    }
    null_device(&mut out, &mut inode)?;
    entry(&mut out, &mut inode, "init", ModeFileType::Regular, 0o755, &program)?;
    trailer(&mut out)?;
    Ok(())
}

/// `/dev/null`: without a console the kernel starts the agent with no standard streams, and Rust's
/// runtime fills their places from here before `main` could make the device.
fn null_device(out: &mut File, inode: &mut u32) -> Result<()> {
    *inode += 1;
    let builder =
        Builder::new("dev/null").ino(*inode).nlink(1).mode(0o666).set_mode_file_type(ModeFileType::Char).rdev_major(1).rdev_minor(3);
    builder.write(out, 0).finish()?;
    Ok(())
}

/// Packs the files and folders below `root` into `out`.
pub fn pack_tree(root: &Path, mut out: File) -> Result<()> {
    let mut inode = 0;
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(root).context("name an entry")?.to_string_lossy().into_owned();
        let meta = path.symlink_metadata()?;
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_dir() {
            entry(&mut out, &mut inode, &name, ModeFileType::Directory, mode, &[])?;
        } else {
            let mut data = Vec::new();
            File::open(&path)?.read_to_end(&mut data)?;
            entry(&mut out, &mut inode, &name, ModeFileType::Regular, mode, &data)?;
        }
    }
    trailer(&mut out)?;
    Ok(())
}

fn collect(dir: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for item in std::fs::read_dir(dir)? {
        let path = item?.path();
        if path.is_dir() {
            collect(&path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

fn entry(out: &mut File, inode: &mut u32, name: &str, kind: ModeFileType, mode: u32, data: &[u8]) -> Result<()> {
    *inode += 1;
    let size = u32::try_from(data.len()).with_context(|| format!("{name} is too large for a cpio archive"))?;
    let mut writer = Builder::new(name).ino(*inode).nlink(1).mode(mode).set_mode_file_type(kind).write(&mut *out, size);
    writer.write_all(data)?;
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_agent_makes_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        std::fs::write(&agent, b"program").unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        initramfs(&agent, &a).unwrap();
        // Another time stamp and another place: neither may reach the archive.
        let moved = dir.path().join("moved");
        std::fs::write(&moved, b"program").unwrap();
        initramfs(&moved, &b).unwrap();
        assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    }

    #[test]
    fn a_missing_agent_is_named() {
        let error = initramfs(Path::new("/no/such/agent"), Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("/no/such/agent"));
    }
}
