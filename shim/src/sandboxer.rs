//! The sandbox service (containerd `api/runtime/sandbox/v1/sandbox.proto`): pods whose sandbox the
//! shim makes itself, without an image, as containerd 2 asks for with `sandboxer = "shim"`.
//!
//! The sandbox is a container like any other, made from what kubelet says of the pod; containerd
//! does not know it as one, and hears of it here.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse, SandboxMetricsRequest,
    SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
    StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;
use tokio::sync::watch;
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use crate::agent::Exit;
use crate::calls::whole;
use crate::container::Container;
use crate::cri::PodSandbox;
use crate::errors::{self, Error};
use crate::events::timestamp;
use crate::pod::{CreateContainer, Pod};
use crate::process::Status;
use crate::stats;
use crate::stdio::Paths;

/// How long the pod's containers may take to die when the caller does not say.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// As containerd's CRI reads them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service.
pub struct SandboxService {
    pod: Arc<Pod>,
    created: Arc<OnceLock<SystemTime>>,
    ended: watch::Sender<bool>,
}

impl SandboxService {
    /// A service for a pod; `ended` is told when the shim is to end.
    pub fn new(pod: Arc<Pod>, ended: watch::Sender<bool>) -> Self {
        Self { pod, created: Arc::default(), ended }
    }

    /// The sandbox's container.
    fn holder(&self) -> errors::Result<Arc<Container>> {
        self.pod.sandbox()?;
        self.pod.container(self.pod.id())
    }
}

/// Makes a pod's sandbox and starts it.
async fn start(pod: &Arc<Pod>) -> errors::Result<u32> {
    let sandbox = pod.sandbox()?;
    let rootfs = [empty_root(sandbox.root)];
    let request = CreateContainer { id: pod.id(), bundle: &sandbox.bundle, spec: &sandbox.spec, rootfs: &rootfs, paths: Paths::default() };
    pod.create(request).await?;
    pod.start(pod.id(), "").await
}

/// The root of a container without image: room for the folders that are mounted over.
fn empty_root((user, group): (u32, u32)) -> Mount {
    let mut options = ["mode=0755", "size=64k", "nr_inodes=64", "nosuid", "noexec"].map(str::to_owned).to_vec();
    options.extend([format!("uid={user}"), format!("gid={group}")]);
    Mount { type_: "tmpfs".into(), source: "tmpfs".into(), options, ..Mount::default() }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        if request.sandbox_id != self.pod.id() {
            return Err(Error::Invalid(format!("sandbox {}: this shim serves {}", request.sandbox_id, self.pod.id())).into());
        }
        let CreateSandboxRequest { sandbox_id, bundle_path, options, netns_path, .. } = request;
        let sandbox = PodSandbox::read(&sandbox_id, &options.type_url, &options.value, &netns_path, &bundle_path)
            .map_err(|error| Error::Invalid(format!("{error:#}")))?;
        self.pod.describe_sandbox(sandbox)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, _: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let (pod, created) = (Arc::clone(&self.pod), Arc::clone(&self.created));
        let start = async move {
            let pid = start(&pod).await?;
            // A second start does not come this far.
            let _ = created.set(SystemTime::now());
            Ok(pid)
        };
        let pid = whole(start).await?;
        let created_at = self.created.get().copied().map(timestamp).into();
        Ok(StartSandboxResponse { pid, created_at, ..StartSandboxResponse::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Result<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        (platform.os, platform.architecture) = ("linux".into(), "amd64".into());
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        let timeout = if request.timeout_secs == 0 { STOP_TIMEOUT } else { Duration::from_secs(request.timeout_secs.into()) };
        let pod = Arc::clone(&self.pod);
        let stop = async move {
            pod.stop(timeout).await;
            Ok(())
        };
        whole(stop).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, _: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        let exit = self.holder()?.init.wait().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        self.pod.sandbox()?;
        // Described and not started, or ended: both are not ready.
        let holder = self.holder().ok();
        let ready = holder.as_ref().is_some_and(|holder| holder.init.status() == Status::Running);
        let exit: Option<Exit> = holder.as_ref().and_then(|holder| holder.init.exited());
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: holder.map_or(0, |holder| holder.task.pid()),
            state: if ready { READY } else { NOT_READY }.into(),
            created_at: self.created.get().copied().map(timestamp).into(),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> Result<PingResponse> {
        self.pod.machine()?.sandbox.agent.ping().await?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(&self, _: &TtrpcContext, _: ShutdownSandboxRequest) -> Result<ShutdownSandboxResponse> {
        let (pod, ended) = (Arc::clone(&self.pod), self.ended.clone());
        let end = async move {
            pod.stop(STOP_TIMEOUT).await;
            pod.shutdown(true).await;
            ended.send_replace(true);
            Ok(())
        };
        whole(end).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(&self, _: &TtrpcContext, request: SandboxMetricsRequest) -> Result<SandboxMetricsResponse> {
        // The empty id means all containers together.
        let counters = stats::metrics(&self.pod.machine()?.sandbox.agent.stats("").await?)?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metrics.id = request.sandbox_id;
        metrics.data = MessageField::some(counters);
        Ok(response)
    }
}
