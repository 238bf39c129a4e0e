//! What a pod keeps on disk: its folder, its record, the user id that its VMM runs as.
//!
//! The record is written before what it names is acquired, so that `delete` after a kill -9 finds
//! at least all that exists.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_host::process::Process;
use caisson_host::records::{self, UIDS};
use caisson_protocol::record::{PodRecord, ProcessRecord};
use nix::mount::{MntFlags, umount2};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::Signal;

use crate::mounts;
use crate::snapshot::Left;

/// A pod's folder and record.
pub struct Store {
    run_dir: PathBuf,
    dir: PathBuf,
    record: Mutex<PodRecord>,
}

impl Store {
    /// Makes the folder of a new pod.
    ///
    /// # Errors
    /// When the run dir cannot be written.
    pub fn create(run_dir: &Path, record: PodRecord) -> Result<Self> {
        std::fs::create_dir_all(run_dir).with_context(|| format!("create the run folder {}", run_dir.display()))?;
        let run_dir = real(run_dir);
        let dir = records::pod_dir(&run_dir, &record.namespace, &record.pod);
        // What is mounted in it shows files without the folders that keep others of the host from them.
        let make = || match DirBuilder::new().mode(0o700).create(&dir) {
            // Another try has left it.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made,
        };
        within(&run_dir.join(&record.namespace), make).with_context(|| format!("create the pod's folder {}", dir.display()))?;
        write(&dir, &record)?;
        Ok(Self { run_dir, dir, record: Mutex::new(record) })
    }

    /// The pod's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The pod's id.
    pub fn pod(&self) -> String {
        self.read(|record| record.pod.clone())
    }

