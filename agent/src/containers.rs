//! The pod's containers and their processes.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use caisson_protocol::agent::{CreateContainerRequest, Layers, Stdio};
use nix::unistd::Pid;
use protobuf::Message;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::hugepages::HugePages;
use crate::init::{bundle_dir, layers_file, process_file, spec_file};
use crate::names::check_id;
use crate::process::{self, Made, Starter};
use crate::reaper::{Exit, Reaper};
use crate::sockets::Sockets;
use crate::{devices, memory_volumes, share, sockets, sys, volumes};

/// A request that cannot be served; the service maps it to a ttrpc code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such container or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is in use.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// Not possible in this state.
    #[error("{0}")]
    Precondition(String),
    /// The request is not well formed.
    #[error("{0}")]
    Invalid(String),
    /// It failed.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

enum Phase {
    /// An exec that was not started.
    Registered,
    /// A container whose process waits to be started.
    Created(Starter),
    /// Started.
    Running,
    /// It could not be started.
    Failed,
}

struct Process {
    stdio: Stdio,
    phase: Phase,
    pid: Option<Pid>,
    exit: Option<watch::Receiver<Option<Exit>>>,
    terminal: Option<File>,
    /// The mount namespace of a container, which outlives its processes (see `share::settle`).
    mounts: Option<File>,
}

impl Process {
    fn exited(&self) -> Option<Exit> {
        self.exit.as_ref().and_then(|exit| *exit.borrow())
    }
}

type Shared = Arc<tokio::sync::Mutex<Process>>;

/// Containers and execs by name; the container's own process has an empty exec id.
pub struct Containers {
    reaper: Reaper,
    huge_pages: Arc<HugePages>,
    sockets: Sockets,
    processes: Mutex<HashMap<(String, String), Shared>>,
}

