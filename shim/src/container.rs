//! A container of the pod: its folder in the share, its processes.

use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use anyhow::{Context, Result, ensure};
use caisson_protocol::agent::Layers;
use caisson_protocol::config::{Config, HostSockets};
use caisson_protocol::fs::HOST_IDS;
use caisson_protocol::guest::{MOUNTS_DIR, ROOTFS_DIR, SNAPSHOT_DIR, shared_mount};
use serde_json::Value;

use crate::disks::Root;
use crate::errors::{self, Error};
use crate::idmap::IdMap;
use crate::mounts::{self, How, ReadOnly};
use crate::pod::CreateContainer;
use crate::process::Process;
use crate::snapshot::{self, Left};
use crate::spec::Bind;
use crate::store::{Store, remove_empty_tree, unmount_below};

/// Mounts within a container's volumes: a node has some hundreds.
const MAX_INNER_MOUNTS: usize = 4096;
/// For a thread that only sleeps.
const TASK_STACK: usize = 16 << 10;

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// containerd's folder for it.
    pub bundle: String,
    /// Its own process.
    pub init: Arc<Process>,
    /// What stands for that process on the host.
    pub task: TaskId,
    /// That process's id in the guest.
    pub guest_pid: u32,
    /// Whether it is paused.
    pub paused: AtomicBool,
    /// How many of its processes were killed for want of memory, as far as containerd was told.
    pub oom_kills: AtomicU64,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// A container with its own process.
    pub fn new(id: &str, bundle: &str, init: Arc<Process>, task: TaskId, guest_pid: u32) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            init,
            task,
            guest_pid,
            paused: AtomicBool::new(false),
            oom_kills: AtomicU64::new(0),
            execs: Mutex::default(),
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process by its exec id; empty for the container's own.
    ///
    /// # Errors
    /// When there is none.
    pub fn process(&self, exec: &str) -> errors::Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec).cloned().ok_or_else(|| Error::NotFound(format!("exec {exec} of container {}", self.id)))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// When its id is in use.
    pub fn add_exec(&self, process: Arc<Process>) -> errors::Result<()> {
        let mut execs = self.execs();
        if execs.contains_key(&process.exec) {
            return Err(Error::AlreadyExists(format!("exec {} of container {}", process.exec, self.id)));
        }
        execs.insert(process.exec.clone(), process);
        Ok(())
    }

    /// Whether an exec id is in use.
    pub fn has_exec(&self, exec: &str) -> bool {
        self.execs().contains_key(exec)
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec: &str) {
        self.execs().remove(exec);
    }
}

/// The process id by which the host knows a container's own process.
///
/// containerd refers to a container by it (`/proc/PID/ns/...`), so no two containers of a pod may
/// have the same. The pod's first container is known by the monitor's; for each other one a thread
/// of the shim sleeps.
pub struct TaskId {
    pid: u32,
    /// Dropping it ends the thread.
    _thread: Option<mpsc::Sender<()>>,
}

impl TaskId {
    /// The monitor's.
    pub const fn monitor(pid: u32) -> Self {
        Self { pid, _thread: None }
    }

    /// Starts a thread that stands for a container.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn thread() -> Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let sleep = move || {
            let _ = tell.send(nix::unistd::gettid());
            let _ = stopped.recv();
        };
        std::thread::Builder::new().name("task".into()).stack_size(TASK_STACK).spawn(sleep).context("start the container's thread")?;
        let id = told.recv().context("hear from the container's thread")?;
        Ok(Self { pid: id.as_raw().unsigned_abs(), _thread: Some(stop) })
    }

    /// The id.
    pub const fn pid(&self) -> u32 {
        self.pid
    }
}

/// A container's folder in the share; its mounts come off when it is dropped unless kept.
pub struct ShareFolder {
    path: PathBuf,
    run_dir: PathBuf,
    kept: bool,
}

impl ShareFolder {
    /// Mounts a container's bind mounts into the pod's share.
    ///
    /// # Errors
    /// What could not be mounted, and why.
    pub fn make(store: &Store, container: &str, binds: &[Bind], config: &Config) -> Result<Self> {
        let path = store.share().join(container);
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        let folder = Self { path, run_dir: store.run_dir().to_owned(), kept: false };
        binds.iter().try_for_each(|bind| folder.bind(bind, config))?;
        Ok(folder)
    }

    /// Mounts its root file system there, too, or what there is to be of it; returns the layers of which the guest makes it
    /// then.
    ///
    /// # Errors
    /// What could not be mounted, and why.
    pub fn mount_root(&self, root: Root, store: &Store, create: &CreateContainer<'_>, config: &Config) -> Result<Option<Layers>> {
        let target = self.path.join(ROOTFS_DIR);
        let owners = owners(config);
        if !matches!(root, Root::Disk) {
            std::fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
        }
        match root {
            Root::Disk => Ok(None),
            Root::Layers { layers, snapshot: folder } => {
                if let Some(folder) = folder {
                    snapshot::share(&folder, &self.path.join(SNAPSHOT_DIR), owners.as_ref())
                        .with_context(|| format!("snapshot {}", folder.display()))?;
                }
                Ok(Some(layers))
            }
            Root::Mounts if create.rootfs.is_empty() => {
                let source = create.spec.root_path(Path::new(create.bundle));
                mounts::bind(&source, &target, &How { below: true, owners, owners_below: true, ..How::default() })
                    .with_context(|| format!("bind the root file system {}", source.display()))?;
                Ok(None)
            }
            Root::Mounts => {
                mounts::mount_rootfs(create.rootfs, &target, owners.as_ref(), &store.dir().join("layers"))?;
                Ok(None)
            }
        }
    }

