//! Debian packages, downloaded with the machine's own apt and unpacked without installing them.
//!
//! The node is made of packages of several Debian releases, whatever the machine itself runs.
//! apt resolves and verifies them (signatures of Debian's archive keyring) against lists of its
//! own in our cache, so nothing of the machine's package state is read or changed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use crate::cache;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The Debian mirror that this machine's apt is configured with.
fn mirror(sh: &Shell) -> Result<String> {
    let sites = cmd!(sh, "apt-get indextargets --format $(SITE) --no-release-info")
        .quiet()
        .ignore_stderr()
        .read()
        .context("ask apt for the Debian mirror")?;
    sites
        .lines()
        .find(|site| site.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
        .context("find a Debian mirror in this machine's apt sources: none ends in /debian")
}

/// Options that make apt work on lists, cache and (empty) state of our own.
fn options(sh: &Shell, suite: &str) -> Result<Vec<String>> {
    let dir = cache::root()?.join("apt").join(suite);
    sh.create_dir(dir.join("lists/partial"))?;
    sh.create_dir(dir.join("archives/partial"))?;
    let list = dir.join("sources.list");
    sh.write_file(&list, format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror(sh)?))?;
    let dir = dir.display();
    Ok([
        format!("Dir::Etc::sourcelist={}", list.display()),
        "Dir::Etc::sourceparts=/dev/null".into(),
        "Dir::Etc::preferences=/dev/null".into(),
        "Dir::Etc::preferencesparts=/dev/null".into(),
        format!("Dir::State::lists={dir}/lists"),
        "Dir::State::status=/dev/null".into(),
        format!("Dir::Cache={dir}"),
        format!("Dir::Cache::archives={dir}/archives"),
        "APT::Architecture=amd64".into(),
        "APT::Install-Recommends=false".into(),
        "APT::Sandbox::User=".into(),
        "Acquire::Languages=none".into(),
        "Acquire::Retries=3".into(),
        "Debug::NoLocking=1".into(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect())
}

/// Downloads `packages` of `suite` with all that they depend on.
///
/// Returns the package files in a stable order. With `dependencies` false only the named ones.
pub fn download(suite: &str, packages: &[&str], dependencies: bool) -> Result<Vec<PathBuf>> {
    let sh = Shell::new()?;
    if !Path::new(KEYRING).exists() {
        bail!("verify Debian packages: {KEYRING} is missing; install the package debian-archive-keyring");
    }
    let options = &options(&sh, suite)?;
    let lists = cache::root()?.join("apt").join(suite);
    let stamp = lists.join("updated");
    let fresh = stamp
        .metadata()
        .and_then(|meta| meta.modified())
        .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < std::time::Duration::from_secs(12 * 3600)));
    if !fresh {
        cmd!(sh, "apt-get {options...} -qq update")
            .quiet()
            .ignore_stdout()
            .run()
            .with_context(|| format!("update the package lists of {suite}"))?;
        sh.write_file(&stamp, "")?;
    }
    let plan = cmd!(sh, "apt-get {options...} -qq --simulate install {packages...}")
        .quiet()
        .read()
        .with_context(|| format!("resolve the packages of {suite}"))?;
    let wanted: Vec<(String, String)> = plan
        .lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|line| {
            let (name, rest) = line.split_once(' ')?;
            let version = rest.trim_start_matches('(').split(' ').next()?;
            Some((name.to_owned(), version.to_owned()))
        })
        .filter(|(name, _)| dependencies || packages.contains(&name.as_str()))
        .collect();
    let archives = lists.join("archives");
    let files: Vec<PathBuf> = wanted
        .iter()
        .flat_map(|(name, version)| {
            ["amd64", "all"].map(|arch| archives.join(format!("{name}_{}_{arch}.deb", version.replace(':', "%3a"))))
        })
        .collect();
    let have = |name: &str| {
        files.iter().any(|file| file.exists() && file.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&format!("{name}_"))))
    };
    if !wanted.iter().all(|(name, _)| have(name)) {
        if dependencies {
            cmd!(sh, "apt-get {options...} -qq -y --download-only install {packages...}").quiet().ignore_stdout().run()
        } else {
            sh.change_dir(&archives);
            let exact: Vec<String> = wanted.iter().map(|(name, version)| format!("{name}={version}")).collect();
            cmd!(sh, "apt-get {options...} -qq download {exact...}").quiet().ignore_stdout().run()
        }
        .with_context(|| format!("download packages of {suite}"))?;
    }
    let mut found: Vec<PathBuf> = files.into_iter().filter(|file| file.exists()).collect();
    found.sort();
    if found.len() < wanted.len() {
        bail!("download packages of {suite}: got {} of {}", found.len(), wanted.len());
    }
    Ok(found)
}

/// Unpacks package files over `root`, without running their scripts.
pub fn unpack(files: &[PathBuf], root: &Path) -> Result<()> {
    let sh = Shell::new()?;
    for file in files {
        cmd!(sh, "dpkg-deb --extract {file} {root}").quiet().run().with_context(|| format!("unpack {}", file.display()))?;
    }
    Ok(())
}

/// Makes sure that `packages` are installed on this machine: installs them when we are root,
/// says so, and otherwise names the line to run.
pub fn require_installed(packages: &[&str]) -> Result<()> {
    let sh = Shell::new()?;
    let format = "${Status}";
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| {
            let status = cmd!(sh, "dpkg-query --show --showformat={format} {package}").quiet().ignore_stderr().ignore_status().read();
            !status.is_ok_and(|status| status.contains("ok installed"))
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("this machine lacks packages; run: sudo apt-get install --no-install-recommends {}", missing.join(" "));
    }
    crate::progress::step(&format!("installing {} with apt-get", missing.join(", ")), || {
        let _env = sh.push_env("DEBIAN_FRONTEND", "noninteractive");
        cmd!(sh, "apt-get -qq update").quiet().ignore_stdout().run()?;
        cmd!(sh, "apt-get -qq -y install --no-install-recommends {missing...}").quiet().ignore_stdout().run()?;
        Ok(())
    })
}
