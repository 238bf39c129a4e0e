//! `cargo xtask sanitize`: the unit tests of what works on a guest's bytes, and of what it shares, under AddressSanitizer.

use anyhow::Result;
use xshell::{Shell, cmd};

use crate::{build, fuzz};

const PACKAGES: &[&str] = &["caisson-sys", "caisson-host", "caisson-vmm", "caisson-fs", "caisson-agent"];
/// What the sanitizer itself asks the kernel for, a role's filter forbids.
const NOT_WITH_A_SANITIZER: &str = "filters::tests";

/// Runs them; returns the exit code.
pub fn run() -> Result<i32> {
    let sh = Shell::new()?;
    let top = build::source_dir()?;
    sh.change_dir(&top);
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let packages = PACKAGES.iter().flat_map(|name| ["--package", name]);
    let (triple, folder) = (fuzz::TRIPLE, top.join("target/sanitize"));
    let (_flags, _sanitizer) = (sh.push_env("RUSTFLAGS", fuzz::SANITIZER), sh.push_env("RUSTC_BOOTSTRAP", "1"));
    let tests = cmd!(
        sh,
        "{cargo} test --quiet --target {triple} --target-dir {folder} --no-fail-fast {packages...} -- --skip {NOT_WITH_A_SANITIZER}"
    );
    // What failed has been said.
    Ok(i32::from(tests.quiet().run().is_err()))
}
