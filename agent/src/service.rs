//! The Agent service: each call to the function that serves it, errors to ttrpc codes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use caisson_protocol::VERSION;
use caisson_protocol::agent::{
    AcceptSocketRequest, AcceptSocketResponse, Agent, AttachDiskRequest, AttachDiskResponse, CarrySocketRequest, ConfigureNetworkRequest,
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, CreateExecRequest, DetachDiskRequest, Empty, ForwardRequest,
    HelloRequest, HelloResponse, KernelLogRequest, KernelLogResponse, PidsResponse, ProcessInfo, ProcessRequest, PublishVolumeRequest,
    ResizeMachineRequest, ResizeRequest, SignalRequest, StartResponse, StatsResponse, UpdateRequest, WaitOomRequest, WaitOomResponse,
    WaitResponse,
};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, Result};

use crate::boot::{self, uptime_us};
use crate::cgroup::Cgroup;
use crate::containers::{Containers, Error, blocking};
use crate::disks::Disks;
use crate::machine::{self, Machine};
use crate::network::{self, Network};
use crate::{kernel_log, processes, volumes};

/// The service.
pub struct AgentService {
    containers: Arc<Containers>,
    network: Arc<Mutex<Network>>,
    machine: Arc<Mutex<Machine>>,
    disks: Disks,
    started_us: u64,
}

impl AgentService {
    /// A service for these containers in this machine, in an agent that started at this uptime.
    pub fn new(containers: Arc<Containers>, machine: Machine, started_us: u64) -> Self {
        Self { containers, network: Arc::default(), machine: Arc::new(Mutex::new(machine)), disks: Disks::default(), started_us }
    }
}

fn code(error: &Error) -> Code {
    match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::Precondition(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) => Code::INVALID_ARGUMENT,
        Error::Failed(_) => Code::UNKNOWN,
    }
}

fn answer<T>(result: std::result::Result<T, Error>) -> Result<T> {
    result.map_err(|error| ttrpc::Error::RpcStatus(ttrpc::get_status(code(&error), error.to_string())))
}

fn done(result: std::result::Result<(), Error>) -> Result<Empty> {
    answer(result).map(|()| Empty::new())
}