    fn bind(&self, bind: &Bind, config: &Config) -> Result<()> {
        let source = &bind.source;
        let what = || format!("bind mount of {}", source.display());
        let target = self.path.join(MOUNTS_DIR).join(&bind.name);
        let kind = std::fs::metadata(source).with_context(what)?.file_type();
        ensure!(
            config.fs_sockets == HostSockets::Dead || !(kind.is_socket() || kind.is_fifo()),
            "{}: it is a socket or FIFO of the host, whose other end a virtual machine cannot reach; set fs.sockets = \"carry\" to have connections to a socket carried to it, or \"dead\" to bind it all the same",
            what()
        );
        if kind.is_dir() {
            std::fs::create_dir_all(&target).with_context(what)?;
        } else {
            std::fs::create_dir_all(self.path.join(MOUNTS_DIR)).with_context(what)?;
            std::fs::File::create_new(&target).with_context(what)?;
        }
        let real = source.canonicalize().with_context(what)?;
        match owners(config).filter(|_| !is_mapped(config, bind, &real)) {
            Some(owners) => {
                ensure!(bind.how.owners.is_none(), "{}: it has a mapping of owners of its own, which fs.id_base excludes", what());
                let how = How { owners: Some(owners), owners_below: bind.how.below, ..bind.how.clone() };
                if let Err(error) = mounts::bind(source, &target, &how) {
                    // Not every file system can do so, and one among those mounted below it suffices.
                    mounts::bind(source, &target, &How { owners_below: false, ..how })
                        .with_context(|| format!("{} (with fs.id_base; those in fs.mapped_volumes need no mapping)", what()))?;
                    log::warn!("{}: what is mounted within belongs to nobody in the pod: {error:#}", what());
                }
            }
            None => mounts::bind(source, &target, &bind.how).with_context(what)?,
        }
        self.prune(&real, &target).with_context(what)
    }

    /// Takes what pods have mounted for themselves out of a bound folder: a pod with all of the host's
    /// files would hold a copy of every other pod's, and the next such pod copies of those.
    fn prune(&self, source: &Path, target: &Path) -> Result<()> {
        if source.starts_with(&self.run_dir) {
            mounts::below(target)?.iter().try_for_each(|inner| unmount_below(&target.join(inner)))
        } else if let Ok(inside) = self.run_dir.strip_prefix(source) {
            unmount_below(&target.join(inside))
        } else {
            Ok(())
        }
    }

    /// What is mounted within the folders that are bound read-only, but not with all below them, as
    /// the guest's paths.
    ///
    /// The guest finds such a mount when it first goes there, and gives it the attributes of the
    /// one that leads to it: it must be found before that one is made read-only.
    ///
    /// # Errors
    /// When there are more than a machine is to know of, or the kernel's list cannot be read.
    pub fn inner_mounts(&self, container: &str, binds: &[Bind]) -> Result<Vec<String>> {
        let mut inner = Vec::new();
        for bind in binds.iter().filter(|bind| bind.how.below && bind.how.read_only == ReadOnly::Top) {
            let guest = PathBuf::from(shared_mount(container, &bind.name));
            let mounts = mounts::below(&self.path.join(MOUNTS_DIR).join(&bind.name))?;
            inner.extend(mounts.into_iter().map(|path| guest.join(path).to_string_lossy().into_owned()));
        }
        ensure!(inner.len() <= MAX_INNER_MOUNTS, "its volumes hold {} mounts; at most {MAX_INNER_MOUNTS} are allowed", inner.len());
        Ok(inner)
    }

    /// Leaves the mounts in place.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for ShareFolder {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove_share_folder(&self.path)
        {
            log::error!("{error:#}");
        }
    }
}

/// Whether a volume's files have the pod's ids on disk. A path is taken as it was given as well as behind
/// its links: that a volume is mapped only takes rights away.
fn is_mapped(config: &Config, bind: &Bind, real: &Path) -> bool {
    config.fs_mapped_volumes.iter().any(|folder| {
        let within = |path: &Path| path.starts_with(folder) || folder.canonicalize().is_ok_and(|folder| path.starts_with(folder));
        within(&bind.source) || within(real) || bind.destination.starts_with(folder)
    })
}

/// Refuses users and groups that a pod with ids of its own on the host has not.
///
/// # Errors
/// Which it is.
pub fn check_ids(container: &str, spec: &Value, config: &Config) -> errors::Result<()> {
    let user = &spec["process"]["user"];
    let groups = user["additionalGids"].as_array().into_iter().flatten();
    let mut ids = [&user["uid"], &user["gid"]].into_iter().chain(groups).filter_map(Value::as_u64);
    match ids.find(|id| config.fs_id_base != 0 && *id >= HOST_IDS.into()) {
        Some(id) => {
            Err(Error::Invalid(format!("container {container}: user or group {id}; a pod with fs.id_base has those below {HOST_IDS}")))
        }
        None => Ok(()),
    }
}

/// The owners that files have in the share when the pod has ids of its own on the host: its server knows
/// no others, and the guest sees them as what they are on disk.
fn owners(config: &Config) -> Option<IdMap> {
    (config.fs_id_base != 0).then(|| IdMap::shifted(config.fs_id_base))
}

/// Takes a container's folder out of the share.
///
/// # Errors
/// What could not be unmounted or removed.
pub fn remove_share_folder(path: &Path) -> Result<()> {
    let left = Left::of(path);
    let removed = unmount_below(path).and_then(|()| remove_empty_tree(path));
    // Last, as the container may have left much.
    left.into_iter().for_each(Left::settle);
    removed
}
