//! A container of the pod: its folder in the share, its processes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use caisson_protocol::agent::Layers;
use caisson_protocol::config::{Config, HostSockets};
use caisson_protocol::fs::HOST_IDS;
use caisson_protocol::guest::{KEEPS_DIR, MOUNTS_DIR, ROOTFS_DIR, SNAPSHOT_DIR, shared_mount};
use serde_json::Value;

use crate::disks::Root;
use crate::errors::{self, Error};
use crate::idmap::IdMap;
use crate::machine::Machine;
use crate::mounts::{self, How, ReadOnly};
use crate::pod::CreateContainer;
use crate::process::{Process, Status};
use crate::share::made_in_workshop;
use crate::snapshot::{self, Left};
use crate::spec::Bind;
use crate::stand_in::StandIn;

/// Mounts within a container's volumes: a node has some hundreds.
const MAX_INNER_MOUNTS: usize = 4096;

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// containerd's folder for it.
    pub bundle: String,
    /// Its own process.
    pub init: Arc<Process>,
    /// What stands for that process on the host.
    pub task: StandIn,
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
    pub fn new(id: &str, bundle: &str, init: Arc<Process>, task: StandIn, guest_pid: u32) -> Self {
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

    /// The ids of the execs that run.
    pub fn running_execs(&self) -> Vec<String> {
        self.execs().values().filter(|process| process.status() == Status::Running).map(|process| process.exec.clone()).collect()
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec: &str) {
        self.execs().remove(exec);
    }
}

/// A container's folder in the share; it goes when it is dropped unless kept.
pub struct ShareFolder<'m> {
    machine: &'m Machine,
    container: &'m str,
    kept: bool,
}

impl<'m> ShareFolder<'m> {
    /// Mounts a container's bind mounts into the pod's share.
    ///
    /// # Errors
    /// What could not be mounted, and why.
    pub fn make(machine: &'m Machine, container: &'m str, binds: &[Bind]) -> Result<Self> {
        machine.sandbox.share.make_folder(Path::new(container))?;
        let folder = Self { machine, container, kept: false };
        binds.iter().try_for_each(|bind| folder.bind(bind))?;
        Ok(folder)
    }

    /// Mounts its root file system there, too, or what there is to be of it; returns the layers of which the guest makes it
    /// then.
    ///
    /// # Errors
    /// What could not be mounted, and why.
    pub fn mount_root(&self, root: Root, create: &CreateContainer<'_>) -> Result<Option<Layers>> {
        let Machine { config, store, .. } = self.machine;
        let owners = owners(config);
        let mounted = match root {
            Root::Disk => return Ok(None),
            Root::Layers { layers, snapshot: folder } => {
                if let Some(folder) = folder {
                    // On record first: whoever takes the pod apart settles it.
                    store.change(|record| {
                        record.snapshots.insert(self.container.to_owned(), folder.clone());
                    })?;
                    let shared = snapshot::share(&folder, owners.as_ref()).with_context(|| format!("snapshot {}", folder.display()))?;
                    self.attach(&shared, Path::new(SNAPSHOT_DIR), true)?;
                }
                self.machine.sandbox.share.make_folder(&Path::new(self.container).join(ROOTFS_DIR))?;
                return Ok(Some(layers));
            }
            Root::Mounts if create.rootfs.is_empty() => {
                let source = create.spec.root_path(Path::new(create.bundle));
                mounts::copy(&source, &How { below: true, owners, owners_below: true, ..How::default() })
                    .with_context(|| format!("bind the root file system {}", source.display()))?
            }
            Root::Mounts => {
                made_in_workshop(store.dir(), |target, scratch| mounts::mount_rootfs(create.rootfs, target, owners.as_ref(), scratch))?
            }
        };
        self.attach(&mounted, Path::new(ROOTFS_DIR), true).context("share the root file system")?;
        Ok(None)
    }

    fn attach(&self, mount: &OwnedFd, name: &Path, is_folder: bool) -> Result<()> {
        self.machine.sandbox.share.attach(mount, &Path::new(self.container).join(name), is_folder)
    }

    fn bind(&self, bind: &Bind) -> Result<()> {
        let (source, config) = (&bind.source, &self.machine.config);
        let what = || format!("bind mount of {}", source.display());
        let kind = std::fs::metadata(source).with_context(what)?.file_type();
        ensure!(
            config.fs_sockets == HostSockets::Dead || !(kind.is_socket() || kind.is_fifo()),
            "{}: it is a socket or FIFO of the host, whose other end a virtual machine cannot reach; set fs.sockets = \"carry\" to have connections to a socket carried to it, or \"dead\" to bind it all the same",
            what()
        );
        let real = source.canonicalize().with_context(what)?;
        let is_mapped = is_mapped(config, bind, &real);
        if is_mapped {
            // The file server looks for it.
            self.machine.sandbox.share.make_folder(&Path::new(self.container).join(KEEPS_DIR).join(&bind.name))?;
        }
        let mounted = match owners(config).filter(|_| !is_mapped) {
            Some(owners) => {
                ensure!(bind.how.owners.is_none(), "{}: it has a mapping of owners of its own, which fs.id_base excludes", what());
                let how = How { owners: Some(owners), owners_below: bind.how.below, ..bind.how.clone() };
                mounts::copy(source, &how).or_else(|error| {
                    // Not every file system can do so, and one among those mounted below it suffices.
                    let mounted = mounts::copy(source, &How { owners_below: false, ..how })
                        .with_context(|| format!("{} (with fs.id_base; those in fs.mapped_volumes need no mapping)", what()))?;
                    log::warn!("{}: what is mounted within belongs to nobody in the pod: {error:#}", what());
                    anyhow::Ok(mounted)
                })?
            }
            None => mounts::copy(source, &bind.how).with_context(what)?,
        };
        self.attach(&mounted, &Path::new(MOUNTS_DIR).join(&bind.name), kind.is_dir()).with_context(what)
    }

    /// What is mounted within the folders that are bound read-only, but not with all below them, as
    /// the guest's paths.
    ///
    /// The guest finds such a mount when it first goes there, and gives it the attributes of the
    /// one that leads to it: it must be found before that one is made read-only.
    ///
    /// # Errors
    /// When there are more than a machine is to know of, or the kernel's list cannot be read.
    pub fn inner_mounts(&self, binds: &[Bind]) -> Result<Vec<String>> {
        let mut inner = Vec::new();
        for bind in binds.iter().filter(|bind| bind.how.below && bind.how.read_only == ReadOnly::Top) {
            let guest = PathBuf::from(shared_mount(self.container, &bind.name));
            let real = bind.source.canonicalize().with_context(|| format!("find {}", bind.source.display()))?;
            inner.extend(mounts::below(&real)?.into_iter().map(|path| guest.join(path).to_string_lossy().into_owned()));
        }
        ensure!(inner.len() <= MAX_INNER_MOUNTS, "its volumes hold {} mounts; at most {MAX_INNER_MOUNTS} are allowed", inner.len());
        Ok(inner)
    }

    /// Leaves the folder where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for ShareFolder<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove_share_folder(self.machine, self.container)
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
pub fn remove_share_folder(machine: &Machine, container: &str) -> Result<()> {
    let removed = machine.sandbox.share.remove(Path::new(container));
    // Last, as the container may have left much.
    if let Some(snapshot) = machine.store.read(|record| record.snapshots.get(container).cloned()) {
        Left::at(&snapshot).into_iter().for_each(Left::settle);
        machine.store.change(|record| {
            record.snapshots.remove(container);
        })?;
    }
    removed
}