#[async_trait]
impl Agent for AgentService {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Result<HelloResponse> {
        let mut response =
            HelloResponse { version: VERSION.into(), agent_start_us: self.started_us, ready_us: uptime_us(), ..HelloResponse::default() };
        response.kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
        if request.version == VERSION {
            answer(greet(&request).map_err(Error::Failed))?;
        }
        Ok(response)
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let pid = answer(self.containers.create(request).await)?;
        Ok(CreateContainerResponse { pid, ..CreateContainerResponse::default() })
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> Result<Empty> {
        done(self.containers.create_exec(&request.container, &request.exec, &request.process, request.stdio.unwrap_or_default()))
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<StartResponse> {
        let pid = answer(self.containers.start(&request.container, &request.exec).await)?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<WaitResponse> {
        let exit = answer(self.containers.wait(&request.container, &request.exec).await)?;
        // Gone already when the container was deleted meanwhile.
        let oom_kills = self.containers.cgroup(&request.container).map_or(0, |cgroup| cgroup.oom_kills());
        Ok(WaitResponse { exit_status: exit.status, exited_at_ns: exit.at_ns, oom_kills, ..WaitResponse::default() })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        done(self.containers.signal(&request.container, &request.exec, request.signal, request.all).await)
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> Result<Empty> {
        done(self.containers.resize(&request.container, &request.exec, request.columns, request.rows).await)
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<PidsResponse> {
        let processes = answer(self.containers.pids(&request.container).await)?;
        let mut infos: Vec<_> = processes.into_iter().map(|(pid, exec)| ProcessInfo { pid, exec, ..ProcessInfo::default() }).collect();
        if request.details {
            infos.iter_mut().for_each(processes::describe);
        }
        Ok(PidsResponse { processes: infos, ..PidsResponse::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<StatsResponse> {
        // Without a name, those of all containers together.
        let cgroup = if request.container.is_empty() { Ok(Cgroup::all()) } else { self.containers.cgroup(&request.container) };
        answer(cgroup).map(|cgroup| cgroup.stats())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Result<Empty> {
        done(self.containers.cgroup(&request.container).and_then(|cgroup| {
            let resources = serde_json::from_slice(&request.resources).map_err(|error| Error::Invalid(format!("resources: {error}")))?;
            Ok(cgroup.update(&resources)?)
        }))
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        done(self.freeze(&request.container, true).await)
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        done(self.freeze(&request.container, false).await)
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        done(self.containers.delete(&request.container, &request.exec).await)
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> Result<WaitOomResponse> {
        let oom_kills = answer(self.containers.wait_oom(&request.container, request.known).await)?;
        Ok(WaitOomResponse { oom_kills, ..WaitOomResponse::default() })
    }

    async fn forget_files(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        done(blocking(machine::forget_files).await.map_err(Error::Failed))
    }

    async fn configure_network(&self, _: &TtrpcContext, request: ConfigureNetworkRequest) -> Result<Empty> {
        let network = Arc::clone(&self.network);
        let configure = move || network.lock().unwrap_or_else(PoisonError::into_inner).configure(request);
        done(blocking(configure).await.map_err(Error::Failed))
    }

    async fn publish_volume(&self, _: &TtrpcContext, request: PublishVolumeRequest) -> Result<Empty> {
        let publish = move || volumes::publish(&request.container, &request.volume, &request.state);
        done(blocking(publish).await.map_err(Error::Failed))
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> Result<Empty> {
        done(network::forward(&request.target, request.port).await.map_err(Error::Failed))
    }

    async fn accept_socket(&self, _: &TtrpcContext, request: AcceptSocketRequest) -> Result<AcceptSocketResponse> {
        let connection = answer(self.containers.accept_socket(&request.container, &request.name).await)?;
        Ok(AcceptSocketResponse { connection, ..AcceptSocketResponse::default() })
    }

    async fn carry_socket(&self, _: &TtrpcContext, request: CarrySocketRequest) -> Result<Empty> {
        done(self.containers.carry_socket(request.connection, request.port))
    }

    async fn resize_machine(&self, _: &TtrpcContext, request: ResizeMachineRequest) -> Result<Empty> {
        let machine = Arc::clone(&self.machine);
        let resize = move || machine.lock().unwrap_or_else(PoisonError::into_inner).resize(request.vcpus, request.added_mib);
        done(blocking(resize).await.map_err(Error::Failed))
    }

    async fn attach_disk(&self, _: &TtrpcContext, request: AttachDiskRequest) -> Result<AttachDiskResponse> {
        let disks = self.disks.clone();
        let attach = move || disks.attach(&request);
        let (major, minor) = answer(blocking(attach).await.map_err(Error::Failed))?;
        Ok(AttachDiskResponse { major, minor, ..AttachDiskResponse::default() })
    }

    async fn kernel_log(&self, _: &TtrpcContext, request: KernelLogRequest) -> Result<KernelLogResponse> {
        answer(blocking(move || kernel_log::read(request.after)).await.map_err(Error::Failed))
    }

    async fn detach_disk(&self, _: &TtrpcContext, request: DetachDiskRequest) -> Result<Empty> {
        let disks = self.disks.clone();
        let detached = blocking(move || Ok(disks.detach(request.place))).await;
        done(detached.unwrap_or_else(|error| Err(Error::Failed(error))))
    }
}

impl AgentService {
    async fn freeze(&self, container: &str, frozen: bool) -> std::result::Result<(), Error> {
        let cgroup: Cgroup = self.containers.cgroup(container)?;
        Ok(blocking(move || cgroup.freeze(frozen)).await?)
    }
}

/// Takes over the host's clock and the pod's name.
fn greet(request: &HelloRequest) -> anyhow::Result<()> {
    if request.time_ns > 0 {
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(request.time_ns)))?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)?;
    }
    if request.shm_bytes > 0 {
        boot::resize_shm(request.shm_bytes)?;
    }
    boot::keep_files(&request.files)
}
