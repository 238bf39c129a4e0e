//! The share: what its connection to the host is asked before a part of it is unmounted.

use std::time::{Duration, Instant};

/// A folder for each FUSE connection (Linux `Documentation/filesystems/fuse.rst`, "Control filesystem").
pub const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// For requests that are under way; on a busy share there always are some.
const TIMEOUT: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_millis(2);

/// Waits until the host has answered what the guest asked of files.
///
/// What the host has mounted in the share is a mount of its own in the guest, made by who goes there
/// first, and gone with the last mount namespace that has it. Linux 6.1 does not wait for that
/// mount's requests then (`virtio_kill_sb`): a read or a release that is answered later finds its inode
/// freed, and with it dies the worker that takes the answers for all files.
pub fn settle() {
    let begin = Instant::now();
    while waiting() > 0 && begin.elapsed() < TIMEOUT {
        std::thread::sleep(INTERVAL);
    }
}

/// Requests that were made and not answered, of all connections.
fn waiting() -> u64 {
    let connections = std::fs::read_dir(CONNECTIONS).into_iter().flatten().flatten();
    let counts = connections.filter_map(|connection| std::fs::read_to_string(connection.path().join("waiting")).ok());
    counts.filter_map(|count| count.trim().parse::<u64>().ok()).sum()
}
