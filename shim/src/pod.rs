//! The pod: its machine and its containers, and what each request does to them.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use caisson_protocol::agent::CreateContainerRequest;
use caisson_protocol::config::HostSockets;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;

use crate::agent::Exit;
use crate::container::{Container, ShareFolder, check_ids, remove_share_folder};
use crate::cri::{PodFile, PodSandbox};
use crate::errors::{Error, Result};
use crate::events::{Events, Topic, timestamp};
use crate::flags::check_name;
use crate::machine::{Machine, Name};
use crate::owners;
use crate::process::{Process, Status};
use crate::size::Limits;
use crate::sockets::Sockets;
use crate::spec::{self, GuestSpec, Kind, Siblings, Spec};
use crate::stdio::{self, Opened, Paths};
use crate::volumes::Volumes;

/// The signal that the kernel sends for want of memory, and kubelet for want of patience.
pub(crate) const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// What makes a container.
pub struct CreateContainer<'a> {
    /// Its id.
    pub id: &'a str,
    /// containerd's folder for it.
    pub bundle: &'a str,
    /// Its specification.
    pub spec: &'a Spec,
    /// What its root file system is mounted from.
    pub rootfs: &'a [Mount],
    /// Its streams.
    pub paths: Paths,
}

/// A pod.
pub struct Pod {
    name: Name,
    /// The configuration of its runtime handler, which comes after the host's.
    config: Option<PathBuf>,
    pub(crate) events: Events,
    /// Held while the first container boots the machine.
    pub(crate) booting: tokio::sync::Mutex<()>,
    pub(crate) machine: Mutex<Option<Arc<Machine>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// What containers may use that are there or about to be; a sandbox uses nothing.
    pub(crate) limits: Mutex<HashMap<String, Limits>>,
    /// Ids of containers that are being created.
    reserved: Mutex<HashSet<String>>,
    /// The sandbox, when the shim was asked for it and not for a container that stands for it.
    sandbox: OnceLock<PodSandbox>,
}

impl Pod {
    /// A pod without a machine.
    pub fn new(name: Name, config: Option<PathBuf>, events: Events) -> Self {
        Self {
            name,
            config,
            events,
            booting: tokio::sync::Mutex::default(),
            machine: Mutex::default(),
            containers: Mutex::default(),
            limits: Mutex::default(),
            reserved: Mutex::default(),
            sandbox: OnceLock::new(),
        }
    }

    /// Takes the description of the sandbox that the shim is to make.
    ///
    /// # Errors
    /// When it was taken before.
    pub fn describe_sandbox(&self, sandbox: PodSandbox) -> Result<()> {
        self.sandbox.set(sandbox).map_err(|_| Error::AlreadyExists(format!("sandbox {}", self.id())))
    }

    /// The sandbox that the shim was asked for.
    ///
    /// # Errors
    /// When it was not.
    pub fn sandbox(&self) -> Result<&PodSandbox> {
        self.sandbox.get().ok_or_else(|| Error::NotFound(format!("sandbox {}", self.id())))
    }

    /// Tells containerd what happened to a container; of a sandbox it knows as no container it is
    /// told nothing.
    pub fn publish<E: Topic>(&self, container: &str, event: &E) {
        if container != self.id() || self.sandbox.get().is_none() {
            self.events.publish(event);
        }
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        lock(&self.containers)
    }

    /// Its id, which is also that of its sandbox or only container.
    pub fn id(&self) -> &str {
        &self.name.id
    }

    /// A container by its id.
    ///
    /// # Errors
    /// When there is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers().get(id).cloned().ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// The machine.
    ///
    /// # Errors
    /// When there is none, yet or any more.
    pub fn machine(&self) -> Result<Arc<Machine>> {
        lock(&self.machine).clone().ok_or_else(|| Error::Gone(format!("pod {} has no machine", self.id())))
    }

    /// Keeps a container's id from being used twice, until the returned value is dropped.
    fn reserve<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>> {
        let mut reserved = lock(&self.reserved);
        if self.containers().contains_key(id) || !reserved.insert(id.to_owned()) {
            return Err(Error::AlreadyExists(format!("container {id}")));
        }
        Ok(Reservation { pod: self, id })
    }

