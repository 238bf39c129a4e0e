//! What a pod's owners may do with it, without being root: over a socket in the pod's folder, which
//! belongs to their group (`pod.owners`) and is closed to all others.
//!
//! They are root in the pod, and nobody on the host: a request names containers and programs of the
//! pod, no path of the host, and what of the host comes with it are pipes alone.

use std::collections::{BTreeSet, HashMap};
use std::fs::{File, Permissions};
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use anyhow::Context;
use caisson_host::control::Control;
use caisson_protocol::owner::{Answer, ContainerUsage, Exec, MAX_STOP_MS, PodProcess, Request, SOCKET, Size, Usage};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Gid, Group, fchown};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::channel::Channel;
use crate::container::Container;
use crate::errors::{Error, Result};
use crate::machine::Machine;
use crate::pod::{Pod, SIGKILL, lock};
use crate::spec::{Kind, Spec};
use crate::stdio::{self, Paths};

/// Conversations with owners at a time, and with one of them; more wait. Those with root are counted apart: `caisson stop`
/// does not wait for who has taken all others.
const MAX_CONVERSATIONS: usize = 64;
const MAX_OF_ONE: usize = 32;
/// Connections of owners that are open, waiting ones included; more are refused.
const MAX_CONNECTIONS: usize = 256;
/// From a connection to its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// For containers that are killed to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
const SIGTERM: u32 = libc::SIGTERM.unsigned_abs();
/// By which containerd says what a container is called in its pod.
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";

/// Opens the pod's folder to its owners, and serves them until the machine has ended.
///
/// # Errors
/// When there is no such group, or the socket cannot be made.
pub fn serve(pod: &Arc<Pod>, machine: &Machine) -> anyhow::Result<()> {
    let (path, group) = (machine.store.dir(), group(&machine.config.pod_owners)?);
    let folder = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let what = || format!("let the owners of the pod into {}", path.display());
    if let Some(group) = group {
        fchown(&folder, None, Some(group)).with_context(what)?;
        folder.set_permissions(Permissions::from_mode(0o750)).with_context(what)?;
    }
    let listener = Control::listen(&folder, SOCKET).with_context(what)?;
    let socket = path.join(SOCKET);
    std::os::unix::fs::chown(&socket, None, group.map(Gid::as_raw)).with_context(what)?;
    std::fs::set_permissions(&socket, Permissions::from_mode(0o660)).with_context(what)?;
    let (listener, mut ended) = (Channel::new(listener).with_context(what)?, machine.sandbox.ended());
    let (pod, places) = (Arc::downgrade(pod), Arc::new(Places::default()));
    tokio::spawn(async move {
        loop {
            let caller = tokio::select! {
                caller = listener.accept() => caller,
                _ = ended.wait_for(Option::is_some) => return,
            };
            match caller.and_then(|caller| Ok((caller.peer()?, Channel::new(caller)?))) {
                Ok(((user, process), caller)) => {
                    let (pod, places) = (Weak::clone(&pod), Arc::clone(&places));
                    let Some(connection) = places.connection(user) else {
                        let full = format!("{MAX_CONNECTIONS} connections to this pod are open already");
                        tokio::spawn(async move { caller.send(&Answer::Failed(full), &[]).await });
                        continue;
                    };
                    tokio::spawn(async move {
                        let _place = places.conversation(user).await;
                        converse(&pod, &caller, user, process).await;
                        drop(connection);
                    });
                }
                // As without descriptors: the next may come when there are some again.
                Err(error) => {
                    log::warn!("take a connection of an owner: {error}");
                    tokio::time::sleep(REQUEST_TIMEOUT).await;
                }
            }
        }
    });
    Ok(())
}

/// Room for conversations.
struct Places {
    connections: Arc<Semaphore>,
    owners: Arc<Semaphore>,
    root: Arc<Semaphore>,
    of_each: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

impl Default for Places {
    fn default() -> Self {
        let [connections, owners, root] =
            [MAX_CONNECTIONS, MAX_CONVERSATIONS, MAX_CONVERSATIONS].map(|most| Arc::new(Semaphore::new(most)));
        Self { connections, owners, root, of_each: Mutex::default() }
    }
}

impl Places {
    /// Room for a user's connection; none when all is taken. Root's is not counted.
    fn connection(&self, user: u32) -> Option<Option<OwnedSemaphorePermit>> {
        if user == 0 { Some(None) } else { Arc::clone(&self.connections).try_acquire_owned().ok().map(Some) }
    }

