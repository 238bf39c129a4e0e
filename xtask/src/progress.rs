//! Long steps say what they do and how long they have been at it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Runs `work` under a spinner (on a terminal) or a pair of lines (elsewhere) on stderr.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    if !std::io::stderr().is_terminal() {
        eprintln!("==> {what}");
        let result = work();
        let verdict = if result.is_ok() { "done" } else { "FAILED" };
        eprintln!("==> {what}: {verdict} after {:.1} s", start.elapsed().as_secs_f32());
        return result;
    }
    let style = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner().with_style(style).with_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    let result = work();
    let verdict = if result.is_ok() { "done" } else { "FAILED" };
    bar.finish_and_clear();
    eprintln!("==> {what}: {verdict} after {:.1} s", start.elapsed().as_secs_f32());
    result
}