    /// The machine, booted now when there is none; whether it was.
    async fn machine_for(self: &Arc<Self>, spec: &Spec) -> Result<(Arc<Machine>, bool)> {
        let _booting = self.booting.lock().await;
        if let Ok(machine) = self.machine() {
            return Ok((machine, false));
        }
        let machine = Machine::boot(&self.name, self.config.as_deref(), spec, self.files()).await?;
        if let Err(error) = owners::serve(self, &machine) {
            machine.end("its owners could not be let in");
            return Err(Error::Failed(error.context(format!("boot pod {}", self.id()))));
        }
        *lock(&self.machine) = Some(Arc::clone(&machine));
        Ok((machine, true))
    }

    /// Creates a container, booting the machine for the first one.
    pub async fn create(self: &Arc<Self>, request: CreateContainer<'_>) -> Result<u32> {
        check_name("container", request.id).map_err(Error::Invalid)?;
        let begin = Instant::now();
        let _reservation = self.reserve(request.id)?;
        let (machine, first) = self.machine_for(request.spec).await?;
        let booted = begin.elapsed();
        let created = self.create_in(&machine, &request).await;
        if created.is_err() {
            self.leave_room(request.id);
            self.undo_create(&machine, request.id, first).await;
        }
        let pid = created?;
        let (all, container) = (begin.elapsed(), begin.elapsed() - booted);
        log::info!("container {} was created in {} ms; container {} ms", request.id, all.as_millis(), container.as_millis());
        Ok(pid)
    }

    async fn undo_create(&self, machine: &Machine, id: &str, first: bool) {
        if first {
            // Nothing of a pod that never had a container stays.
            machine.end("its first container could not be created");
            lock(&self.machine).take();
            return;
        }
        machine.disks.release(&machine.sandbox, id).await;
        if let Err(error) = machine.store.change(|record| record.containers.retain(|other| other != id)) {
            log::error!("{error:#}");
        }
        self.take_room_back(machine).await;
    }

    async fn create_in(self: &Arc<Self>, machine: &Arc<Machine>, request: &CreateContainer<'_>) -> Result<u32> {
        let GuestSpec { mut spec, mut binds, memory_volumes } =
            request.spec.for_guest(request.id, machine.config.host_namespaces, self.as_ref())?;
        check_ids(request.id, &spec, &machine.config)?;
        let carried = machine.config.fs_sockets == HostSockets::Carry;
        let sockets = if carried { Sockets::take(request.id, &mut binds, &mut spec)? } else { Sockets::default() };
        let task = machine.stand_in(Arc::downgrade(self), request.id).await?;
        let pid = task.pid();
        machine.store.change(|record| record.containers.push(request.id.to_owned()))?;
        let folder = ShareFolder::make(machine, request.id, &binds)?;
        // Of a sandbox's root nothing is read: no disk's place is wasted on it.
        let roots = if request.spec.kind() == Kind::Sandbox { &[] } else { request.rootfs };
        let root = machine.disks.attach(&machine.sandbox, request.id, roots, &mut spec).await?;
        let layers = folder.mount_root(root, request)?;
        let inner_mounts = folder.inner_mounts(&binds)?;
        let limits = request.spec.limits();
        if request.spec.kind() != Kind::Sandbox {
            self.make_room(machine, request.id, limits).await?;
        }
        let sandbox = &machine.sandbox;
        let volumes = Volumes::publish(&sandbox.agent, request.id, &binds, &mut spec).await;
        let opened = stdio::open(&request.paths, request.id, &self.name.namespace)?;
        let ports = opened.ports.clone();
        let process = Process::new(sandbox, "", request.paths.clone(), opened).await?;
        let create = CreateContainerRequest {
            id: request.id.to_owned(),
            // A JSON value always serialises.
            spec: serde_json::to_vec(&spec).unwrap_or_default(),
            stdio: MessageField::some(ports),
            inner_mounts,
            huge_page_bytes: limits.huge_pages,
            memory_volumes,
            sockets: sockets.requests(),
            layers: layers.into(),
            ..CreateContainerRequest::default()
        };
        let guest_pid = match sandbox.agent.create_container(create).await {
            Ok(pid) => pid,
            Err(error) => {
                process.close_streams(sandbox).await;
                if matches!(error, Error::Timeout(_)) {
                    // It may be there all the same, and its id is to be free again.
                    let _ = sandbox.agent.delete(request.id, "").await;
                }
                return Err(error);
            }
        };
        folder.keep();
        let container = Arc::new(Container::new(request.id, request.bundle, Arc::clone(&process), task, guest_pid));
        self.containers().insert(request.id.to_owned(), Arc::clone(&container));
        let Paths { terminal, stdin, stdout, stderr } = request.paths.clone();
        self.publish(
            request.id,
            &TaskCreate {
                container_id: request.id.to_owned(),
                bundle: request.bundle.to_owned(),
                rootfs: request.rootfs.to_vec(),
                io: MessageField::some(TaskIO { stdin, stdout, stderr, terminal, ..TaskIO::default() }),
                pid,
                ..TaskCreate::default()
            },
        );
        self.watch_exit(machine, &container, process);
        self.watch_oom(machine, &container);
        volumes.follow(machine, &container);
        sockets.follow(machine, &container);
        Ok(pid)
    }