    /// Waits for room for a user's conversation. The semaphores are never closed.
    async fn conversation(&self, user: u32) -> Vec<OwnedSemaphorePermit> {
        let wanted = if user == 0 {
            vec![Arc::clone(&self.root)]
        } else {
            let own = Arc::clone(lock(&self.of_each).entry(user).or_insert_with(|| Arc::new(Semaphore::new(MAX_OF_ONE))));
            vec![own, Arc::clone(&self.owners)]
        };
        let mut places = Vec::new();
        for semaphore in wanted {
            places.extend(semaphore.acquire_owned().await);
        }
        places
    }
}

/// The group that `pod.owners` names, by name or number.
fn group(owners: &str) -> anyhow::Result<Option<Gid>> {
    if owners.is_empty() {
        return Ok(None);
    }
    if let Ok(number) = owners.parse() {
        return Ok(Some(Gid::from_raw(number)));
    }
    let group = Group::from_name(owners).with_context(|| format!("look up the group {owners} (pod.owners)"))?;
    group.map(|group| Some(group.gid)).with_context(|| format!("pod.owners is {owners:?}, and this host has no such group"))
}

/// One connection: a request and what comes of it.
async fn converse(pod: &Weak<Pod>, caller: &Channel, user: u32, process: i32) {
    let Ok(Ok(Some((request, fds)))) = tokio::time::timeout(REQUEST_TIMEOUT, caller.receive::<Request>()).await else { return };
    let Some(pod) = pod.upgrade() else { return };
    // What is asked for again and again while somebody looks is not worth a line each.
    if !matches!(request, Request::Console { .. } | Request::Metrics | Request::Top) {
        log::info!("user {user}, process {process}, asks: {}", describe(&request));
    }
    let outcome = match request {
        Request::Exec(program) => exec(&pod, caller, &program, fds).await,
        request => answer(&pod, request).await,
    };
    // Who has gone needs no answer.
    let _ = match outcome {
        Ok((answer, file)) => caller.send(&answer, &file.iter().map(AsFd::as_fd).collect::<Vec<_>>()).await,
        Err(error) => caller.send(&Answer::Failed(error.to_string()), &[]).await,
    };
}

/// A request in the log: what a program's arguments and environment hold is not for it.
fn describe(request: &Request) -> String {
    match request {
        Request::Exec(exec) => format!(
            "run {} in container {}",
            exec.args.first().map_or("nothing", |program| program),
            exec.container.as_deref().unwrap_or("(the only one)")
        ),
        request => format!("{request:?}"),
    }
}

/// An answer, and the file that comes with it.
type Answered = (Answer, Option<OwnedFd>);

async fn answer(pod: &Arc<Pod>, request: Request) -> Result<Answered> {
    let machine = pod.machine()?;
    match request {
        Request::Exec(_) | Request::Resize(_) => Err(Error::Invalid("no program runs on this connection".into())),
        Request::Log { container } => {
            let container = choose(pod, container.as_deref())?;
            let file =
                log_file(&machine, &container).map_err(|error| Error::Failed(error.context(format!("container {}", container.id))))?;
            Ok((Answer::File { next: 0 }, Some(file.into())))
        }
        Request::Console { after } => {
            let (text, next) = machine.sandbox.agent.kernel_log(after).await?;
            Ok((Answer::File { next }, Some(memory_file(text.as_bytes())?)))
        }
        Request::Stop { timeout_ms } => {
            stop(pod, &machine, Duration::from_millis(timeout_ms.min(MAX_STOP_MS).into())).await;
            Ok((Answer::Done, None))
        }
        Request::Metrics => {
            let (vcpus, memory_mib) = machine.store.read(|record| (record.vcpus, record.memory_mib));
            let mut usage = Usage { vcpus, memory_mib, containers: Vec::new() };
            for container in members(pod) {
                // One that ends meanwhile uses nothing.
                let Ok(stats) = machine.sandbox.agent.stats(&container.id).await else { continue };
                usage.containers.push(ContainerUsage {
                    container: container.id.clone(),
                    cpu_us: stats.cpu_usage_us,
                    memory: stats.memory_usage,
                    // What is not limited reads as the largest number.
                    memory_limit: if stats.memory_limit == u64::MAX { 0 } else { stats.memory_limit },
                    pids: stats.pids_current,
                    oom_kills: stats.memory_events.get("oom_kill").copied().unwrap_or(0),
                });
            }
            json_file(&usage)
        }
        Request::Top => {
            let mut processes = Vec::new();
            for container in members(pod) {
                let Ok(infos) = machine.sandbox.agent.processes(&container.id).await else { continue };
                processes.extend(infos.into_iter().map(|info| PodProcess {
                    container: container.id.clone(),
                    pid: info.pid,
                    user: info.user,
                    host_user: machine.config.fs_id_base.saturating_add(info.guest_user),
                    command: info.command,
                }));
            }
            json_file(&processes)
        }
    }
}

/// The containers that people think of: not the one that holds the pod together.
fn members(pod: &Pod) -> Vec<Arc<Container>> {
    let mut containers: Vec<_> = pod.containers().values().filter(|container| !is_sandbox(container)).cloned().collect();
    containers.sort_by(|a, b| a.id.cmp(&b.id));
    containers
}

fn spec_of(container: &Container) -> anyhow::Result<Spec> {
    Spec::read(&Path::new(&container.bundle).join("config.json"))
}

fn is_sandbox(container: &Container) -> bool {
    spec_of(container).is_ok_and(|spec| spec.kind() == Kind::Sandbox)
}

fn name_of(container: &Container) -> Option<String> {
    spec_of(container).ok()?.annotations().remove(CONTAINER_NAME)
}

/// The container of an id, the beginning of one, or a name that Kubernetes gave it; without, the only one.
fn choose(pod: &Pod, wanted: Option<&str>) -> Result<Arc<Container>> {
    let members = members(pod);
    let matching: Vec<_> = match wanted {
        None => members.iter().collect(),
        Some(wanted) => {
            let named: Vec<_> = members.iter().filter(|member| member.id == wanted || name_of(member).as_deref() == Some(wanted)).collect();
            if named.is_empty() { members.iter().filter(|member| member.id.starts_with(wanted)).collect() } else { named }
        }
    };
    // A container that was restarted has its name twice: the one that runs is meant.
    let running: Vec<_> = matching.iter().filter(|member| member.init.exited().is_none()).collect();
    match (running.as_slice(), matching.as_slice()) {
        ([one], _) => Ok(Arc::clone(one)),
        ([], [one]) => Ok(Arc::clone(one)),
        _ => {
            let names: BTreeSet<String> = members.iter().map(|member| name_of(member).unwrap_or_else(|| member.id.clone())).collect();
            let names: Vec<String> = names.into_iter().collect();
            let which = wanted.map_or_else(|| "which container".to_owned(), |wanted| format!("container {wanted:?}"));
            Err(Error::NotFound(format!("{which}: the pod has {}", if names.is_empty() { "none".into() } else { names.join(", ") })))
        }
    }
}

/// Runs a program until it or the caller has ended.
async fn exec(pod: &Arc<Pod>, caller: &Channel, program: &Exec, fds: Vec<OwnedFd>) -> Result<Answered> {
    let container = choose(pod, program.container.as_deref())?;
    if program.args.is_empty() {
        return Err(Error::Invalid("there is no program to run".into()));
    }
    let process = process_of(&spec_of(&container)?, program)?;
    let (id, terminal) = (format!("owner-{:08x}", stdio::stream_port()?), program.terminal.is_some());
    let paths = Paths { terminal, ..Paths::default() };
    pod.exec_on(&container.id, &id, process, paths, |_| stdio::given(terminal, fds)).await?;
    let ended = run(pod, caller, &container, &id, program.terminal).await;
    let deleted = pod.delete(&container.id, &id).await;
    ended?;
    let (_, exit) = deleted?;
    Ok((Answer::Exited { status: exit.status }, None))
}

async fn run(pod: &Arc<Pod>, caller: &Channel, container: &Container, id: &str, size: Option<Size>) -> Result<()> {
    pod.start(&container.id, id).await?;
    let process = container.process(id)?;
    if let Some(size) = size {
        resize(pod, container, id, size).await;
    }
    // A caller that has gone is seen below.
    let _ = caller.send(&Answer::Started, &[]).await;
    loop {
        tokio::select! {
            _ = process.wait() => return Ok(()),
            request = caller.receive::<Request>() => match request {
                Ok(Some((Request::Resize(size), _))) => resize(pod, container, id, size).await,
                _ => {
                    // It may end by itself meanwhile.
                    let _ = pod.kill(&container.id, id, SIGKILL, false).await;
                    process.wait().await;
                    return Ok(());
                }
            },
        }
    }
}

/// A terminal whose program has ended has no size.
async fn resize(pod: &Pod, container: &Container, id: &str, size: Size) {
    let _ = pod.resize(&container.id, id, size.columns.into(), size.rows.into()).await;
}

/// The container's own process, but for what the owner says.
fn process_of(spec: &Spec, program: &Exec) -> Result<Vec<u8>> {
    let Some(mut process) = spec.process() else { return Err(Error::Invalid("the container has no process".into())) };
    process.insert("args".into(), program.args.clone().into());
    process.insert("terminal".into(), program.terminal.is_some().into());
    if let Some(cwd) = &program.cwd {
        process.insert("cwd".into(), cwd.clone().into());
    }
    if let Some(Value::Array(env)) = process.get_mut("env") {
        env.extend(program.env.iter().cloned().map(Value::from));
    }
    Ok(Value::from(process).to_string().into_bytes())
}

/// Asks the containers to end, and ends what is left after a time.
async fn stop(pod: &Arc<Pod>, machine: &Machine, timeout: Duration) {
    let running: Vec<_> = members(pod).into_iter().filter(|container| container.init.exited().is_none()).collect();
    for container in &running {
        // It may end by itself meanwhile.
        let _ = machine.sandbox.agent.signal(&container.id, "", SIGTERM, false).await;
    }
    let ended = async {
        for container in &running {
            container.init.wait().await;
        }
    };
    let _ = tokio::time::timeout(timeout, ended).await;
    pod.stop(KILL_TIMEOUT).await;
}

/// Where a container's output is, if it is in a file.
fn log_file(machine: &Machine, container: &Container) -> anyhow::Result<File> {
    let path = match (stdio::file_of(&container.init.paths.stdout), &machine.log_folder, name_of(container)) {
        (Some(path), ..) => path.to_owned(),
        // kubelet numbers them by the container's restarts.
        (None, Some(folder), Some(name)) => newest(&folder.join(name))?,
        _ => anyhow::bail!("its output goes to who started it, and to no file"),
    };
    // Who made the folder is trusted, who fills the file need not be.
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    anyhow::ensure!(file.metadata().is_ok_and(|meta| meta.is_file()), "{} is no file", path.display());
    Ok(file)
}

fn newest(folder: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let logs = entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let by_time = logs.filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)));
    by_time.max().map(|(_, path)| path).with_context(|| format!("{} holds no log", folder.display()))
}

