//! The guest kernel: an ELF `vmlinux` built from the distribution's kernel source package.
//!
//! `kernel.config` lists every option that we ask for with its reason. [`build`] lays it over
//! `allnoconfig`, checks that every line survived Kconfig's dependencies, and compiles. `patches` has what we change in the source.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The configuration fragment, as it lies in the tree.
pub const FRAGMENT: &str = include_str!("../kernel.config");

/// What is changed in the source: each patch with its reason above it.
pub const PATCHES: &[&str] = &[
    include_str!("../patches/fuse-data-in-pages.patch"),
    include_str!("../patches/fuse-rights-after-writes.patch"),
    include_str!("../patches/fuse-submount-flags.patch"),
    include_str!("../patches/overlayfs-removed-names.patch"),
    include_str!("../patches/page-reporting-at-rest.patch"),
];

/// Names how [`build`] builds; to be changed with it, so that kept kernels are built anew.
pub const RECIPE: &str = "allnoconfig, strip --strip-all, 1";

/// The packages that a build needs besides the source.
pub const BUILD_PACKAGES: &[&str] = &["bc", "bison", "flex", "gcc", "libelf-dev", "make", "patch", "xz-utils"];

/// Folders of hardware that no guest has: two thirds of the source, which are not unpacked. Their
/// Kconfig files are read, and stay.
const UNUSED: &[&str] = &[
    "arch/arm",
    "arch/arm64",
    "arch/mips",
    "arch/powerpc",
    "drivers/gpu",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi",
    "drivers/staging",
    "drivers/usb",
    "sound",
];

/// One setting of a line of the fragment.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Setting<'a> {
    /// With its `CONFIG_` prefix.
    pub name: &'a str,
    /// `y`, `n` or a number.
    pub value: &'a str,
}

/// What a line of the fragment asks for, by the names that it has in one kernel or another.
pub type KernelOption<'a> = Vec<Setting<'a>>;

/// Reads a fragment: `CONFIG_NAME=value # reason`, with more settings before the reason where kernels have
/// other names; blank lines and lines that begin with `#`.
///
/// A line without a reason is an error: the fragment is the documentation of the kernel.
pub fn parse(fragment: &str) -> Result<Vec<KernelOption<'_>>> {
    let mut options = Vec::new();
    for (number, line) in fragment.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parse = || {
            let (settings, reason) = line.split_once('#')?;
            let setting = |word| -> Option<Setting<'_>> {
                let (name, value) = str::split_once(word, '=')?;
                (name.starts_with("CONFIG_") && !value.is_empty()).then_some(Setting { name, value })
            };
            let option: Option<KernelOption<'_>> = settings.split_whitespace().map(setting).collect();
            option.filter(|option| !option.is_empty() && !reason.trim().is_empty())
        };
        let Some(option) = parse() else {
            bail!("kernel.config line {}: expected CONFIG_NAME=value # reason, found {line:?}", number + 1);
        };
        options.push(option);
    }
    Ok(options)
}

/// The options that `config` (a finished `.config`) does not hold as asked for, by none of their names.
pub fn lost<'a, 'o>(options: &'o [KernelOption<'a>], config: &str) -> Vec<&'o KernelOption<'a>> {
    let holds = |setting: &Setting<'_>| {
        let line = config.lines().find(|line| line.strip_prefix(setting.name).is_some_and(|rest| rest.starts_with('=')));
        match (line, setting.value) {
            (None, "n") => true,
            (Some(line), value) => line[setting.name.len() + 1..] == *value,
            (None, _) => false,
        }
    };
    options.iter().filter(|option| !option.iter().any(holds)).collect()
}

/// The source archive of the distribution: the newest `/usr/src/linux-source-*.tar.xz`.
pub fn source() -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/src")
        .context("look for a kernel source package in /usr/src")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("linux-source-") && name.to_string_lossy().ends_with(".tar.xz"))
        })
        .collect();
    found.sort();
    found.pop().context("find a kernel source package in /usr/src: install linux-source")
}