impl Containers {
    /// No containers.
    pub fn new(reaper: Reaper) -> Self {
        Self { reaper, huge_pages: Arc::default(), sockets: Sockets::default(), processes: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Shared>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, container: &str, exec: &str) -> Result<Shared, Error> {
        self.lock().get(&(container.to_owned(), exec.to_owned())).cloned().ok_or_else(|| Error::NotFound(name(container, exec)))
    }

    fn insert(&self, container: &str, exec: &str, stdio: Stdio) -> Result<Shared, Error> {
        let process = Arc::new(tokio::sync::Mutex::new(Process {
            stdio,
            phase: Phase::Registered,
            pid: None,
            exit: None,
            terminal: None,
            mounts: None,
        }));
        let mut processes = self.lock();
        let key = (container.to_owned(), exec.to_owned());
        if processes.contains_key(&key) {
            return Err(Error::AlreadyExists(name(container, exec)));
        }
        processes.insert(key, Arc::clone(&process));
        Ok(process)
    }

    fn remove(&self, container: &str, exec: &str) {
        let mut processes = self.lock();
        if exec.is_empty() {
            processes.retain(|(other, _), _| other != container);
        } else {
            processes.remove(&(container.to_owned(), exec.to_owned()));
        }
    }

    /// Makes a container up to the point where its process waits to be started.
    ///
    /// Mounts within its volumes are found first. Returns that process's id.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<u32, Error> {
        let CreateContainerRequest { id, spec, stdio, inner_mounts, huge_page_bytes, memory_volumes, sockets, layers, .. } = request;
        let (id, stdio) = (id.as_str(), stdio.unwrap_or_default());
        check_id(id)?;
        let process = self.insert(id, "", stdio.clone())?;
        let mut process = process.lock().await;
        let (container, huge_pages) = (id.to_owned(), Arc::clone(&self.huge_pages));
        let made = blocking(move || {
            let spec = prepare_bundle(&container, &spec, layers.into_option())?;
            inner_mounts.iter().for_each(|path| find_mount(path));
            huge_pages.reserve(&container, huge_page_bytes)?;
            memory_volumes.iter().try_for_each(memory_volumes::make)?;
            let sockets = sockets::listen(&container, &sockets)?;
            let cgroup = Cgroup::of(&container);
            cgroup.create(spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()))?;
            devices::restrict(&cgroup, &spec)?;
            let made = process::make_container(&container, &spec, &stdio)?;
            // It waits to be started, so it is there.
            let mounts = File::open(format!("/proc/{}/ns/mnt", made.pid)).context("open the container's mount namespace")?;
            Ok((made, mounts, sockets))
        })
        .await
        .and_then(|(made, mounts, sockets)| {
            self.sockets.add(id, sockets)?;
            Ok((made, mounts))
        });
        match made {
            Ok((Made { pid, starter, terminal }, mounts)) => {
                process.pid = Some(pid);
                process.exit = Some(self.watch_container(id, pid));
                process.terminal = terminal;
                process.mounts = Some(mounts);
                process.phase = Phase::Created(starter);
                Ok(pid.as_raw().unsigned_abs())
            }
            Err(error) => {
                self.remove(id, "");
                self.sockets.remove(id);
                // Something of it may exist already.
                let container = id.to_owned();
                let huge_pages = Arc::clone(&self.huge_pages);
                let _ = blocking(move || clean_up(&container, &huge_pages, None)).await;
                Err(error.into())
            }
        }
    }

    /// Watches a container's own process; when it exits, everything left in the container is killed,
    /// so that its streams end.
    fn watch_container(&self, id: &str, pid: Pid) -> watch::Receiver<Option<Exit>> {
        let exit = self.reaper.watch(pid);
        let mut watched = exit.clone();
        let cgroup = Cgroup::of(id);
        tokio::spawn(async move {
            if watched.wait_for(Option::is_some).await.is_ok() {
                // Fails only when the cgroup is gone already.
                let _ = cgroup.kill_all();
            }
        });
        exit
    }

    /// Registers a process to be run in a running container.
    pub fn create_exec(&self, container: &str, exec: &str, process: &[u8], stdio: Stdio) -> Result<(), Error> {
        check_id(exec)?;
        self.find(container, "")?;
        self.insert(container, exec, stdio)?;
        std::fs::write(process_file(container, exec), process).context("write the exec's process").map_err(|error| {
            self.remove(container, exec);
            error.into()
        })
    }

    /// Starts a created container or a registered exec; returns its process id.
    pub async fn start(&self, container: &str, exec: &str) -> Result<u32, Error> {
        let process = self.find(container, exec)?;
        let mut process = process.lock().await;
        let starter = match std::mem::replace(&mut process.phase, Phase::Failed) {
            Phase::Created(starter) => starter,
            Phase::Registered if !exec.is_empty() => self.make_exec(container, exec, &mut process).await?,
            Phase::Registered => return Err(Error::Precondition(format!("{}: not created", name(container, exec)))),
            phase @ (Phase::Running | Phase::Failed) => {
                process.phase = phase;
                return Err(Error::Precondition(format!("{}: already started", name(container, exec))));
            }
        };
        blocking(move || starter.start()).await?;
        process.phase = Phase::Running;
        Ok(process.pid.map_or(0, |pid| pid.as_raw().unsigned_abs()))
    }

    async fn make_exec(&self, container: &str, exec: &str, process: &mut Process) -> Result<Starter, Error> {
        let init = self.find(container, "")?;
        // A container that waits to be started has all that an exec joins.
        let there = |init: &Process| matches!(init.phase, Phase::Created(_) | Phase::Running) && init.exited().is_none();
        let running = |init: &Process| init.pid.filter(|_| there(init));
        // Not held any longer: whatever becomes of the exec, its container can be killed.
        let target = running(&*init.lock().await);
        let target = target.ok_or_else(|| Error::Precondition(format!("{}: is not running", name(container, ""))))?;
        let (id, exec, stdio) = (container.to_owned(), exec.to_owned(), process.stdio.clone());
        let made = blocking(move || process::make_exec(&id, &exec, target, &stdio)).await?;
        process.pid = Some(made.pid);
        process.exit = Some(self.reaper.watch(made.pid));
        process.terminal = made.terminal;
        Ok(made.starter)
    }

    /// Returns when a process has exited.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit, Error> {
        let process = self.find(container, exec)?;
        let exit = process.lock().await.exit.clone();
        let mut exit = exit.ok_or_else(|| Error::Precondition(format!("{}: not started", name(container, exec))))?;
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| Error::NotFound(name(container, exec)))?;
        exit.ok_or_else(|| Error::NotFound(name(container, exec)))
    }

    /// Waits until more than `known` processes of a container were killed for want of memory, and
    /// returns how many were.
    pub async fn wait_oom(&self, container: &str, known: u64) -> Result<u64, Error> {
        let gone = || Error::Precondition(format!("{}: has exited", name(container, "")));
        let exit = self.find(container, "")?.lock().await.exit.clone();
        let mut exit = exit.ok_or_else(gone)?;
        let mut events = Cgroup::of(container).memory_events()?;
        loop {
            let kills = events.oom_kills()?;
            if kills > known {
                return Ok(kills);
            }
            tokio::select! {
                changed = events.changed() => changed?,
                // How many there were by then is in the exit.
                _ = exit.wait_for(Option::is_some) => return Err(gone()),
            }
        }
    }

    /// Waits until somebody connects to a container's socket, and returns the connection's number.
    pub async fn accept_socket(&self, container: &str, socket: &str) -> Result<u64, Error> {
        let gone = || Error::Precondition(format!("{}: has exited", name(container, "")));
        let exit = self.find(container, "")?.lock().await.exit.clone();
        let mut exit = exit.ok_or_else(gone)?;
        tokio::select! {
            accepted = self.sockets.accept(container, socket) => {
                accepted.ok_or_else(|| Error::NotFound(format!("socket {socket} of container {container}")))
            }
            _ = exit.wait_for(Option::is_some) => Err(gone()),
        }
    }

    /// Connects a connection to a socket with a port of the host, or breaks it when that is 0.
    pub fn carry_socket(&self, connection: u64, port: u32) -> Result<(), Error> {
        let carried = self.sockets.carry(connection, port)?;
        carried.then_some(()).ok_or_else(|| Error::NotFound(format!("connection {connection}")))
    }

    /// Sends a signal to a process, or to all processes of a container.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let process = self.find(container, exec)?;
        let process = process.lock().await;
        let signal = i32::try_from(signal)
            .ok()
            .and_then(|number| (0..=64).contains(&number).then_some(number))
            .ok_or_else(|| Error::Invalid(format!("signal {signal}: allowed is 0 to 64")))?;
        if all {
            return Ok(Cgroup::of(container).signal_all(signal)?);
        }
        let Some(pid) = process.pid.filter(|_| process.exited().is_none()) else {
            return Err(Error::NotFound(format!("{}: process", name(container, exec))));
        };
        sys::kill(pid, signal).map_err(|errno| match errno {
            nix::errno::Errno::ESRCH => Error::NotFound(format!("{}: process", name(container, exec))),
            errno => Error::Failed(anyhow::Error::from(errno).context(format!("signal {}", name(container, exec)))),
        })
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, container: &str, exec: &str, columns: u32, rows: u32) -> Result<(), Error> {
        let process = self.find(container, exec)?;
        let process = process.lock().await;
        let Some(terminal) = &process.terminal else {
            return Err(Error::Precondition(format!("{}: has no terminal", name(container, exec))));
        };
        let limit =
            |value: u32| u16::try_from(value).map_err(|_| Error::Invalid(format!("terminal size {columns}x{rows}: at most 65535 each")));
        sys::set_terminal_size(terminal, limit(columns)?, limit(rows)?).context("resize the terminal")?;
        Ok(())
    }

    /// The processes of a container with the exec that each belongs to.
    pub async fn pids(&self, container: &str) -> Result<Vec<(u32, String)>, Error> {
        self.find(container, "")?;
        let known: Vec<(String, Shared)> = self
            .lock()
            .iter()
            .filter(|((id, _), _)| id == container)
            .map(|((_, exec), process)| (exec.clone(), Arc::clone(process)))
            .collect();
        let mut execs = HashMap::new();
        for (exec, process) in known {
            if let Some(pid) = process.lock().await.pid {
                execs.insert(pid.as_raw().unsigned_abs(), exec);
            }
        }
        Ok(Cgroup::of(container).pids()?.into_iter().map(|pid| (pid, execs.remove(&pid).unwrap_or_default())).collect())
    }

    /// The cgroup of a container that exists.
    pub fn cgroup(&self, container: &str) -> Result<Cgroup, Error> {
        self.find(container, "")?;
        Ok(Cgroup::of(container))
    }

    /// Forgets an exec, or removes a stopped container.
    pub async fn delete(&self, container: &str, exec: &str) -> Result<(), Error> {
        let process = self.find(container, exec)?;
        let mut process = process.lock().await;
        if matches!(process.phase, Phase::Running) && process.exited().is_none() {
            return Err(Error::Precondition(format!("{}: is running", name(container, exec))));
        }
        self.remove(container, exec);
        if exec.is_empty() {
            self.sockets.remove(container);
            let (container, huge_pages, mounts) = (container.to_owned(), Arc::clone(&self.huge_pages), process.mounts.take());
            blocking(move || clean_up(&container, &huge_pages, mounts)).await?;
        } else {
            let _ = std::fs::remove_file(process_file(container, exec));
        }
        Ok(())
    }
}