fn json_file(value: &impl Serialize) -> Result<Answered> {
    let bytes = serde_json::to_vec(value).map_err(|error| Error::Failed(error.into()))?;
    Ok((Answer::File { next: 0 }, Some(memory_file(&bytes)?)))
}

/// A file that is nowhere, to be read from its beginning.
fn memory_file(bytes: &[u8]) -> anyhow::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"answer", MFdFlags::MFD_CLOEXEC).context("make an answer's file")?);
    file.write_all(bytes).and_then(|()| file.rewind()).context("write an answer")?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_run_as_the_containers_own_but_for_what_is_said() {
        let own = r#"{"process":{"args":["web"],"cwd":"/srv","env":["A=1"],"user":{"uid":7},"terminal":false}}"#;
        let spec = Spec::from_value(serde_json::from_str(own).unwrap());
        let program =
            Exec { args: vec!["sh".into()], env: vec!["B=2".into()], terminal: Some(Size { columns: 80, rows: 24 }), ..Exec::default() };
        let process: Value = serde_json::from_slice(&process_of(&spec, &program).unwrap()).unwrap();
        let expected = r#"{"args":["sh"],"cwd":"/srv","env":["A=1","B=2"],"user":{"uid":7},"terminal":true}"#;
        assert_eq!(process, serde_json::from_str::<Value>(expected).unwrap());
    }

    #[tokio::test]
    async fn root_has_room_when_owners_have_taken_all_and_one_owner_cannot_take_all() {
        let places = Places::default();
        let soon = |user| tokio::time::timeout(Duration::from_millis(10), places.conversation(user));
        let mut taken = Vec::new();
        for _ in 0..MAX_OF_ONE {
            taken.push(soon(1000).await.unwrap());
        }
        assert!(soon(1000).await.is_err());
        for _ in MAX_OF_ONE..MAX_CONVERSATIONS {
            taken.push(soon(1001).await.unwrap());
        }
        assert!(soon(1002).await.is_err() && soon(0).await.is_ok());
        taken.pop();
        assert!(soon(1002).await.is_ok());
        let connections: Vec<_> = (0..MAX_CONNECTIONS).map(|_| places.connection(1000).unwrap()).collect();
        assert!(places.connection(1001).is_none() && places.connection(0).is_some());
        drop(connections);
        assert!(places.connection(1001).is_some());
    }

    #[test]
    fn owners_are_a_group_by_name_or_number() {
        assert_eq!((group("").unwrap(), group("1234").unwrap()), (None, Some(Gid::from_raw(1234))));
        assert_eq!(group("root").unwrap(), Some(Gid::from_raw(0)));
        assert!(group("no-such-group").unwrap_err().to_string().contains("no-such-group"));
    }

    #[test]
    fn the_newest_log_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(newest(folder.path()).is_err());
        for name in ["0.log", "1.log", "other"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let old = File::options().write(true).open(folder.path().join("0.log")).unwrap();
        old.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(newest(folder.path()).unwrap(), folder.path().join("1.log"));
    }
}