    /// Shows the record.
    pub fn read<T>(&self, look: impl FnOnce(&PodRecord) -> T) -> T {
        look(&self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Changes the record, on disk first.
    ///
    /// # Errors
    /// When the disk is full, say.
    pub fn change(&self, change: impl FnOnce(&mut PodRecord)) -> Result<()> {
        let mut record = self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            write(&self.dir, &changed)?;
            *record = changed;
        }
        Ok(())
    }

    /// Adds a process to the record.
    ///
    /// # Errors
    /// As [`Store::change`].
    pub fn add_process(&self, role: &str, pid: u32) -> Result<()> {
        let process = records::process(role, pid);
        self.change(|record| record.processes.push(process))
    }

    /// Monitors of the other pods of this pod's tenant.
    ///
    /// # Errors
    /// When the run dir cannot be read.
    pub fn monitors_of_tenant(&self) -> Result<Vec<ProcessRecord>> {
        let (tenant, pod) = self.read(|record| (record.tenant.clone(), (record.namespace.clone(), record.pod.clone())));
        let all = records::all(&self.run_dir).with_context(|| format!("read the pods in {}", self.run_dir.display()))?;
        let others = all.into_iter().filter(|other| other.tenant == tenant && (&other.namespace, &other.pod) != (&pod.0, &pod.1));
        Ok(others.flat_map(|other| other.processes).filter(|process| process.role == "vmm").collect())
    }

    /// Has the host's other pods wait before they take this lock, until what is returned is dropped.
    ///
    /// # Errors
    /// When another pod does not let it go.
    pub fn lock_host(&self) -> Result<impl Drop + use<>> {
        let folder = std::fs::File::open(&self.run_dir).with_context(|| format!("open {}", self.run_dir.display()))?;
        let start = Instant::now();
        while let Err(error) = flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            anyhow::ensure!(error == Errno::WOULDBLOCK && start.elapsed() < LOCK_TIMEOUT, "lock {}: {error}", self.run_dir.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(std::os::fd::OwnedFd::from(folder))
    }

    /// Reserves a user id that no other pod of this host has.
    ///
    /// # Errors
    /// When all are taken.
    pub fn reserve_uid(&self, base: u32, count: u32) -> Result<u32> {
        let uids = self.run_dir.join(UIDS);
        // Starting at the process id spreads pods that start at once.
        let first = std::process::id() % count;
        for offset in 0..count {
            let uid = base + (first + offset) % count;
            // On record first: releasing an id that was not taken by us is prevented by the file's content.
            let path = uids.join(uid.to_string());
            match within(&uids, || std::fs::OpenOptions::new().write(true).create_new(true).open(&path)) {
                Ok(mut file) => {
                    let owner = self.dir.to_string_lossy().into_owned();
                    std::io::Write::write_all(&mut file, owner.as_bytes()).with_context(|| format!("write {}", path.display()))?;
                    self.change(|record| record.uid = Some(uid))?;
                    return Ok(uid);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("reserve user id {uid}")),
            }
        }
        bail!("all {count} user ids for virtual machines are taken; set vmm.uid_count higher")
    }
}

/// How long another pod may hold the host's lock, which it does for some system calls.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a folder may go between that it is made and that something is put into it.
const TRIES: usize = 100;

/// Makes something in a folder, which another pod may remove with the last that is in it at any time.
pub fn within<T>(folder: &Path, make: impl Fn() -> std::io::Result<T>) -> std::io::Result<T> {
    let mut outcome = Err(ErrorKind::NotFound.into());
    for _ in 0..TRIES {
        std::fs::create_dir_all(folder)?;
        outcome = make();
        if !matches!(&outcome, Err(error) if error.kind() == ErrorKind::NotFound) {
            break;
        }
    }
    outcome
}

fn write(dir: &Path, record: &PodRecord) -> Result<()> {
    records::write(dir, record).with_context(|| format!("write the pod's record in {}", dir.display()))
}

/// A path without symbolic links, as the kernel's list of mounts has it; one that is not there is itself.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// Undoes everything that a pod's record names, and removes its folder. What is gone already is
/// no error, also when others do the same at the same time, as a shim and `delete` do; everything is tried, and the first
/// failure is reported.
///
/// # Errors
/// What could not be removed.
pub fn undo(run_dir: &Path, namespace: &str, pod: &str) -> Result<()> {
    let run_dir = &real(run_dir);
    let dir = records::pod_dir(run_dir, namespace, pod);
    let record = records::read(&dir).unwrap_or_default();
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| {
        if outcome.is_ok() {
            outcome = result;
        }
    };
    let snapshots = record.as_ref().map(|record| record.snapshots.clone()).unwrap_or_default();
    if let Some(record) = record {
        kill(record.processes.iter().filter(|process| process.pid != std::process::id()));
        if let Some(cgroup) = &record.cgroup {
            note(crate::cgroup::remove(cgroup, namespace));
        }
        if let Some(network) = &record.network {
            note(crate::network::undo(network));
        }
        if let Some(uid) = record.uid {
            note(release_uid(&run_dir.join(UIDS), uid, &dir).with_context(|| format!("release user id {uid}")));
            // It goes with the last of them.
            let _ = std::fs::remove_dir(run_dir.join(UIDS));
        }
    }
    // Pods of an earlier version have mounts there.
    note(unmount_below(&dir));
    note(remove_empty_tree(&dir));
    // The namespace's folder goes with its last pod; another pod in it keeps it.
    let _ = std::fs::remove_dir(run_dir.join(namespace));
    // Last: containers may have left much, and who waits for us may not wait for long.
    snapshots.values().filter_map(|snapshot| Left::at(snapshot)).for_each(Left::settle);
    outcome
}

/// Releases a user id when it is the pod's of this folder: a killed shim may have recorded an id that it never got.
fn release_uid(uids: &Path, uid: u32, dir: &Path) -> std::io::Result<()> {
    let path = uids.join(uid.to_string());
    let Ok(folder) = std::fs::File::open(uids) else { return Ok(()) };
    // Else it may be released by another one, and taken by another pod, between the look and the removal.
    flock(&folder, FlockOperation::LockExclusive)?;
    let ours = std::fs::read_to_string(&path).is_ok_and(|owner| owner == dir.to_string_lossy());
    if ours { unless_gone(std::fs::remove_file(&path)) } else { Ok(()) }
}

/// How long killed processes are waited for.
const DEATH_TIMEOUT: Duration = Duration::from_secs(1);

/// Kills those processes of a pod that are still the ones that were recorded, and waits for their end: a shim that is not
/// quite dead writes to its folder. One that does not die is its cgroup's to report.
fn kill<'a>(processes: impl Iterator<Item = &'a ProcessRecord>) {
    let killed: Vec<Process> = processes
        .filter_map(|recorded| {
            let process = Process::open(recorded.pid).ok()?;
            // The handle came first: what is alive now is what it is of. It may end by itself meanwhile.
            (records::is_alive(recorded) && process.signal(Signal::KILL).is_ok()).then_some(process)
        })
        .collect();
    let start = Instant::now();
    for process in killed {
        let wait = || {
            let left = Timespec::try_from(DEATH_TIMEOUT.saturating_sub(start.elapsed())).ok();
            poll(&mut [PollFd::new(&process, PollFlags::IN)], left.as_ref())
        };
        // The end of a child comes with a signal.
        while wait() == Err(Errno::INTR) {}
    }
}

/// More mounts than anybody puts on top of each other at one place.
pub const MAX_STACKED: usize = 64;

/// Detaches every mount at or below a folder.
///
/// Each call may take as long as the host's disks are busy, so that there are few: what is mounted within
/// a mount goes with it.
///
/// # Errors
/// When a mount does not come off.
pub fn unmount_below(dir: &Path) -> Result<()> {
    for _ in 0..MAX_STACKED {
        let mut points: Vec<PathBuf> =
            mounts::points()?.into_iter().map(|point| point.path).filter(|point| point.starts_with(dir)).collect();
        if points.is_empty() {
            return Ok(());
        }
        points.sort_unstable();
        // In this order what is within a mount comes after it.
        points.dedup_by(|point, outer| point.starts_with(outer));
        for point in points {
            match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // Not a mount any more: somebody else was faster.
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(error) => return Err(error).with_context(|| format!("unmount {}", point.display())),
            }
        }
    }
    bail!("unmount {}: something is mounted there again and again", dir.display())
}

