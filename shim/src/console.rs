//! The guest kernel's debug console (`kernel.console`), line by line in the shim's log.
//!
//! The monitor has the end of a pipe and not containerd's log itself, into which it could write lines as another's. What is
//! more than anybody reads is lost, as on a serial line.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;

use crate::errors::{MAX_SAID, one_line};

/// From one line to the next.
const PAUSE: Duration = Duration::from_millis(2);

/// The end for the monitor, which does not block.
///
/// # Errors
/// When no pipe can be made.
pub fn open() -> std::io::Result<OwnedFd> {
    let (reads, writes) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    tokio::spawn(follow(Receiver::from_owned_fd(reads)?));
    Ok(writes)
}

async fn follow(pipe: Receiver) {
    let (mut lines, mut line) = (BufReader::new(pipe), Vec::new());
    loop {
        line.clear();
        // A line without end is several.
        match (&mut lines).take(MAX_SAID as u64).read_until(b'\n', &mut line).await {
            Ok(1..) => log::info!("console: {}", one_line(String::from_utf8_lossy(&line).trim_end())),
            _ => return,
        }
        tokio::time::sleep(PAUSE).await;
    }
}
