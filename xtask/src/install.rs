//! `cargo xtask install`: puts the artefacts where the programs look for them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Artefact below `target/caisson`, place below the root, mode.
const PLACES: &[(&str, &str, u32)] = &[
    ("bin/containerd-shim-caisson-v2", "usr/bin/containerd-shim-caisson-v2", 0o755),
    ("bin/caisson", "usr/bin/caisson", 0o755),
    ("bin/caisson-vmm", "usr/libexec/caisson/caisson-vmm", 0o755),
    ("bin/caisson-fs", "usr/libexec/caisson/caisson-fs", 0o755),
    ("bin/caisson-stand-in", "usr/libexec/caisson/caisson-stand-in", 0o755),
    ("share/vmlinux", "usr/share/caisson/vmlinux", 0o644),
    ("share/initramfs", "usr/share/caisson/initramfs", 0o644),
];

/// Installs what `built` (`target/caisson`) holds below `root`.
///
/// A file is replaced by rename, so pods that run from the old one go on.
pub fn into(built: &Path, root: &Path) -> Result<()> {
    for (artefact, place, mode) in PLACES {
        let target = root.join(place);
        let dir = target.parent().context("name the target's folder")?;
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let scratch = target.with_extension("new");
        std::fs::copy(built.join(artefact), &scratch).with_context(|| format!("install {}", target.display()))?;
        std::fs::set_permissions(&scratch, std::fs::Permissions::from_mode(*mode))?;
        std::fs::rename(&scratch, &target).with_context(|| format!("install {}", target.display()))?;
    }
    Ok(())
}
