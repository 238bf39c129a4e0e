//! The agent in the guest, as the shim calls it: every call has a time-out and ends with the machine.

use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use caisson_protocol::VERSION;
use caisson_protocol::agent::{
    AcceptSocketRequest, AttachDiskRequest, CarrySocketRequest, ConfigureNetworkRequest, ContainerRequest, CreateContainerRequest,
    CreateExecRequest, DetachDiskRequest, DiskMount, Empty, ForwardRequest, HelloRequest, HelloResponse, KernelLogRequest, PodFile,
    ProcessInfo, ProcessRequest, PublishVolumeRequest, ResizeMachineRequest, ResizeRequest, SignalRequest, StatsResponse, Stdio,
    UpdateRequest, WaitOomRequest,
};

use crate::agent_client::Client;
use crate::cri;
use crate::errors::{Error, Result, one_line};
use crate::vmm::Ended;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0-255; 128 + signal for a killed process.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// Processes of its container that the kernel had killed for want of memory by then.
    pub oom_kills: u64,
}

impl Exit {
    /// Of a process whose machine is gone: as if killed, now.
    pub fn killed() -> Self {
        Self::now(128 + libc::SIGKILL.unsigned_abs())
    }

    /// Of a process that ends now, by our word and not the guest's.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now(), oom_kills: 0 }
    }
}

/// From a broken connection to the monitor's last words.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// For a file system to be mounted with what its journal holds, or unmounted with all that was not written yet.
pub const DISK_TIMEOUT: Duration = Duration::from_secs(300);

/// The way to the agent.
#[derive(Clone)]
pub struct Agent {
    client: Client,
    ended: Ended,
    timeout: Duration,
}

