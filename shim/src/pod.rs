//! The pod: its machine and its containers, and what each request does to them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use caisson_host::{records, settings};
use caisson_protocol::VERSION;
use caisson_protocol::config::{self, Config};
use caisson_protocol::record::PodRecord;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;
use tokio::sync::OnceCell;

use crate::agent::Exit;
use crate::container::{Container, ShareFolder, TaskId, remove_share_folder};
use crate::errors::{Error, Result};
use crate::events::{Events, timestamp};
use crate::flags::check_name;
use crate::network::{self, Network};
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec::{Siblings, Spec};
use crate::stdio::{self, Paths};
use crate::store::{self, Store};

/// The signal that the kernel sends for want of memory, and kubelet for want of patience.
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// How long an exit is kept back while its output is on its way to a slow reader.
const SETTLE: Duration = Duration::from_secs(5);
/// The same for an exec, which may leave a process that keeps the output open.
const SETTLE_EXEC: Duration = Duration::from_millis(200);

/// What makes a container.
pub struct CreateContainer<'a> {
    /// Its id.
    pub id: &'a str,
    /// containerd's folder for it.
    pub bundle: &'a str,
    /// What its root file system is mounted from.
    pub rootfs: &'a [Mount],
    /// Its streams.
    pub paths: Paths,
}

/// The machine with the configuration that it was booted with.
struct Running {
    sandbox: Arc<Sandbox>,
    store: Arc<Store>,
    config: Config,
    /// The interfaces of the pod's network namespace; none for a pod that has only its own.
    network: OnceCell<Arc<Network>>,
    /// Whether its failure is on record.
    failed: AtomicBool,
}

impl Running {
    /// Gives the guest the interfaces of a network namespace, now and as they change.
    async fn connect(&self, path: &Path) -> anyhow::Result<()> {
        let connect = || async {
            let network = Arc::new(Network::open(path)?);
            network.sync(&self.sandbox, &self.store).await?;
            network.follow(Arc::clone(&self.sandbox), Arc::clone(&self.store))?;
            network.forward(Arc::clone(&self.sandbox));
            anyhow::Ok(network)
        };
        self.network.get_or_try_init(connect).await.context("set up the pod's network").map(drop)
    }

    /// Connects a pod that was given no network namespace to what was put into that of its first
    /// process, which is the monitor on the host, as `ctr run --cni` does before it starts the task.
    async fn connect_late(&self) -> anyhow::Result<()> {
        match network::filled_namespace(self.sandbox.vmm.pid()) {
            Some(path) if !self.network.initialized() => self.connect(&path).await,
            _ => Ok(()),
        }
    }
}

