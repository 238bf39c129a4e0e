//! The shim's log: lines in containerd's format, to the FIFO `log` in the bundle.
//!
//! containerd reads the FIFO and adds the lines to its own log. When nobody reads, lines are
//! lost rather than waited for.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger {
    out: Mutex<Option<File>>,
    namespace: String,
    pod: String,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The libraries' own messages are for their developers.
        metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!(
            "time={:?} level={} msg={:?} runtime=io.containerd.caisson.v2 namespace={} pod={}\n",
            rfc3339(SystemTime::now()),
            record.level().as_str().to_lowercase(),
            record.args().to_string(),
            self.namespace,
            self.pod
        );
        if let Ok(mut out) = self.out.lock()
            && let Some(out) = out.as_mut()
        {
            // A full FIFO is nobody reading.
            let _ = out.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging to `<bundle>/log`; without that FIFO there is no log.
pub fn init(bundle: &Path, namespace: &str, pod: &str, level: LevelFilter) {
    // Read-write, so that opening needs no reader and writing gets no SIGPIPE without one.
    let out =
        std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(bundle.join("log")).ok();
    let logger = Logger { out: Mutex::new(out), namespace: namespace.to_owned(), pod: pod.to_owned() };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

/// A time as `2026-01-02T03:04:05.678Z` (civil-from-days, after H. Hinnant's public algorithm).
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn our_own_messages_are_logged_and_those_of_libraries_are_not() {
        let logger = Logger { out: Mutex::default(), namespace: String::new(), pod: String::new() };
        let wants = |target: &str| logger.enabled(&Metadata::builder().target(target).build());
        assert!(wants(module_path!()) && !wants("ttrpc::asynchronous") && !wants("caisson_host"));
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_millis(951_782_400_500)), "2000-02-29T00:00:00.500Z");
    }
}
