//! Pod records on disk: `<run dir>/<namespace>/<pod>/record.json`.

use std::io;
use std::path::{Path, PathBuf};

use caisson_protocol::record::{PodRecord, ProcessRecord};

/// Name of the record in a pod's folder.
pub const RECORD: &str = "record.json";
/// Folder below the run dir in which user ids are reserved.
pub const UIDS: &str = "uids";

/// The folder of a pod.
pub fn pod_dir(run_dir: &Path, namespace: &str, pod: &str) -> PathBuf {
    run_dir.join(namespace).join(pod)
}

/// Writes a record so that a reader finds the old one or the new one, whole.
///
/// # Errors
/// When the file cannot be written, as on a full disk.
pub fn write(dir: &Path, record: &PodRecord) -> io::Result<()> {
    let scratch = dir.join(".record.json");
    std::fs::write(&scratch, serde_json::to_vec(record)?)?;
    std::fs::rename(&scratch, dir.join(RECORD))
}

/// Reads the record in a pod's folder; `None` when there is none.
///
/// # Errors
/// When the file is there but cannot be read or is no record.
pub fn read(dir: &Path) -> io::Result<Option<PodRecord>> {
    match std::fs::read(dir.join(RECORD)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// All records below a run dir, in order of namespace and pod. Folders without one are passed over.
///
/// # Errors
/// When a folder cannot be read.
pub fn all(run_dir: &Path) -> io::Result<Vec<PodRecord>> {
    let mut records = Vec::new();
    for namespace in folders(run_dir)? {
        if namespace.file_name().is_some_and(|name| name == UIDS) {
            continue;
        }
        let pods = match folders(&namespace) {
            // Not the caller's to look into.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            pods => pods?,
        };
        for pod in pods {
            // A pod that ends while we look is not an error, nor is one that is somebody else's.
            if let Ok(Some(record)) = read(&pod) {
                records.push(record);
            }
        }
    }
    records.sort_by(|a, b| (&a.namespace, &a.pod).cmp(&(&b.namespace, &b.pod)));
    Ok(records)
}

fn folders(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect())
}

/// Clock ticks after boot at which a process started; `None` when there is no such process.
pub fn start_time(pid: u32) -> Option<u64> {
    // proc(5): the command name, field 2, is in parentheses and may hold anything.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A record of a running process.
pub fn process(role: &str, pid: u32) -> ProcessRecord {
    ProcessRecord { role: role.to_owned(), pid, start_time: start_time(pid).unwrap_or(0) }
}

/// Whether the process of a record still runs: the same id, started at the same time.
pub fn is_alive(process: &ProcessRecord) -> bool {
    start_time(process.pid) == Some(process.start_time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_record_is_listed() {
        let run = tempfile::tempdir().unwrap();
        let dir = pod_dir(run.path(), "default", "web");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::create_dir_all(run.path().join(UIDS).join("7")).unwrap();
        let record = PodRecord { namespace: "default".into(), pod: "web".into(), ..PodRecord::default() };
        write(&dir, &record).unwrap();
        assert_eq!(all(run.path()).unwrap(), [record]);
    }

    #[test]
    fn a_reused_process_id_is_not_mistaken() {
        let mut me = process("shim", std::process::id());
        assert!(is_alive(&me));
        me.start_time += 1;
        assert!(!is_alive(&me));
    }
}