/// A pod.
pub struct Pod {
    namespace: String,
    id: String,
    socket: String,
    events: Events,
    // One container is created at a time; the first one boots the machine.
    machine: tokio::sync::Mutex<Option<Arc<Running>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Pod {
    /// A pod without a machine.
    pub fn new(namespace: &str, id: &str, socket: &str, events: Events) -> Self {
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            socket: socket.to_owned(),
            events,
            machine: tokio::sync::Mutex::default(),
            containers: Mutex::default(),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container by its id.
    ///
    /// # Errors
    /// When there is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers().get(id).cloned().ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    async fn machine(&self) -> Result<Arc<Running>> {
        self.machine.lock().await.clone().ok_or_else(|| Error::Gone(format!("pod {} has no machine", self.id)))
    }

    /// Creates a container, booting the machine for the first one.
    pub async fn create(self: &Arc<Self>, request: CreateContainer<'_>) -> Result<u32> {
        check_name("container", request.id).map_err(Error::Invalid)?;
        let begin = Instant::now();
        let spec = Spec::read(&Path::new(request.bundle).join("config.json"))?;
        let mut slot = self.machine.lock().await;
        if self.containers().contains_key(request.id) {
            return Err(Error::AlreadyExists(format!("container {}", request.id)));
        }
        let first = slot.is_none();
        if first {
            *slot = Some(self.boot(&spec, request.bundle).await?);
        }
        let machine = slot.clone().ok_or_else(|| Error::Gone("no machine".into()))?;
        let created = self.create_in(&machine, &spec, &request, first).await;
        if created.is_err() && first {
            // Nothing of a pod that never had a container stays.
            machine.sandbox.kill("its first container could not be created");
            *slot = None;
            self.undo(&machine.config);
        }
        let pid = created?;
        log::info!("container {} was created in {} ms", request.id, begin.elapsed().as_millis());
        Ok(pid)
    }

    /// Boots the machine, with everything on record.
    async fn boot(&self, spec: &Spec, bundle: &str) -> Result<Arc<Running>> {
        let mut config = settings::load(Path::new(config::PATH)).map_err(|error| Error::Failed(error.into()))?;
        let (memory, cpus) = spec.pod_limits();
        config.size_for(memory, cpus);
        config.apply_annotations(&spec.annotations()).map_err(|error| Error::Invalid(error.to_string()))?;
        if config.log_level != "info"
            && let Ok(level) = config.log_level.parse()
        {
            log::set_max_level(level);
        }
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = PodRecord {
            namespace: self.namespace.clone(),
            pod: self.id.clone(),
            version: VERSION.into(),
            created,
            processes: vec![records::process("shim", std::process::id())],
            socket: self.socket.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            ..PodRecord::default()
        };
        let booted = async {
            let store = Arc::new(Store::create(&config.run_dir, record)?);
            let sandbox = Sandbox::boot(&config, &store, spec, Path::new(bundle)).await?;
            let machine = Running { sandbox, store, config: config.clone(), network: OnceCell::new(), failed: AtomicBool::new(false) };
            if let Some(path) = spec.network_namespace() {
                machine.connect(path).await.inspect_err(|_| machine.sandbox.kill("its network could not be set up"))?;
            }
            anyhow::Ok(Arc::new(machine))
        };
        match booted.await {
            Ok(machine) => Ok(machine),
            Err(error) => {
                self.undo(&config);
                Err(Error::Failed(error.context(format!("boot pod {}", self.id))))
            }
        }
    }

    fn undo(&self, config: &Config) {
        if let Err(error) = store::undo(&config.run_dir, &self.namespace, &self.id) {
            log::error!("clean up pod {}: {error:#}", self.id);
        }
    }

    async fn create_in(self: &Arc<Self>, machine: &Arc<Running>, spec: &Spec, request: &CreateContainer<'_>, first: bool) -> Result<u32> {
        let (guest_spec, binds) = spec.for_guest(request.id, machine.config.host_namespaces, self.as_ref())?;
        let task = if first { TaskId::monitor(machine.sandbox.vmm.pid()) } else { TaskId::thread()? };
        let pid = task.pid();
        machine.store.change(|record| record.containers.push(request.id.to_owned()))?;
        let folder = ShareFolder::make(&machine.store.share(), request.id, spec, Path::new(request.bundle), request.rootfs, &binds)?;
        let sandbox = &machine.sandbox;
        let opened = stdio::open(&request.paths, request.id, &self.namespace, || sandbox.next_port())?;
        let ports = opened.ports.clone();
        let process = Process::new(sandbox, "", request.paths.clone(), opened).await?;
        let guest_pid = match sandbox.agent.create_container(request.id, guest_spec, ports).await {
            Ok(pid) => pid,
            Err(error) => {
                process.close_streams(sandbox).await;
                return Err(error);
            }
        };
        folder.keep();
        let container = Arc::new(Container::new(request.id, request.bundle, Arc::clone(&process), task, guest_pid));
        self.containers().insert(request.id.to_owned(), Arc::clone(&container));
        let Paths { terminal, stdin, stdout, stderr } = request.paths.clone();
        self.events.publish(&TaskCreate {
            container_id: request.id.to_owned(),
            bundle: request.bundle.to_owned(),
            rootfs: request.rootfs.to_vec(),
            io: MessageField::some(TaskIO { stdin, stdout, stderr, terminal, ..TaskIO::default() }),
            pid,
            ..TaskCreate::default()
        });
        self.watch_exit(machine, &container, process);
        self.watch_oom(machine, request.id);
        Ok(pid)
    }

    /// Publishes a process's exit when it comes, or 137 when the machine dies first.
    fn watch_exit(self: &Arc<Self>, machine: &Arc<Running>, container: &Arc<Container>, process: Arc<Process>) {
        let (pod, machine, container) = (Arc::clone(self), Arc::clone(machine), Arc::clone(container));
        tokio::spawn(async move {
            let exit = match machine.sandbox.agent.wait(&container.id, &process.exec).await {
                Ok(exit) => {
                    process.settle(if process.exec.is_empty() { SETTLE } else { SETTLE_EXEC }).await;
                    exit
                }
                Err(error) => {
                    log::debug!("container {}: {error}", container.id);
                    // However the agent failed, the process is not to outlive what is said of it.
                    machine.sandbox.kill(&error.to_string());
                    pod.note_failure(&machine);
                    Exit::killed()
                }
            };
            let _started = process.starting.lock().await;
            if process.set_exited(exit) {
                let id = if process.exec.is_empty() { container.id.clone() } else { process.exec.clone() };
                pod.events.publish(&TaskExit {
                    container_id: container.id.clone(),
                    id,
                    pid: container.task.pid(),
                    exit_status: exit.status,
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..TaskExit::default()
                });
            }
        });
    }

    /// Records why the machine died, for `caisson list`; the first of its processes to hear of it does.
    fn note_failure(&self, machine: &Running) {
        if machine.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason = machine.sandbox.ended().borrow().clone();
        log::error!("pod {}: {}", self.id, reason.as_deref().unwrap_or("its machine ended"));
        if let Err(error) = machine.store.change(|record| record.failure = reason) {
            log::error!("{error:#}");
        }
    }

    fn watch_oom(self: &Arc<Self>, machine: &Arc<Running>, container: &str) {
        let (events, agent, container_id) = (self.events.clone(), machine.sandbox.agent.clone(), container.to_owned());
        tokio::spawn(async move {
            // Ends with the container or the machine.
            while agent.wait_oom(&container_id).await.is_ok() {
                events.publish(&TaskOOM { container_id: container_id.clone(), ..TaskOOM::default() });
            }
        });
    }

    /// Starts a created container or exec.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let machine = self.machine().await?;
        let pid = container.task.pid();
        let _starting = process.starting.lock().await;
        if !process.status().can_start() {
            return Err(Error::Precondition(format!("{}: it was started before", describe(id, exec))));
        }
        process.keep_input();
        if exec.is_empty() {
            machine.connect_late().await.map_err(|error| Error::Failed(error.context(describe(id, exec))))?;
        }
        if let Err(error) = machine.sandbox.agent.start(id, exec).await {
            if !exec.is_empty() {
                process.close_streams(&machine.sandbox).await;
                process.set_exited(Exit { status: 255, at: SystemTime::now() });
            }
            return Err(error);
        }
        process.set_running();
        if exec.is_empty() {
            self.events.publish(&TaskStart { container_id: id.to_owned(), pid, ..TaskStart::default() });
        } else {
            self.events.publish(&TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                pid,
                ..TaskExecStarted::default()
            });
            self.watch_exit(&machine, &container, Arc::clone(&process));
        }
        Ok(pid)
    }

    /// Registers an exec in a running container.
    pub async fn exec(&self, id: &str, exec: &str, process_spec: Vec<u8>, paths: Paths) -> Result<()> {
        check_name("exec", exec).map_err(Error::Invalid)?;
        let container = self.container(id)?;
        if container.init.exited().is_some() {
            return Err(Error::NotFound(format!("container {id}: process")));
        }
        if container.paused.load(Ordering::Acquire) {
            return Err(Error::Precondition(format!("container {id}: it is paused")));
        }
        if container.has_exec(exec) {
            return Err(Error::AlreadyExists(format!("exec {exec} of container {id}")));
        }
        let machine = self.machine().await?;
        let opened = stdio::open(&paths, id, &self.namespace, || machine.sandbox.next_port())?;
        let ports = opened.ports.clone();
        let process = Process::new(&machine.sandbox, exec, paths, opened).await?;
        let registered = machine.sandbox.agent.create_exec(id, exec, process_spec, ports).await;
        if let Err(error) = registered.and_then(|()| container.add_exec(Arc::clone(&process))) {
            process.close_streams(&machine.sandbox).await;
            return Err(error);
        }
        self.events.publish(&TaskExecAdded { container_id: id.to_owned(), exec_id: exec.to_owned(), ..TaskExecAdded::default() });
        Ok(())
    }

    /// Sends a signal to a process, or to all of a container.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if process.exited().is_some() && !all {
            return Err(Error::NotFound(format!("{}: process already finished", describe(id, exec))));
        }
        let machine = self.machine().await?;
        match machine.sandbox.agent.signal(id, exec, signal, all).await {
            // A machine that does not answer is killed with the one process that was to die.
            Err(Error::Timeout(reason)) if signal == SIGKILL => {
                machine.sandbox.kill(&reason);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Deletes a stopped process; with the last one of the pod's own container its machine goes too.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if !process.status().can_delete() {
            return Err(Error::Precondition(format!("{}: it is running", describe(id, exec))));
        }
        let machine = self.machine().await?;
        let (sandbox, pid) = (&machine.sandbox, container.task.pid());
        if process.exited().is_none() {
            // Never started: what waits in the guest is killed.
            if exec.is_empty() && sandbox.agent.signal(id, "", SIGKILL, false).await.is_ok() {
                process.wait().await;
            }
            process.set_exited(Exit::killed());
        }
        let exit = process.exited().unwrap_or_else(Exit::killed);
        process.drain(sandbox, id, Duration::from_millis(machine.config.drain_timeout_ms.into())).await;
        process.close_streams(sandbox).await;
        if exec.is_empty() {
            self.delete_container(&machine, id).await?;
        } else {
            // The machine may be gone; then so is the exec.
            let _ = sandbox.agent.delete(id, exec).await;
            container.remove_exec(exec);
        }
        self.events.publish(&TaskDelete {
            container_id: id.to_owned(),
            id: exec.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..TaskDelete::default()
        });
        Ok((pid, exit))
    }

    async fn delete_container(&self, machine: &Running, id: &str) -> Result<()> {
        if id == self.id && self.containers().len() == 1 {
            // The pod ends here: its files are on the host already, so the machine need not be asked.
            machine.sandbox.kill("the pod was deleted");
        } else if let Err(error) = machine.sandbox.agent.delete(id, "").await
            && !matches!(error, Error::Gone(_))
        {
            return Err(error);
        }
        remove_share_folder(&machine.store.share().join(id))?;
        self.containers().remove(id);
        machine.store.change(|record| record.containers.retain(|other| other != id))?;
        Ok(())
    }

    /// Pauses or resumes a container.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.container(id)?;
        let machine = self.machine().await?;
        if container.init.exited().is_some() {
            return Err(Error::Precondition(format!("container {id}: it has exited")));
        }
        machine.sandbox.agent.freeze(id, paused).await?;
        container.paused.store(paused, Ordering::Release);
        if paused {
            self.events.publish(&TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() });
        } else {
            self.events.publish(&TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() });
        }
        Ok(())
    }

    /// Resizes a terminal.
    pub async fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        self.container(id)?.process(exec)?;
        self.machine().await?.sandbox.agent.resize(id, exec, columns, rows).await
    }

    /// Ends a process's standard input.
    pub async fn close_input(&self, id: &str, exec: &str) -> Result<()> {
        let process = self.container(id)?.process(exec)?;
        process.close_input(&self.machine().await?.sandbox).await;
        Ok(())
    }

    /// The processes of a container, as (pid in the guest, exec id).
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let container = self.container(id)?;
        let processes = self.machine().await?.sandbox.agent.pids(id).await?;
        // The container's own process has the id that containerd knows; the others have the guest's.
        let known = |pid: u32| if pid == container.guest_pid { container.task.pid() } else { pid };
        Ok(processes.into_iter().map(|process| (known(process.pid), process.exec)).collect())
    }

    /// The counters of a container.
    pub async fn stats(&self, id: &str) -> Result<caisson_protocol::agent::StatsResponse> {
        self.container(id)?;
        self.machine().await?.sandbox.agent.stats(id).await
    }

    /// New limits for a container.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        self.container(id)?;
        self.machine().await?.sandbox.agent.update(id, resources).await
    }

    /// Ends the pod when no container is left (or `now`); returns whether it ended.
    pub async fn shutdown(&self, now: bool) -> bool {
        if !now && !self.containers().is_empty() {
            return false;
        }
        if let Some(machine) = self.machine.lock().await.take() {
            machine.sandbox.kill("the pod was shut down");
            self.undo(&machine.config);
        }
        self.events.flush().await;
        true
    }
}

impl Siblings for Pod {
    fn guest_pid(&self, host_pid: u32) -> Option<u32> {
        self.containers().values().find(|container| container.task.pid() == host_pid).map(|container| container.guest_pid)
    }

    fn sandbox_pid(&self) -> Option<u32> {
        self.containers().get(&self.id).map(|container| container.guest_pid)
    }
}

/// A process's name in messages.
fn describe(id: &str, exec: &str) -> String {
    if exec.is_empty() { format!("container {id}") } else { format!("exec {exec} of container {id}") }
}
