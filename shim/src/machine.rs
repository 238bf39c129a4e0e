//! A pod's machine with all that was acquired for it: the record on disk, the network, the
//! configuration that it was booted with.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use caisson_host::{records, settings};
use caisson_protocol::VERSION;
use caisson_protocol::config::{self, Config, ConfigError, NetworkDefault};
use caisson_protocol::fs::HOST_IDS;
use caisson_protocol::record::PodRecord;
use tokio::sync::OnceCell;

use crate::cri::{LOG_FOLDER, PodFile};
use crate::disks::Disks;
use crate::errors::{Error, Result};
use crate::filter;
use crate::network::{self, Network};
use crate::pod::Pod;
use crate::sandbox::Sandbox;
use crate::size::{Bounds, Size};
use crate::spec::Spec;
use crate::stand_in::StandIn;
use crate::store::{self, Store};

/// The role of what stands for a container, on record.
const STAND_IN: &str = "stand-in";

/// What a pod is known by.
#[derive(Debug, Clone)]
pub struct Name {
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// Path of its shim's socket.
    pub socket: String,
}

/// A machine.
pub struct Machine {
    name: Name,
    /// Its processes.
    pub sandbox: Arc<Sandbox>,
    /// Its record and its share.
    pub store: Arc<Store>,
    /// What it was booted with.
    pub config: Config,
    /// The network namespace of what stands for the pod's containers on the host: the one that the pod was given, or the
    /// first one's own.
    namespace: OnceCell<Arc<File>>,
    /// The interfaces of the pod's network namespace; none for a pod that has only its own.
    network: OnceCell<Arc<Network>>,
    /// Whether it has one that a program of the host carries instead.
    user_network: bool,
    /// Its disks.
    pub disks: Disks,
    /// Where kubelet has the output of its containers.
    pub log_folder: Option<PathBuf>,
    /// Held while its size changes and is put on record.
    resizing: tokio::sync::Mutex<()>,
    /// Whether its failure is on record.
    failed: AtomicBool,
}

impl Machine {
    /// Boots a machine for the pod that `spec` describes and its handler configures, with everything on record; the guest
    /// keeps `files` for the pod's containers.
    ///
    /// # Errors
    /// What is wrong with configuration or annotations, and the step that failed; nothing is left.
    pub async fn boot(name: &Name, handler_config: Option<&Path>, spec: &Spec, files: &[PodFile]) -> Result<Arc<Self>> {
        let config = configuration(name, handler_config, spec)?;
        if config.log_level != "info"
            && let Ok(level) = config.log_level.parse()
        {
            log::set_max_level(level);
        }
        if config.fs_window_mib > 0 && !config.tenant.name.is_empty() {
            log::warn!(
                "pod {}: files that are read through its window (fs.window_mib) share the host's pages with other pods, which can time what it reads",
                name.id
            );
        }
        if !config.disk_io_uring {
            filter::refuse_rings().context("refuse rings (disk.io_uring)").map_err(Error::Failed)?;
        }
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = PodRecord {
            namespace: name.namespace.clone(),
            pod: name.id.clone(),
            tenant: config.tenant.name.clone(),
            version: VERSION.into(),
            created,
            processes: vec![records::process("shim", std::process::id())],
            socket: name.socket.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            ..PodRecord::default()
        };
        let booted = async {
            let store = Arc::new(Store::create(&config.run_dir, record)?);
            let sandbox = Sandbox::boot(&config, &store, spec, files).await?;
            let config = config.clone();
            let machine = Self {
                name: name.clone(),
                sandbox,
                store,
                user_network: config.network_default == NetworkDefault::User && spec.network_namespace().is_none(),
                disks: Disks::new(config.disk_places, config.disk_limit(), config.disk_layers),
                config,
                namespace: OnceCell::new(),
                network: OnceCell::new(),
                log_folder: spec.annotations().remove(LOG_FOLDER).filter(|path| path.starts_with('/')).map(PathBuf::from),
                resizing: tokio::sync::Mutex::default(),
                failed: AtomicBool::new(false),
            };
            machine.connect_first(spec).await.inspect_err(|_| machine.sandbox.kill("its network could not be set up"))?;
            anyhow::Ok(Arc::new(machine))
        };
        match booted.await {
            Ok(machine) => Ok(machine),
            Err(error) => {
                undo(name, &config);
                Err(Error::Failed(error.context(format!("boot pod {}", name.id))))
            }
        }
    }

    /// Gives the guest the network that the pod was given, or that the configuration has for pods without.
    async fn connect_first(&self, spec: &Spec) -> anyhow::Result<()> {
        match spec.network_namespace() {
            Some(path) => {
                let given = || async { File::open(path).map(Arc::new).with_context(|| format!("open {}", path.display())) };
                self.namespace.get_or_try_init(given).await?;
                self.connect(path).await
            }
            None if self.user_network => {
                let connected = network::user::connect(&self.config, &self.store, &self.sandbox).await;
                connected.context("give the pod a network of its own (network.default)")
            }
            None => Ok(()),
        }
    }

    /// Gives the guest the interfaces of a network namespace, now and as they change.
    async fn connect(&self, path: &Path) -> anyhow::Result<()> {
        let connect = || async {
            let network = Arc::new(Network::open(path, &self.config)?);
            network.sync(&self.sandbox, &self.store).await?;
            network.follow(Arc::clone(&self.sandbox), Arc::clone(&self.store))?;
            network.forward(Arc::clone(&self.sandbox));
            anyhow::Ok(network)
        };
        self.network.get_or_try_init(connect).await.context("set up the pod's network").map(drop)
    }