    /// Starts a created container or exec.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let machine = self.machine()?;
        let pid = container.task.pid();
        let _starting = process.starting.lock().await;
        if !process.status().can_start() {
            return Err(Error::Precondition(format!("{}: it was started before", describe(id, exec))));
        }
        if !exec.is_empty() && container.paused.load(Ordering::Acquire) {
            return Err(Error::Precondition(format!("container {id}: it is paused")));
        }
        process.keep_input();
        if exec.is_empty() {
            machine.connect_late(pid).await.map_err(|error| Error::Failed(error.context(describe(id, exec))))?;
        }
        if let Err(error) = machine.sandbox.agent.start(id, exec).await {
            if !exec.is_empty() {
                process.close_streams(&machine.sandbox).await;
                process.set_exited(Exit::now(255));
            }
            return Err(error);
        }
        process.set_running();
        if exec.is_empty() {
            self.publish(id, &TaskStart { container_id: id.to_owned(), pid, ..TaskStart::default() });
        } else {
            self.publish(id, &TaskExecStarted { container_id: id.to_owned(), exec_id: exec.to_owned(), pid, ..TaskExecStarted::default() });
            self.watch_exit(&machine, &container, Arc::clone(&process));
        }
        Ok(pid)
    }

    /// Registers an exec in a running container.
    pub async fn exec(&self, id: &str, exec: &str, process_spec: Vec<u8>, paths: Paths) -> Result<()> {
        let process_spec = spec::with_terminal(&process_spec, paths.terminal)?;
        self.exec_on(id, exec, process_spec, paths, |paths| stdio::open(paths, id, &self.name.namespace)).await
    }

    /// Registers an exec whose streams `open` finds.
    pub async fn exec_on(
        &self,
        id: &str,
        exec: &str,
        process_spec: Vec<u8>,
        paths: Paths,
        open: impl FnOnce(&Paths) -> anyhow::Result<Opened>,
    ) -> Result<()> {
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
        let machine = self.machine()?;
        let opened = open(&paths)?;
        let ports = opened.ports.clone();
        let process = Process::new(&machine.sandbox, exec, paths, opened).await?;
        let registered = machine.sandbox.agent.create_exec(id, exec, process_spec, ports).await;
        if let Err(error) = registered.and_then(|()| container.add_exec(Arc::clone(&process))) {
            process.close_streams(&machine.sandbox).await;
            return Err(error);
        }
        self.publish(id, &TaskExecAdded { container_id: id.to_owned(), exec_id: exec.to_owned(), ..TaskExecAdded::default() });
        Ok(())
    }

    /// Sends a signal to a process, or to all of a container.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if !exec.is_empty() && process.status() == Status::Created {
            return Err(Error::Precondition(format!("{}: it was not started", describe(id, exec))));
        }
        let finished = || Error::NotFound(format!("{}: process already finished", describe(id, exec)));
        if process.exited().is_some() && !all {
            return Err(finished());
        }
        let machine = self.machine()?;
        match machine.sandbox.agent.signal(id, exec, signal, all).await {
            // A machine that does not answer is killed with the one process that was to die.
            Err(Error::Timeout(reason)) if signal == SIGKILL => {
                machine.sandbox.kill(&reason);
                Ok(())
            }
            // With its machine every process is finished, which is what containerd has to hear to go on.
            Err(Error::Gone(_)) => Err(finished()),
            outcome => outcome,
        }
    }

    /// Deletes a stopped process; with the last one of the pod's own container its machine goes too.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        // One that is about to be started is.
        let starting = process.starting.lock().await;
        if !process.status().can_delete() {
            return Err(Error::Precondition(format!("{}: it is running", describe(id, exec))));
        }
        drop(starting);
        let machine = self.machine()?;
        let (sandbox, pid) = (&machine.sandbox, container.task.pid());
        if process.exited().is_none() {
            // Never started: what waits in the guest is killed.
            if exec.is_empty() && sandbox.agent.signal(id, "", SIGKILL, false).await.is_ok() {
                process.wait().await;
            }
            // As runc has it: an exec that never ran ended well.
            process.set_exited(if exec.is_empty() { Exit::killed() } else { Exit::now(0) });
        }
        let exit = process.exited().unwrap_or_else(Exit::killed);
        process.drain(sandbox, id, Duration::from_millis(machine.config.drain_timeout_ms.into())).await;
        process.close_streams(sandbox).await;
        if exec.is_empty() {
            self.delete_container(&machine, id).await?;
            let exited_at = MessageField::some(timestamp(exit.at));
            let exit_status = exit.status;
            self.publish(id, &TaskDelete { container_id: id.to_owned(), pid, exit_status, exited_at, ..TaskDelete::default() });
        } else {
            // The machine may be gone; then so is the exec. Its deletion is no event of the task.
            let _ = sandbox.agent.delete(id, exec).await;
            container.remove_exec(exec);
        }
        Ok((pid, exit))
    }

    async fn delete_container(&self, machine: &Machine, id: &str) -> Result<()> {
        let written = machine.disks.are_written_by(id);
        if id == self.id() && self.containers().len() == 1 && !written {
            // The pod ends here: its files are on the host already, so the machine need not be asked.
            machine.sandbox.kill("the pod was deleted");
        } else if let Err(error) = machine.sandbox.agent.delete(id, "").await
            && !matches!(error, Error::Gone(_) | Error::NotFound(_))
        {
            return Err(error);
        }
        machine.disks.release(&machine.sandbox, id).await;
        self.leave_room(id);
        remove_share_folder(machine, id)?;
        self.containers().remove(id);
        machine.store.change(|record| record.containers.retain(|other| other != id))?;
        if !self.containers().is_empty() {
            self.take_room_back(machine).await;
        }
        Ok(())
    }

    /// Pauses or resumes a container.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.container(id)?;
        let machine = self.machine()?;
        if container.init.status() != Status::Running {
            return Err(Error::Precondition(format!("container {id}: it does not run")));
        }
        machine.sandbox.agent.freeze(id, paused).await?;
        container.paused.store(paused, Ordering::Release);
        if paused {
            self.publish(id, &TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() });
        } else {
            self.publish(id, &TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() });
        }
        Ok(())
    }

    /// Resizes a terminal.
    pub async fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        self.container(id)?.process(exec)?;
        self.machine()?.sandbox.agent.resize(id, exec, columns, rows).await
    }

    /// Ends a process's standard input.
    pub async fn close_input(&self, id: &str, exec: &str) -> Result<()> {
        let process = self.container(id)?.process(exec)?;
        process.close_input(&self.machine()?.sandbox).await;
        Ok(())
    }

    /// Whether no container but this one is there that has not exited.
    pub fn runs_nothing_but(&self, id: &str) -> bool {
        self.containers().values().all(|container| container.id == id || container.init.exited().is_some())
    }

    /// What the host has of a container's processes, as (process id, exec id): what stands for it stands for all of them.
    /// Also one that has ended and is not deleted has one: a containerd that starts forgets a task without any.
    pub fn pids(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let container = self.container(id)?;
        let of = |exec: String| (container.task.pid(), exec);
        Ok(std::iter::once(String::new()).chain(container.running_execs()).map(of).collect())
    }

    /// The counters of a container.
    pub async fn stats(&self, id: &str) -> Result<caisson_protocol::agent::StatsResponse> {
        self.container(id)?;
        self.machine()?.sandbox.agent.stats(id).await
    }
}

impl Siblings for Pod {
    fn guest_pid(&self, host_pid: u32) -> Option<u32> {
        self.containers().values().find(|container| container.task.pid() == host_pid).map(|container| container.guest_pid)
    }

    fn sandbox_pid(&self) -> Option<u32> {
        self.containers().get(self.id()).map(|container| container.guest_pid)
    }

    fn files(&self) -> &[PodFile] {
        self.sandbox.get().map_or(&[], |sandbox| &sandbox.files)
    }
}

/// The id of a container that is being created.
struct Reservation<'a> {
    pod: &'a Pod,
    id: &'a str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock(&self.pod.reserved).remove(self.id);
    }
}

/// What a mutex guards, also when a thread that held it has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process's name in messages.
fn describe(id: &str, exec: &str) -> String {
    if exec.is_empty() { format!("container {id}") } else { format!("exec {exec} of container {id}") }
}
