//! The task service (containerd `api/runtime/task/v2/shim.proto`, and v3, which is the same on the
//! wire): each call to the pod's function that serves it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use caisson_protocol::VERSION;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest,
    ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::sync::watch;
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use crate::calls::{whole, whole_or};
use crate::errors::Error;
use crate::events::timestamp;
use crate::pod::{CreateContainer, Pod};
use crate::process;
use crate::spec::Spec;
use crate::stats;
use crate::stdio::Paths;

/// The service.
pub struct TaskService {
    pod: Arc<Pod>,
    ended: watch::Sender<bool>,
}

impl TaskService {
    /// A service for a pod; `ended` is told when the shim is to end.
    pub fn new(pod: Arc<Pod>, ended: watch::Sender<bool>) -> Self {
        Self { pod, ended }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let container = self.pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let status = match process.status() {
            process::Status::Created => Status::CREATED,
            process::Status::Running if container.paused.load(Ordering::Acquire) => Status::PAUSED,
            process::Status::Running => Status::RUNNING,
            process::Status::Stopped => Status::STOPPED,
        };
        let exit = process.exited();
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.clone(),
            pid: container.task.pid(),
            status: status.into(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..StateResponse::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("restoring a container from a checkpoint is not implemented".into()).into());
        }
        let (pod, discarded, id) = (Arc::clone(&self.pod), Arc::clone(&self.pod), request.id.clone());
        let create = async move {
            let paths = Paths { terminal: request.terminal, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
            let spec = Spec::read(&Path::new(&request.bundle).join("config.json"))?;
            pod.create(CreateContainer { id: &request.id, bundle: &request.bundle, spec: &spec, rootfs: &request.rootfs, paths }).await
        };
        // Of a container that comes when nobody waits for it any more nobody would ever know.
        let pid = whole_or(create, async move { discarded.discard(&id).await }).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move { pod.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let pod = Arc::clone(&self.pod);
        let (pid, exit) = whole(async move { pod.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at: MessageField::some(timestamp(exit.at)), ..DeleteResponse::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let processes = self.pod.pids(&request.id)?;
        let processes = processes.into_iter().map(|(pid, exec)| process_info(pid, exec)).collect::<Result<_>>()?;
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.pod.pause(&request.id, true).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.pod.pause(&request.id, false).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(Error::Unimplemented("checkpointing a container is not implemented".into()).into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        self.pod.kill(&request.id, &request.exec_id, request.signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let paths = Paths { terminal: request.terminal, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.exec(&request.id, &request.exec_id, request.spec.unwrap_or_default().value, paths).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        self.pod.resize(&request.id, &request.exec_id, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        if request.stdin {
            self.pod.close_input(&request.id, &request.exec_id).await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.update(&request.id, request.resources.unwrap_or_default().value).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let exit = self.pod.container(&request.id)?.process(&request.exec_id)?.wait().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: MessageField::some(timestamp(exit.at)), ..WaitResponse::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let metrics = stats::metrics(&self.pod.stats(&request.id).await?)?;
        Ok(StatsResponse { stats: MessageField::some(metrics), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            // It is asked before there is a task, too.
            task_pid: self.pod.container(&request.id).map_or(0, |container| container.task.pid()),
            version: VERSION.into(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        let (pod, ended) = (Arc::clone(&self.pod), self.ended.clone());
        let shutdown = async move {
            if pod.shutdown(request.now).await {
                ended.send_replace(true);
            }
            Ok(())
        };
        whole(shutdown).await?;
        Ok(Empty::new())
    }
}

/// A process as containerd lists it, with the exec that it was started by.
fn process_info(pid: u32, exec_id: String) -> Result<ProcessInfo> {
    let mut info = ProcessInfo { pid, ..ProcessInfo::default() };
    if !exec_id.is_empty() {
        let details = ProcessDetails { exec_id, ..ProcessDetails::default() };
        let value = details.write_to_bytes().map_err(|error| Error::Failed(error.into()))?;
        info.info = MessageField::some(Any { type_url: "containerd.runc.v1.ProcessDetails".into(), value, ..Any::default() });
    }
    Ok(info)
}
