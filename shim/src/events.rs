//! Events to containerd, in order, none lost while containerd restarts.
//!
//! A queue feeds one task that forwards them by ttrpc and tries again until containerd answers.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::MessageField;
use tokio::sync::{mpsc, oneshot};

/// Set by containerd: its ttrpc socket.
const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";
/// For one event to be taken.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Between tries while containerd is away.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// For what is queued when the shim ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The queue's end that events are put into.
#[derive(Clone)]
pub struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

/// Anything of `containerd.events` with its topic.
pub trait Topic: MessageFull {
    /// As containerd's subscribers filter by it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ident => $topic:literal),* $(,)?) => {
        $(impl Topic for containerd_shim_protos::events::task::$event { const TOPIC: &'static str = $topic; })*
    };
}
topics! {
    TaskCreate => "/tasks/create", TaskStart => "/tasks/start", TaskExit => "/tasks/exit", TaskDelete => "/tasks/delete", TaskOOM => "/tasks/oom",
    TaskExecAdded => "/tasks/exec-added", TaskExecStarted => "/tasks/exec-started", TaskPaused => "/tasks/paused", TaskResumed => "/tasks/resumed",
}

impl Events {
    /// Starts the task that forwards, on the current runtime.
    ///
    /// The queue is bounded by what a pod can do: each event is a few hundred bytes and ends a
    /// request that containerd waits for.
    pub fn start(namespace: &str) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        let address = std::env::var(ADDRESS_VARIABLE).unwrap_or_default();
        tokio::spawn(forward(address, namespace.to_owned(), receiver));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event.
    pub fn publish<E: Topic>(&self, event: &E) {
        let mut any = Any::new();
        // containerd's type URLs are bare names.
        any.type_url = E::descriptor().full_name().to_owned();
        any.value = event.write_to_bytes().unwrap_or_default();
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.into(),
            event: MessageField::some(any),
            ..Envelope::default()
        };
        // The task lives as long as the runtime.
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits, within bounds, until everything queued so far was taken.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = tokio::time::timeout(FLUSH_TIMEOUT, flushed).await;
        }
    }
}

/// A time as containerd's messages carry it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

async fn forward(address: String, namespace: String, mut queue: mpsc::UnboundedReceiver<Item>) {
    let mut client: Option<EventsClient> = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Flush(done) => {
                let _ = done.send(());
            }
            Item::Event(envelope) => {
                let request = ForwardRequest { envelope: MessageField::some(*envelope), ..ForwardRequest::default() };
                while let Err(reason) = try_forward(&address, &namespace, &mut client, &request).await {
                    log::debug!("forward an event: {reason}");
                    tokio::time::sleep(RETRY_DELAY).await;
                }
            }
        }
    }
}

async fn try_forward(address: &str, namespace: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> Result<(), String> {
    if client.is_none() {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        if path.is_empty() || !Path::new(path).exists() {
            return Err(format!("containerd's ttrpc socket {path:?} is not there"));
        }
        let connection = Client::connect(&format!("unix://{path}")).await.map_err(|error| error.to_string())?;
        *client = Some(EventsClient::new(connection));
    }
    let Some(connected) = client.as_ref() else { return Err("not connected".into()) };
    let mut context = ttrpc::context::with_timeout(FORWARD_TIMEOUT.as_nanos().try_into().unwrap_or(i64::MAX));
    context.metadata.insert("containerd-namespace-ttrpc".into(), vec![namespace.to_owned()]);
    let outcome = connected.forward(context, request).await;
    match outcome {
        Ok(_) => Ok(()),
        // It arrived and was refused: trying again would not help.
        Err(ttrpc::Error::RpcStatus(status)) => {
            log::warn!("containerd refused an event: {}", status.message());
            Ok(())
        }
        Err(error) => {
            *client = None;
            Err(error.to_string())
        }
    }
}