/// Removes a tree of folders and our own small files.
///
/// It never crosses into a mount that would not come off: a folder that is not empty of anything
/// but folders and empty files is an error, so a container's data is never deleted.
///
/// # Errors
/// What could not be removed.
pub fn remove_empty_tree(dir: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("read {}", dir.display()))?,
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("read {}", dir.display()))?;
        let path = entry.path();
        let meta = match entry.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            meta => meta.with_context(|| format!("look at {}", path.display()))?,
        };
        if meta.is_dir() {
            remove_empty_tree(&path)?;
            continue;
        }
        if meta.len() > 0 && !entry.file_name().to_string_lossy().ends_with("record.json") {
            bail!("remove {}: it is not ours; is it still mounted?", path.display());
        }
        unless_gone(std::fs::remove_file(&path)).with_context(|| format!("remove {}", path.display()))?;
    }
    unless_gone(std::fs::remove_dir(dir)).with_context(|| format!("remove {}", dir.display()))
}

/// What a removal came to; somebody else may have been faster.
fn unless_gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn record(pod: &str) -> PodRecord {
        PodRecord { namespace: "default".into(), pod: pod.into(), ..PodRecord::default() }
    }

    #[test]
    fn undoing_leaves_nothing_and_may_be_repeated() {
        let run = tempfile::tempdir().unwrap();
        let store = Store::create(run.path(), record("web")).unwrap();
        let uid = store.reserve_uid(5000, 10).unwrap();
        std::fs::create_dir_all(store.dir().join("share").join("c/rootfs")).unwrap();
        assert!(run.path().join(UIDS).join(uid.to_string()).exists());
        undo(run.path(), "default", "web").unwrap();
        undo(run.path(), "default", "web").unwrap();
        assert_eq!(std::fs::read_dir(run.path()).unwrap().count(), 0);
    }

    #[test]
    fn several_undo_a_pod_at_once_and_each_succeeds() {
        for _ in 0..50 {
            let run = tempfile::tempdir().unwrap();
            let store = Store::create(run.path(), record("web")).unwrap();
            store.reserve_uid(5000, 10).unwrap();
            let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            store.add_process("vmm", process.id()).unwrap();
            for container in ["a", "b", "c", "d"] {
                std::fs::create_dir_all(store.dir().join("share").join(container).join("rootfs")).unwrap();
                std::fs::write(store.dir().join("share").join(container).join("file"), "").unwrap();
            }
            std::thread::scope(|scope| {
                let undo = || undo(run.path(), "default", "web");
                let all = [scope.spawn(undo), scope.spawn(undo), scope.spawn(undo)];
                all.into_iter().for_each(|undone| undone.join().unwrap().unwrap());
            });
            // Each has waited for its end.
            assert_eq!(process.try_wait().unwrap().and_then(|ended| ended.signal()), Some(libc::SIGKILL));
            assert_eq!(std::fs::read_dir(run.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_run_folder_behind_a_link_is_the_one_that_the_kernel_knows() {
        let run = tempfile::tempdir().unwrap();
        let (folder, link) = (run.path().join("folder"), run.path().join("link"));
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        let store = Store::create(&link, record("web")).unwrap();
        assert_eq!(store.dir(), folder.canonicalize().unwrap().join("default/web"));
        undo(&link, "default", "web").unwrap();
        assert!(!folder.join("default").exists());
    }

    #[test]
    fn no_two_pods_get_the_same_user_id() {
        let run = tempfile::tempdir().unwrap();
        let stores: Vec<Store> = (0..4).map(|n| Store::create(run.path(), record(&n.to_string())).unwrap()).collect();
        let mut uids: Vec<u32> = stores.iter().take(3).map(|store| store.reserve_uid(5000, 3).unwrap()).collect();
        uids.sort_unstable();
        assert_eq!(uids, [5000, 5001, 5002]);
        assert!(stores[3].reserve_uid(5000, 3).unwrap_err().to_string().contains("all 3 user ids"));
    }

    #[test]
    fn monitors_of_a_tenant_are_those_of_its_other_pods() {
        let run = tempfile::tempdir().unwrap();
        let of = |pod: &str, tenant: &str| {
            let store = Store::create(run.path(), PodRecord { tenant: tenant.into(), ..record(pod) }).unwrap();
            store.add_process("vmm", pod.parse().unwrap()).unwrap();
            store.add_process("fs", 7).unwrap();
            store
        };
        let stores = [of("1", "acme"), of("2", "umbra"), of("3", "acme"), of("4", ""), of("5", "acme")];
        let monitors = |store: &Store| store.monitors_of_tenant().unwrap().iter().map(|monitor| monitor.pid).collect::<Vec<_>>();
        assert_eq!((monitors(&stores[0]), monitors(&stores[1])), (vec![3, 5], vec![]));
        // Whoever looks for one waits for who has found none, and may be making the first.
        let held = stores[0].lock_host().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| stores[2].lock_host().map(drop));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            drop(held);
            waits.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_file_that_is_not_ours_stops_the_removal() {
        let run = tempfile::tempdir().unwrap();
        let store = Store::create(run.path(), record("web")).unwrap();
        std::fs::create_dir_all(store.dir().join("share").join("c/rootfs")).unwrap();
        let precious = store.dir().join("share").join("c/rootfs/data");
        std::fs::write(&precious, "precious").unwrap();
        assert!(undo(run.path(), "default", "web").is_err());
        assert!(precious.exists());
    }
}
