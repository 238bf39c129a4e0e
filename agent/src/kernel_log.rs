//! What the guest's kernel has said (Documentation/ABI/testing/dev-kmsg).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use caisson_protocol::agent::KernelLogResponse;

/// The longest message with its fields, as the kernel hands it out.
const MAX_RECORD: usize = 8192;
/// The most text of one answer; who wants more asks again.
const MAX_TEXT: usize = 256 << 10;

/// The messages from one number on, and the number of the next.
///
/// # Errors
/// When the log cannot be read.
pub fn read(after: u64) -> Result<KernelLogResponse> {
    let mut log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").context("open /dev/kmsg")?;
    let mut answer = KernelLogResponse { next: after, ..KernelLogResponse::default() };
    let mut record = [0; MAX_RECORD];
    while answer.text.len() < MAX_TEXT {
        let length = match log.read(&mut record) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Others took its place before it was read; or it is longer than any can be.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EINVAL)) => continue,
            Err(error) => return Err(error).context("read /dev/kmsg"),
        };
        let Some((number, line)) = parse(&String::from_utf8_lossy(&record[..length])) else { continue };
        if number >= after {
            answer.text.push_str(&line);
            answer.next = number + 1;
        }
    }
    Ok(answer)
}

/// The number of a record, and its message as a line: "6,339,5140900,-;text\n KEY=VALUE\n".
fn parse(record: &str) -> Option<(u64, String)> {
    let (fields, text) = record.split_once(';')?;
    let mut fields = fields.split(',').skip(1).map(|field| field.parse::<u64>().ok());
    let (number, time_us) = (fields.next()??, fields.next()??);
    let text = text.lines().next().unwrap_or_default();
    Some((number, format!("[{:5}.{:06}] {text}\n", time_us / 1_000_000, time_us % 1_000_000)))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_record_is_a_line() {
        let line = "[    5.140900] eth0: up\n".to_owned();
        assert_eq!(parse("6,339,5140900,-;eth0: up\n SUBSYSTEM=net\n"), Some((339, line)));
        assert_eq!(parse("nonsense"), None);
    }
}
