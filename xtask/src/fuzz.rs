//! `cargo xtask fuzz`: the fuzz targets of `fuzz/`, each from its seeds on for a bounded time.
//!
//! They are built with libFuzzer, the coverage that guides it, and AddressSanitizer, by the stable compiler.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use xshell::{Shell, cmd};

use crate::coverage::Coverage;
use crate::{build, packages, progress};

/// As in `fuzz/Cargo.toml`.
pub const TARGETS: &[&str] = &["devices", "net", "disk", "fuse", "agent", "messages"];
/// The sanitizers need the triple to be named.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// AddressSanitizer; not among what a stable compiler promises: with `RUSTC_BOOTSTRAP=1` it has it all the same.
pub const SANITIZER: &str = "-Zsanitizer=address";
/// What cargo-fuzz gives the compiler besides.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0";
/// Seconds that one input may take, and memory in MiB that a target may.
const INPUT_SECONDS: u32 = 10;
const MEMORY_MIB: u32 = 2048;
/// The longest input.
const MAX_BYTES: u32 = 4096;

#[derive(Args)]
pub struct FuzzArgs {
    /// Only this target
    target: Option<String>,
    /// For how long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Put what was found and covers more into the tree's seeds, as few and as short as can be
    #[arg(long)]
    keep: bool,
    /// Say which of our functions the seeds and what was found reach
    #[arg(long)]
    coverage: bool,
}

/// Runs the targets; returns the exit code.
pub fn run(args: &FuzzArgs) -> Result<i32> {
    let targets: Vec<&str> = TARGETS.iter().copied().filter(|target| args.target.as_deref().is_none_or(|only| only == *target)).collect();
    ensure!(!targets.is_empty(), "there is no such target; there are {}", TARGETS.join(", "));
    let (mut failed, mut coverage) = (0, Coverage::default());
    for target in build_targets()?.of(&targets) {
        if let Err(error) = target.run(args.seconds, None).and_then(|()| if args.keep { target.keep() } else { Ok(()) }) {
            println!("{error:#}");
            failed += 1;
        }
        if args.coverage {
            target.replay(&mut coverage)?;
        }
    }
    if args.coverage {
        print!("{coverage}");
    }
    Ok(i32::from(failed > 0))
}

/// Where the built targets are.
pub struct Built(PathBuf);

/// Builds all targets.
pub fn build_targets() -> Result<Built> {
    packages::require_installed(&["g++", "binutils"])?;
    let sh = Shell::new()?;
    let top = build::source_dir()?;
    sh.change_dir(&top);
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let folder = top.join("target/fuzz");
    progress::step("building the fuzz targets", || {
        let _flags = sh.push_env("RUSTFLAGS", format!("{SANITIZER} {FLAGS}"));
        let _sanitizer = sh.push_env("RUSTC_BOOTSTRAP", "1");
        cmd!(sh, "{cargo} build --quiet --package caisson-fuzz --bins --profile fuzz --target {TRIPLE} --target-dir {folder}")
            .quiet()
            .run()
            .context("build the fuzz targets")
    })?;
    Ok(Built(folder))
}

impl Built {
    /// The named ones.
    pub fn of(&self, names: &[&'static str]) -> Vec<Target> {
        names.iter().map(|name| Target { name, folder: self.0.clone() }).collect()
    }
}

/// A target that was built.
pub struct Target {
    /// As in [`TARGETS`].
    pub name: &'static str,
    folder: PathBuf,
}

impl Target {
    /// Tries all seeds and what becomes of them, for so many seconds, by chance or from a number on.
    ///
    /// # Errors
    /// When an input was found that breaks it: the file that holds it is named.
    pub fn run(&self, seconds: u32, chance: Option<u32>) -> Result<()> {
        let (sh, work) = (Shell::new()?, self.work());
        for folder in ["corpus", "share", "found"] {
            sh.create_dir(work.join(folder))?;
        }
        let (corpus, seeds, log) = (work.join("corpus"), self.seeds()?, work.join("log"));
        let limits = [
            format!("-max_total_time={seconds}"),
            format!("-seed={}", chance.unwrap_or(0)),
            format!("-timeout={INPUT_SECONDS}"),
            format!("-rss_limit_mb={MEMORY_MIB}"),
            format!("-max_len={MAX_BYTES}"),
            format!("-artifact_prefix={}/", work.join("found").display()),
            "-print_final_stats=1".to_owned(),
        ];
        let program = self.program();
        let output = cmd!(sh, "{program} {limits...} {corpus} {seeds}")
            .env("CAISSON_FUZZ_SHARE", work.join("share"))
            .env("RUST_BACKTRACE", "1")
            .quiet()
            .ignore_status()
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        sh.write_file(&log, text.as_bytes())?;
        if !output.status.success() {
            let why = text.lines().find(|line| line.contains("panicked") || line.contains("ERROR")).unwrap_or("it ended");
            bail!("fuzz {}: {why}; {} says more", self.name, log.display());
        }
        println!("fuzz {:<10} {}", self.name, summary(&text));
        Ok(())
    }

    /// Runs the seeds and what was found once, and adds which functions that reached.
    fn replay(&self, coverage: &mut Coverage) -> Result<()> {
        let (sh, corpus, seeds, program) = (Shell::new()?, self.work().join("corpus"), self.seeds()?, self.program());
        let output = cmd!(sh, "{program} -runs=0 -print_coverage=1 {corpus} {seeds}")
            .env("CAISSON_FUZZ_SHARE", self.work().join("share"))
            .env("ASAN_OPTIONS", "external_symbolizer_path=/usr/bin/addr2line")
            .quiet()
            .output()
            .with_context(|| format!("replay what fuzz {} found", self.name))?;
        coverage.add(&String::from_utf8_lossy(&output.stderr), &build::source_dir()?);
        Ok(())
    }

    /// Merges what the runs left into the seeds.
    fn keep(&self) -> Result<()> {
        let (sh, corpus, seeds) = (Shell::new()?, self.work().join("corpus"), self.seeds()?);
        let (program, share) = (self.program(), self.work().join("share"));
        cmd!(sh, "{program} -merge=1 {seeds} {corpus}").env("CAISSON_FUZZ_SHARE", share).quiet().ignore_stderr().run()?;
        Ok(())
    }

    fn program(&self) -> PathBuf {
        self.folder.join(TRIPLE).join("fuzz").join(self.name)
    }

    fn work(&self) -> PathBuf {
        self.folder.join("work").join(self.name)
    }

    fn seeds(&self) -> Result<PathBuf> {
        let folder = build::source_dir()?.join("fuzz/seeds").join(self.name);
        ensure!(folder.is_dir(), "fuzz {}: {} has no seeds", self.name, folder.display());
        Ok(folder)
    }
}

/// What libFuzzer says of how far it came.
fn summary(text: &str) -> String {
    let last = text.lines().rfind(|line| line.contains(" cov: ")).unwrap_or_default();
    let after = |text: &str, word: &str| text.split(word).nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap_or("?").to_owned();
    let counters = after(text, "INFO: Loaded 1 PC tables (").trim_end_matches(':').to_owned();
    format!(
        "{} inputs, {} of {counters} edges, {} features",
        after(text, "stat::number_of_executed_units:"),
        after(last, " cov: "),
        after(last, " ft: ")
    )
}