    /// Starts what stands for a container on the host, in the pod's cgroup and on record.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn stand_in(&self, pod: Weak<Pod>, container: &str) -> anyhow::Result<StandIn> {
        let user = self.store.read(|record| record.uid).context("the pod has no user id")?;
        let start = |network| StandIn::start(&self.config.task_path, user, network, Weak::clone(&pod), container);
        // Where the pod was given no network namespace the first of them has one made, and the others are in that.
        let mut first = None;
        let make = async {
            let stand_in = start(None).await?;
            let namespace = File::open(format!("/proc/{}/ns/net", stand_in.pid())).context("open a network namespace")?;
            first = Some(stand_in);
            anyhow::Ok(Arc::new(namespace))
        };
        let namespace = Arc::clone(self.namespace.get_or_try_init(|| make).await?);
        let stand_in = match first {
            Some(first) => first,
            None => start(Some(namespace)).await?,
        };
        let pid = stand_in.pid();
        self.store.change(|record| {
            record.processes.retain(|process| process.role != STAND_IN || records::is_alive(process));
            record.processes.push(records::process(STAND_IN, pid));
        })?;
        self.sandbox.count(&[pid])?;
        Ok(stand_in)
    }

    /// Connects a pod that was given no network namespace to what was put into that of its first
    /// process, as `ctr run --cni` does before it starts the task.
    ///
    /// # Errors
    /// What of the network could not be set up.
    pub async fn connect_late(&self, pid: u32) -> anyhow::Result<()> {
        match network::filled_namespace(pid) {
            Some(_) if self.user_network => anyhow::bail!("a CNI plugin made the pod a network, but it has one already (network.default)"),
            Some(path) if !self.network.initialized() => self.connect(&path).await,
            _ => Ok(()),
        }
    }

    /// Gives the machine the size that `choose` says, by its bounds and the size that it has.
    ///
    /// # Errors
    /// What could not be had.
    pub async fn resize(&self, choose: impl FnOnce(&Bounds, Size) -> Size) -> anyhow::Result<()> {
        let Sandbox { vmm, agent, growth, .. } = self.sandbox.as_ref();
        let _resizing = self.resizing.lock().await;
        let size = growth.resize(vmm, agent, Duration::from_millis(self.config.agent_timeout_ms.into()), choose).await?;
        self.store.change(|record| (record.vcpus, record.memory_mib) = (size.vcpus, size.memory_mib))
    }

    /// Records why the machine died, for `caisson list`; the first of its processes to hear of it does.
    pub fn note_failure(&self) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason = self.sandbox.ended().borrow().clone();
        log::error!("pod {}: {}", self.name.id, reason.as_deref().unwrap_or("its machine ended"));
        if let Err(error) = self.store.change(|record| record.failure = reason) {
            log::error!("{error:#}");
        }
    }

    /// Ends the machine, which is no failure of it.
    pub fn stop(&self, reason: &str) {
        self.failed.store(true, Ordering::Release);
        self.sandbox.kill(reason);
    }

    /// Ends the machine and undoes all that is on record for it.
    pub fn end(&self, reason: &str) {
        self.stop(reason);
        undo(&self.name, &self.config);
    }
}

/// What a pod is booted with: the host's settings, its handler's, its tenant's, its limits, its annotations.
fn configuration(name: &Name, handler_config: Option<&Path>, spec: &Spec) -> Result<Config> {
    let host = Path::new(config::PATH);
    let (failed, invalid) = (|error| Error::Failed(anyhow::Error::from(error)), |error: ConfigError| Error::Invalid(error.to_string()));
    let mut config = settings::load_for(host, handler_config).map_err(failed)?;
    let mut annotations = spec.annotations();
    let tenant = config.take_tenant(&mut annotations).map_err(invalid)?;
    if !tenant.is_empty() {
        settings::lay_tenant(&mut config, host, &tenant).map_err(failed)?;
    }
    spec.refuse_host_namespaces(&name.id, config.host_namespaces)?;
    let limits = spec.pod_limits();
    config.size_for(limits.memory, limits.cpus());
    config.apply_annotations(&annotations).map_err(invalid)?;
    check_id_base(&config, name, spec)?;
    Ok(config)
}

/// Refuses what ids of the pod's own on the host exclude.
fn check_id_base(config: &Config, name: &Name, spec: &Spec) -> Result<()> {
    let (base, monitors) = (config.fs_id_base, config.uid_base);
    if base == 0 {
        return Ok(());
    }
    if spec.has_own_users() {
        return Err(Error::Invalid(format!("pod {}: users of its own, which it asks for, and fs.id_base exclude each other", name.id)));
    }
    if base < monitors + config.uid_count && monitors < base + HOST_IDS {
        return Err(Error::Invalid(format!(
            "pod {}: the {HOST_IDS} ids from fs.id_base = {base} on overlap those from vmm.uid_base on",
            name.id
        )));
    }
    Ok(())
}

fn undo(name: &Name, config: &Config) {
    if let Err(error) = store::undo(&config.run_dir, &name.namespace, &name.id) {
        log::error!("clean up pod {}: {error:#}", name.id);
    }
}