/// Builds `vmlinux` into `out`, working in `work`; about 10 minutes on two cores.
///
/// # Errors
/// When a patch does not fit, when an option of the fragment did not survive, naming it, and when the compiler fails, with
/// the end of its output.
pub fn build(source: &Path, work: &Path, out: &Path) -> Result<()> {
    let options = parse(FRAGMENT)?;
    let mut unpack = Command::new("tar");
    unpack.arg("-xf").arg(source).arg("--strip-components=1").arg("-C").arg(work);
    unpack.args(UNUSED.iter().flat_map(|folder| ["c", "h"].map(|kind| format!("--exclude=*/{folder}/*.{kind}"))));
    run(&mut unpack, "unpack the kernel source")?;
    for patch in PATCHES {
        let file = work.join("caisson.patch");
        std::fs::write(&file, patch)?;
        let subject = patch.lines().next().unwrap_or_default();
        let mut apply = Command::new("patch");
        apply.args(["--strip=1", "--fuzz=0", "--batch", "--forward", "--directory"]).arg(work).arg("--input").arg(file);
        run(&mut apply, &format!("change the kernel source ({subject})"))?;
    }
    let fragment: String = options.iter().flatten().map(|setting| format!("{}={}\n", setting.name, setting.value)).collect();
    let fragment_path = work.join("caisson.config");
    std::fs::write(&fragment_path, fragment)?;
    run(make(work).arg(format!("KCONFIG_ALLCONFIG={}", fragment_path.display())).arg("allnoconfig"), "configure the guest kernel")?;
    let lost = lost(&options, &std::fs::read_to_string(work.join(".config"))?);
    if !lost.is_empty() {
        let names: Vec<String> = lost.iter().map(|option| format!("{}={}", option[0].name, option[0].value)).collect();
        bail!("configure the guest kernel: {} did not survive; a dependency is missing in kernel.config", names.join(", "));
    }
    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get() + 1);
    run(make(work).arg(format!("-j{jobs}")).arg("vmlinux"), "compile the guest kernel")?;
    let target = out.join("vmlinux");
    run(Command::new("strip").arg("--strip-all").arg("-o").arg(&target).arg(work.join("vmlinux")), "strip the guest kernel")?;
    std::fs::copy(work.join(".config"), out.join("config")).context("keep the kernel's configuration")?;
    Ok(())
}

/// `make` with all that would make two builds differ taken out.
fn make(work: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("-s").arg("-C").arg(work).arg("ARCH=x86_64");
    command
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "caisson")
        .env("KBUILD_BUILD_HOST", "caisson")
        .env("KBUILD_BUILD_VERSION", "1");
    command
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| what.to_owned())?;
    if !output.status.success() {
        // `patch` says on its standard output what does not fit.
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        bail!("{what}: {}\n{}", output.status, lines[lines.len().saturating_sub(20)..].join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_fragment_has_a_reason_and_stands_once() {
        let options = parse(FRAGMENT).unwrap();
        let mut names: Vec<&str> = options.iter().flatten().map(|setting| setting.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "an option stands twice");
    }

    #[test]
    fn a_line_without_reason_is_refused() {
        assert!(parse("CONFIG_SMP=y").unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn an_option_that_did_not_survive_is_found() {
        let options = parse("CONFIG_A=y # a\nCONFIG_B=n # b\nCONFIG_C=7 CONFIG_NEW_C=y # c\n").unwrap();
        let names = |config| lost(&options, config).iter().map(|option| option[0].name).collect::<Vec<_>>();
        assert!(names("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=7\n").is_empty());
        assert!(names("CONFIG_A=y\nCONFIG_NEW_C=y\n").is_empty());
        assert_eq!(names("CONFIG_B=y\nCONFIG_C=8\n"), ["CONFIG_A", "CONFIG_B", "CONFIG_C"]);
    }
}