/// A process's name in messages.
fn name(container: &str, exec: &str) -> String {
    if exec.is_empty() { format!("container {container}") } else { format!("exec {exec} of container {container}") }
}

/// Runs what blocks on a thread of its own.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a thread of the agent ended")?
}

/// Writes the specification where the container's processes read it.
fn prepare_bundle(id: &str, spec: &[u8], layers: Option<Layers>) -> anyhow::Result<oci_spec::runtime::Spec> {
    let parsed = serde_json::from_slice(spec).context("read the container's specification")?;
    std::fs::create_dir_all(bundle_dir(id)).context("create the bundle")?;
    std::fs::write(spec_file(id), spec).context("write the container's specification")?;
    if let Some(layers) = layers {
        let layers = layers.write_to_bytes().context("name the container's layers")?;
        std::fs::write(layers_file(id), layers).context("write down the container's layers")?;
    }
    Ok(parsed)
}

/// Goes to where the host has mounted something within a volume: the guest mounts it, too.
fn find_mount(path: &str) {
    // What is gone by now is not mounted there.
    let _ = std::fs::read_dir(path);
}

/// Removes all that a container left in the guest.
fn clean_up(id: &str, huge_pages: &HugePages, mounts: Option<File>) -> anyhow::Result<()> {
    huge_pages.release(id);
    let cgroup = Cgroup::of(id);
    cgroup.kill_all()?;
    cgroup.remove()?;
    share::settle();
    drop(mounts);
    volumes::remove(id);
    match std::fs::remove_dir_all(bundle_dir(id)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove the bundle"),
        _ => Ok(()),
    }
}