impl Agent {
    /// Speaks over a socket that the guest will connect to. `violated` hears what it did that no agent does.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn new(
        socket: UnixStream,
        ended: Ended,
        timeout: Duration,
        violated: impl FnOnce(String) + Send + 'static,
    ) -> anyhow::Result<Self> {
        socket.set_nonblocking(true).context("prepare the agent's socket")?;
        let socket = tokio::net::UnixStream::from_std(socket).context("watch the agent's socket")?;
        Ok(Self { client: Client::new(socket, violated), ended, timeout })
    }

    /// Waits for an answer as long as the machine runs.
    async fn until_ended<T>(&self, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
        let mut ended = self.ended.clone();
        let answer = tokio::select! {
            biased;
            answer = call => Some(answer),
            _ = ended.wait_for(Option::is_some) => None,
        };
        match answer {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(error @ ttrpc::Error::RpcStatus(_))) => Err(error.into()),
            // The connection broke. That the machine is gone, and why, is known in a moment.
            Some(Err(error)) => match tokio::time::timeout(LAST_WORDS, ended.wait_for(Option::is_some)).await {
                Ok(_) => Err(self.gone()),
                Err(_) => Err(error.into()),
            },
            None => Err(self.gone()),
        }
    }

    /// What became of the machine, for who waited for something of it.
    pub fn gone(&self) -> Error {
        Error::Gone(format!("the pod's machine is gone: {}", self.ended.borrow().as_deref().unwrap_or("for no known reason")))
    }

    async fn call<T>(&self, what: &str, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
        self.call_within(self.timeout, what, call).await
    }

    async fn call_within<T>(&self, timeout: Duration, what: &str, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
        match tokio::time::timeout(timeout, self.until_ended(call)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Timeout(format!("{what}: the guest's agent did not answer within {} ms", timeout.as_millis()))),
        }
    }

    /// Exchanges versions and hands over time, name, the size of shared memory (0: the guest's
    /// own choice) and the pod's files. The caller bounds the wait.
    pub async fn hello(&self, hostname: &str, shm_bytes: u64, files: &[cri::PodFile]) -> Result<HelloResponse> {
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(0));
        let files = files.iter().map(|file| PodFile { name: file.name.into(), content: file.content.clone(), ..PodFile::default() });
        let request = HelloRequest {
            version: VERSION.into(),
            time_ns,
            hostname: hostname.to_owned(),
            shm_bytes,
            files: files.collect(),
            ..HelloRequest::default()
        };
        let answer = self.until_ended(self.client.hello(&request)).await?;
        check_version(&answer.version)?;
        Ok(answer)
    }

    /// Whether the agent answers.
    pub async fn ping(&self) -> Result<()> {
        self.call("health check", self.client.ping(&Empty::new())).await.map(drop)
    }

    /// Has the guest's kernel forget files that nobody uses.
    pub async fn forget_files(&self) -> Result<()> {
        self.call("forget files", self.client.forget_files(&Empty::new())).await.map(drop)
    }

    /// Makes a container; returns the id that its own process has in the guest.
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<u32> {
        self.call("create the container", self.client.create_container(&request)).await.map(|answer| answer.pid)
    }

    /// Registers an exec.
    pub async fn create_exec(&self, container: &str, exec: &str, process: Vec<u8>, stdio: Stdio) -> Result<()> {
        let request = CreateExecRequest {
            container: container.to_owned(),
            exec: exec.to_owned(),
            process,
            stdio: Some(stdio).into(),
            ..CreateExecRequest::default()
        };
        self.call("create the exec", self.client.create_exec(&request)).await.map(drop)
    }

    /// Starts a container or exec.
    pub async fn start(&self, container: &str, exec: &str) -> Result<()> {
        self.call("start the process", self.client.start(&process(container, exec))).await.map(drop)
    }

    /// Waits for a process's exit, however long it runs.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let answer = self.until_ended(self.client.wait(&process(container, exec))).await?;
        let at = UNIX_EPOCH + Duration::from_nanos(answer.exited_at_ns);
        Ok(Exit { status: answer.exit_status, at, oom_kills: answer.oom_kills })
    }

    /// Waits until the kernel has killed more than `known` processes of the container for want of
    /// memory, however long that takes; returns how many it has.
    pub async fn wait_oom(&self, container: &str, known: u64) -> Result<u64> {
        let request = WaitOomRequest { container: container.to_owned(), known, ..WaitOomRequest::default() };
        self.until_ended(self.client.wait_oom(&request)).await.map(|answer| answer.oom_kills)
    }

    /// Sends a signal.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = SignalRequest { container: container.to_owned(), exec: exec.to_owned(), signal, all, ..SignalRequest::default() };
        self.call("send the signal", self.client.signal(&request)).await.map(drop)
    }

    /// Resizes a terminal.
    pub async fn resize(&self, container: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        let request = ResizeRequest { container: container.to_owned(), exec: exec.to_owned(), columns, rows, ..ResizeRequest::default() };
        self.call("resize the terminal", self.client.resize(&request)).await.map(drop)
    }

    /// Processes of a container, with what each says of itself.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let request = ContainerRequest { details: true, ..named(container) };
        self.call("list the processes", self.client.pids(&request)).await.map(|answer| answer.processes)
    }

    /// What the guest's kernel has said from a message on, and the number of the next.
    pub async fn kernel_log(&self, after: u64) -> Result<(String, u64)> {
        let request = KernelLogRequest { after, ..KernelLogRequest::default() };
        self.call("read the guest kernel's log", self.client.kernel_log(&request)).await.map(|answer| (answer.text, answer.next))
    }

    /// Counters of a container.
    pub async fn stats(&self, container: &str) -> Result<StatsResponse> {
        self.call("read the statistics", self.client.stats(&named(container))).await
    }

    /// New limits for a container.
    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<()> {
        let request = UpdateRequest { container: container.to_owned(), resources, ..UpdateRequest::default() };
        self.call("update the limits", self.client.update(&request)).await.map(drop)
    }

    /// Stops or continues all processes of a container.
    pub async fn freeze(&self, container: &str, frozen: bool) -> Result<()> {
        let request = named(container);
        if frozen {
            self.call("pause the container", self.client.pause(&request)).await.map(drop)
        } else {
            self.call("resume the container", self.client.resume(&request)).await.map(drop)
        }
    }

    /// Brings the guest's interfaces, addresses, routes and the like up to date.
    pub async fn configure_network(&self, request: ConfigureNetworkRequest) -> Result<()> {
        self.call("configure the network", self.client.configure_network(&request)).await.map(drop)
    }

    /// Has the guest use so many vCPUs and so much added memory.
    pub async fn resize_machine(&self, vcpus: u32, added_mib: u64) -> Result<()> {
        let request = ResizeMachineRequest { vcpus, added_mib, ..ResizeMachineRequest::default() };
        self.call("resize the machine", self.client.resize_machine(&request)).await.map(drop)
    }

    /// Has the guest find the disk in a place, and mount it, or its parts of so many bytes; returns its device's numbers.
    pub async fn attach_disk(&self, place: u32, mount: Option<DiskMount>, parts: Vec<u64>) -> Result<(u32, u32)> {
        let request = AttachDiskRequest { place, mount: mount.into(), parts, ..AttachDiskRequest::default() };
        self.call_within(DISK_TIMEOUT, "attach the disk", self.client.attach_disk(&request))
            .await
            .map(|answer| (answer.major, answer.minor))
    }

    /// Has the guest unmount the disk in a place and let go of it.
    pub async fn detach_disk(&self, place: u32) -> Result<()> {
        let request = DetachDiskRequest { place, ..DetachDiskRequest::default() };
        self.call_within(DISK_TIMEOUT, "detach the disk", self.client.detach_disk(&request)).await.map(drop)
    }

    /// Copies the state of a volume into the guest.
    pub async fn publish_volume(&self, container: &str, volume: &str, state: &str) -> Result<()> {
        let (container, volume, state) = (container.to_owned(), volume.to_owned(), state.to_owned());
        let request = PublishVolumeRequest { container, volume, state, ..PublishVolumeRequest::default() };
        self.call("publish the volume", self.client.publish_volume(&request)).await.map(drop)
    }

    /// Connects the stream of a port to an address within the guest.
    pub async fn forward(&self, target: SocketAddr, port: u32) -> Result<()> {
        let request = ForwardRequest { target: target.to_string(), port, ..ForwardRequest::default() };
        self.call("forward a connection", self.client.forward(&request)).await.map(drop)
    }

    /// Waits for somebody to connect to a container's socket, however long that takes; returns the connection's number.
    pub async fn accept_socket(&self, container: &str, name: &str) -> Result<u64> {
        let request = AcceptSocketRequest { container: container.to_owned(), name: name.to_owned(), ..AcceptSocketRequest::default() };
        self.until_ended(self.client.accept_socket(&request)).await.map(|answer| answer.connection)
    }

    /// Connects the stream of a port to a connection; 0 breaks the connection.
    pub async fn carry_socket(&self, connection: u64, port: u32) -> Result<()> {
        let request = CarrySocketRequest { connection, port, ..CarrySocketRequest::default() };
        self.call("carry a connection", self.client.carry_socket(&request)).await.map(drop)
    }

    /// Forgets an exec or removes a container.
    pub async fn delete(&self, container: &str, exec: &str) -> Result<()> {
        self.call("delete the process", self.client.delete(&process(container, exec))).await.map(drop)
    }
}

fn process(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest { container: container.to_owned(), exec: exec.to_owned(), ..ProcessRequest::default() }
}

fn named(container: &str) -> ContainerRequest {
    ContainerRequest { container: container.to_owned(), ..ContainerRequest::default() }
}

/// Both sides of the control connection come from one build.
fn check_version(agent: &str) -> Result<()> {
    if agent == VERSION {
        return Ok(());
    }
    Err(Error::Precondition(format!(
        "the shim is version {VERSION} and the agent in the initramfs is version {}; install both from one build",
        one_line(agent)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_of_another_build_is_named_with_its_version_and_ours() {
        let error = check_version("0.1.0+0badc0de").unwrap_err().to_string();
        assert!(error.contains("0.1.0+0badc0de") && error.contains(VERSION), "{error}");
        assert!(check_version(VERSION).is_ok());
    }
}
