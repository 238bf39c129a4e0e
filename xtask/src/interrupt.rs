//! Ctrl-C: what runs ends by it, and what was made for it is then removed as after any other failure.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;
use signal_hook::flag;

/// The exit code of a command that Ctrl-C ended: 128 and the signal's number.
pub const EXIT_CODE: i32 = 128 + SIGINT;

static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Keeps the first Ctrl-C from ending this process, and not those that it has started; a second one ends it.
pub fn catch() -> Result<()> {
    flag::register_conditional_shutdown(SIGINT, EXIT_CODE, Arc::clone(&INTERRUPTED)).context("catch Ctrl-C")?;
    flag::register(SIGINT, Arc::clone(&INTERRUPTED)).context("catch Ctrl-C")?;
    Ok(())
}

/// Whether somebody has pressed Ctrl-C.
pub fn seen() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
