//! `cargo xtask build`: the release artefacts, in `target/caisson/{bin,share}`.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use caisson_guest_kernel as guest_kernel;
use xshell::{Shell, cmd};

use crate::{cache, packages, progress};

/// Host programs: package, and folder below `target/caisson`.
const PROGRAMS: &[&str] = &["containerd-shim-caisson-v2", "caisson-vmm", "caisson-fs", "caisson-stand-in", "caisson"];
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The top of the source tree.
pub fn source_dir() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("find the source tree")?.to_owned())
}

/// Builds everything, once in this process, and returns `target/caisson`.
pub fn all() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if built.is_none() {
        *built = Some(build()?);
    }
    built.clone().context("find what was built")
}

fn build() -> Result<PathBuf> {
    let sh = Shell::new()?;
    let top = source_dir()?;
    sh.change_dir(&top);
    let mut needed = guest_kernel::BUILD_PACKAGES.to_vec();
    needed.extend([
        "busybox-static",
        "debian-archive-keyring",
        "e2fsprogs",
        // libFuzzer is C++.
        "g++",
        "libcap-ng-dev",
        "libseccomp-dev",
        "linux-source",
        "pkg-config",
        // The node tests' CRI client is generated.
        "protobuf-compiler",
        "util-linux",
    ]);
    packages::require_installed(&needed)?;

    let out = top.join("target/caisson");
    for dir in ["bin", "share"] {
        sh.create_dir(out.join(dir))?;
    }
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    progress::step("building the host programs and the agent", || {
        let packages = ["shim", "vmm", "fs", "stand-in", "ctl"].iter().flat_map(|name| ["--package".to_owned(), format!("caisson-{name}")]);
        cmd!(sh, "{cargo} build --quiet --release {packages...}").quiet().run().context("build the host programs")?;
        build_agent(&sh, &["--bins"]).context("build the agent")
    })?;
    for program in PROGRAMS {
        replace(&sh, &top.join("target/release").join(program), &out.join("bin").join(program))?;
    }
    let kernel = kernel()?;
    replace(&sh, &kernel, &out.join("share/vmlinux"))?;
    let agent = top.join("target").join(AGENT_TARGET).join("release/caisson-agent");
    caisson_image_builder::initramfs(&agent, &out.join("share/initramfs"))?;
    Ok(out)
}

/// Builds a program of the agent's package, which runs in the guest without any library.
fn build_agent(sh: &Shell, what: &[&str]) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let _flags = sh.push_env("RUSTFLAGS", "-C target-feature=+crt-static");
    let _link = sh.push_env("LIBSECCOMP_LINK_TYPE", "static");
    // The agent is unpacked into every guest's memory: its size is memory and time of every pod.
    let _size = sh.push_env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s");
    let _lto = sh.push_env("CARGO_PROFILE_RELEASE_LTO", "fat");
    let _path = sh.push_env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu");
    Ok(cmd!(sh, "{cargo} build --quiet --release --package caisson-agent --target {AGENT_TARGET} {what...}").quiet().run()?)
}

/// Makes an initramfs with an agent that attacks the shim, for a test of that.
pub fn hostile_initramfs(target: &Path) -> Result<()> {
    let sh = Shell::new()?;
    let top = source_dir()?;
    sh.change_dir(&top);
    build_agent(&sh, &["--example", "hostile-agent"]).context("build the hostile agent")?;
    caisson_image_builder::initramfs(&top.join("target").join(AGENT_TARGET).join("release/examples/hostile-agent"), target)
}

/// The guest kernel, from the cache when fragment, patches and source have not changed.
pub fn kernel() -> Result<PathBuf> {
    let source = guest_kernel::source()?;
    let sh = Shell::new()?;
    let format = "${source:Version}";
    let version =
        cmd!(sh, "dpkg-query --show --showformat={format} linux-source").quiet().read().context("ask for the kernel source's version")?;
    let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let made_of = [guest_kernel::FRAGMENT, &name, &version, guest_kernel::RECIPE].into_iter().chain(guest_kernel::PATCHES.iter().copied());
    let key = cache::key(made_of.map(str::as_bytes));
    let dir = cache::entry("kernel", &key, |dir| {
        progress::step("building the guest kernel (once a machine, about 10 minutes on two cores)", || {
            let work = tempfile::Builder::new().prefix("caisson-kernel-").tempdir_in(cache::root()?)?;
            guest_kernel::build(&source, work.path(), dir)
        })
    })?;
    Ok(dir.join("vmlinux"))
}

/// Puts a copy of `from` at `to`, also while a program runs from `to`.
fn replace(sh: &Shell, from: &Path, to: &Path) -> Result<()> {
    sh.remove_path(to)?;
    sh.copy_file(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))
}
