//! Reads the log that a panicking guest kernel left in memory (Linux `fs/pstore/ram_core.c`).
//!
//! The region is one `persistent_ram_buffer`: signature, start, size, then the record: a line
//! `====<time>-D` and the end of the kernel's log. All of it is the guest's word and bounded here.

use caisson_protocol::guest::PANIC_LOG_BYTES;
use caisson_protocol::vmm::Stopped;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, Layout};

/// `PERSISTENT_RAM_SIG`, "DBGC".
const SIGNATURE: u32 = 0x4347_4244;
/// Bytes of the header before the record.
const HEADER: u64 = 12;
/// How much of the log is kept: the last lines say what happened.
const KEEP_LINES: usize = 40;
const KEEP_BYTES: usize = 8 << 10;
const KEEP_REASON: usize = 300;

/// What a panic left; `None` when the kernel did not panic.
pub fn read(memory: &GuestMemory, layout: Layout) -> Option<Stopped> {
    let base = GuestAddress(layout.panic_log());
    let signature: u32 = memory.read_obj(base).ok()?;
    let size: u32 = memory.read_obj(GuestAddress(base.0 + 8)).ok()?;
    if signature != SIGNATURE || size == 0 || u64::from(size) > PANIC_LOG_BYTES - HEADER {
        return None;
    }
    let mut record = vec![0; size as usize];
    memory.read_slice(&mut record, GuestAddress(base.0 + HEADER)).ok()?;
    let text: String = String::from_utf8_lossy(&record).chars().filter(|c| !c.is_control() || *c == '\n').collect();
    text.starts_with("====").then(|| summary(&text))
}

/// The panic's own line, and the lines before it.
fn summary(text: &str) -> Stopped {
    let lines: Vec<&str> = text.lines().skip(1).map(message).collect();
    let panic =
        lines.iter().rposition(|line| line.contains("Kernel panic") || line.starts_with("BUG:")).unwrap_or(lines.len().saturating_sub(1));
    let mut log = String::new();
    for line in lines.iter().take(panic).skip((panic + 1).saturating_sub(KEEP_LINES)) {
        if log.len() + line.len() > KEEP_BYTES {
            break;
        }
        log.push_str(line);
        log.push('\n');
    }
    let reason = lines.get(panic).copied().unwrap_or_default();
    Stopped::Panic { reason: reason.chars().take(KEEP_REASON).collect(), log }
}

/// A line of the log without its level and time: `<6>[    1.234567] message`, the time being optional.
fn message(line: &str) -> &str {
    let line = line.strip_prefix('<').and_then(|rest| rest.split_once('>')).map_or(line, |(_, rest)| rest);
    line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory_with(log: &[u8], size: u32) -> (GuestMemory, Layout) {
        let layout = Layout::new(64, 0);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let base = layout.panic_log();
        memory.write_obj(SIGNATURE, GuestAddress(base)).unwrap();
        memory.write_obj(size, GuestAddress(base + 8)).unwrap();
        memory.write_slice(log, GuestAddress(base + HEADER)).unwrap();
        (memory, layout)
    }

    #[test]
    fn the_panic_line_is_the_reason() {
        for log in
            ["====1.2-D\n<6>[    1.0] hello\n<0>[    1.1] Kernel panic - of a test\n", "====1.2-D\n<6>hello\n<0>Kernel panic - of a test\n"]
        {
            let (memory, layout) = memory_with(log.as_bytes(), log.len() as u32);
            let expected = Stopped::Panic { reason: "Kernel panic - of a test".into(), log: "hello\n".into() };
            assert_eq!(read(&memory, layout).unwrap(), expected);
        }
    }

    #[test]
    fn a_kernel_that_did_not_panic_left_nothing() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        assert_eq!(read(&memory, Layout::new(64, 0)), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_bounded(log in proptest::collection::vec(any::<u8>(), 0..4096), size: u32) {
            let (memory, layout) = memory_with(&log, size);
            if let Some(Stopped::Panic { reason, log }) = read(&memory, layout) {
                prop_assert!(reason.chars().count() <= KEEP_REASON && log.len() <= KEEP_BYTES + KEEP_LINES);
            }
        }
    }
}
