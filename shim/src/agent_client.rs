//! The client's side of ttrpc (containerd/ttrpc `PROTOCOL.md`) on the one connection to a guest's agent.
//!
//! The other end may be anybody who has taken the guest over, so what it makes us keep and do is bounded by what we have
//! asked:
//!
//! ```text
//! open --answered--> gone
//!   \--given up, by a time-out say--> its number is kept, and nothing else --answered--> gone; the answer is dropped
//! ```
//!
//! A frame that answers no number which is open or kept, or that is no answer, ends the connection. While as many numbers
//! are kept as may be, calls wait.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caisson_protocol::agent;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot};
use ttrpc::proto::{Code, Request, Response};
use ttrpc::{Error, Result};

use crate::pod::lock;

const SERVICE: &str = "caisson.agent.v1.Agent";
/// Bytes of a frame's header: the length of what follows, the call's number, the kind, flags.
const HEADER: usize = 10;
/// The most bytes that follow.
const MAX_LENGTH: usize = 4 << 20;
/// Kinds of frames that there are on this connection.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// Calls that were given up and not answered yet.
const MAX_GIVEN_UP: usize = 1024;
/// Frames that wait to be written.
const QUEUE: usize = 100;
/// Bytes that are read at a time.
const READ: usize = 64 << 10;
/// Pause after a read that does not complete a frame: who sends byte by byte has the shim look this seldom.
const PAUSE: Duration = Duration::from_micros(500);

/// A call that has no answer yet.
enum Call {
    Open(oneshot::Sender<Response>),
    GivenUp,
}

#[derive(Default)]
struct Calls {
    next: u32,
    waiting: HashMap<u32, Call>,
    given_up: usize,
    /// Why there is no connection any more.
    ended: Option<String>,
}

#[derive(Default)]
struct Shared {
    calls: Mutex<Calls>,
    /// Told when one that was given up is answered.
    answered: Notify,
}

impl Shared {
    /// Ends all calls.
    fn end(&self, reason: &str) {
        let mut calls = lock(&self.calls);
        calls.ended.get_or_insert_with(|| reason.to_owned());
        // Who waits hears that the sender is gone.
        (calls.waiting, calls.given_up) = (HashMap::new(), 0);
        drop(calls);
        self.answered.notify_waiters();
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// What of it is not as we have asked for.
    fn take(&self, number: u32, kind: u8, payload: &[u8]) -> std::result::Result<(), String> {
        if kind != RESPONSE {
            return Err(format!("it sent a frame of kind {kind}, which is no answer"));
        }
        let mut calls = lock(&self.calls);
        match calls.waiting.remove(&number) {
            Some(Call::Open(caller)) => {
                drop(calls);
                let answer = Response::parse_from_bytes(payload).map_err(|error| format!("its answer cannot be read: {error}"))?;
                // Nobody may wait for it any more.
                let _ = caller.send(answer);
            }
            Some(Call::GivenUp) => {
                calls.given_up -= 1;
                drop(calls);
                self.answered.notify_one();
            }
            None => return Err(format!("it answered call {number}, which was not made")),
        }
        Ok(())
    }
}

/// A call's number, for as long as somebody waits for the answer.
struct Number<'s> {
    shared: &'s Shared,
    number: u32,
}

impl Drop for Number<'_> {
    fn drop(&mut self) {
        let mut calls = lock(&self.shared.calls);
        if let Some(call) = calls.waiting.get_mut(&self.number) {
            *call = Call::GivenUp;
            calls.given_up += 1;
        }
    }
}

/// The client. A copy is of the same connection.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    frames: mpsc::Sender<Vec<u8>>,
}

/// The agent's calls.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $method:literal ($request:ident) -> $answer:ident;)*) => {
        impl Client {
            $(
                #[doc = concat!("Calls ", $method, ".")]
                ///
                /// # Errors
                /// The agent's, and that of a connection that has ended.
                pub async fn $name(&self, request: &agent::$request) -> Result<agent::$answer> {
                    self.call($method, request).await
                }
            )*
        }
    };
}

calls! {
    accept_socket = "AcceptSocket" (AcceptSocketRequest) -> AcceptSocketResponse;
    attach_disk = "AttachDisk" (AttachDiskRequest) -> AttachDiskResponse;
    carry_socket = "CarrySocket" (CarrySocketRequest) -> Empty;
    configure_network = "ConfigureNetwork" (ConfigureNetworkRequest) -> Empty;
    create_container = "CreateContainer" (CreateContainerRequest) -> CreateContainerResponse;
    create_exec = "CreateExec" (CreateExecRequest) -> Empty;
    delete = "Delete" (ProcessRequest) -> Empty;
    detach_disk = "DetachDisk" (DetachDiskRequest) -> Empty;
    forget_files = "ForgetFiles" (Empty) -> Empty;
    forward = "Forward" (ForwardRequest) -> Empty;
    hello = "Hello" (HelloRequest) -> HelloResponse;
    kernel_log = "KernelLog" (KernelLogRequest) -> KernelLogResponse;
    pause = "Pause" (ContainerRequest) -> Empty;
    pids = "Pids" (ContainerRequest) -> PidsResponse;
    ping = "Ping" (Empty) -> Empty;
    publish_volume = "PublishVolume" (PublishVolumeRequest) -> Empty;
    resize = "Resize" (ResizeRequest) -> Empty;
    resize_machine = "ResizeMachine" (ResizeMachineRequest) -> Empty;
    resume = "Resume" (ContainerRequest) -> Empty;
    signal = "Signal" (SignalRequest) -> Empty;
    start = "Start" (ProcessRequest) -> StartResponse;
    stats = "Stats" (ContainerRequest) -> StatsResponse;
    update = "Update" (UpdateRequest) -> Empty;
    wait = "Wait" (ProcessRequest) -> WaitResponse;
    wait_oom = "WaitOom" (WaitOomRequest) -> WaitOomResponse;
}

impl Client {
    /// Speaks over a connection. `violated` hears what the other end did that no agent does, upon which the connection has
    /// ended.
    pub fn new(connection: UnixStream, violated: impl FnOnce(String) + Send + 'static) -> Self {
        let (frames, queue) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let (reads, writes) = connection.into_split();
        let (of_writer, of_reader) = (Arc::clone(&shared), Arc::clone(&shared));
        tokio::spawn(async move {
            if let Err(error) = write_all(writes, queue).await {
                of_writer.end(&error.to_string());
            }
        });
        tokio::spawn(async move {
            match read_all(reads, &of_reader).await {
                Ok(()) => of_reader.end("the agent closed the connection"),
                Err(Ended::Broken(error)) => of_reader.end(&error.to_string()),
                Err(Ended::Violated(how)) => {
                    of_reader.end(&how);
                    violated(how);
                }
            }
        });
        Self { shared, frames }
    }

    async fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        let others = |error: protobuf::Error| Error::Others(error.to_string());
        let request = Request {
            service: SERVICE.into(),
            method: method.into(),
            payload: request.write_to_bytes().map_err(others)?,
            ..Request::default()
        };
        let payload = request.write_to_bytes().map_err(others)?;
        if payload.len() > MAX_LENGTH {
            return Err(Error::Others(format!("a request of {} bytes is over the limit of {MAX_LENGTH}", payload.len())));
        }
        self.wait_for_numbers().await;
        // A call that is given up before it has a place in the queue was not made.
        let place = self.frames.reserve().await.map_err(|_| self.closed())?;
        let (caller, answer) = oneshot::channel();
        let number = self.number(caller)?;
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(number.number.to_be_bytes());
        frame.extend([REQUEST, 0]);
        frame.extend(payload);
        place.send(frame);
        let answer = answer.await.map_err(|_| self.closed())?;
        let status = answer.status();
        if status.code() != Code::OK {
            return Err(Error::RpcStatus(status.clone()));
        }
        A::parse_from_bytes(&answer.payload).map_err(others)
    }

    /// Waits until a call may be made: those that were given up are bounded, and so are those that pass here at once, by
    /// their places in the queue.
    async fn wait_for_numbers(&self) {
        loop {
            let answered = self.shared.answered.notified();
            if lock(&self.shared.calls).given_up < MAX_GIVEN_UP {
                return;
            }
            answered.await;
        }
    }

    /// A number for a call.
    fn number(&self, caller: oneshot::Sender<Response>) -> Result<Number<'_>> {
        let mut calls = lock(&self.shared.calls);
        if calls.ended.is_some() {
            drop(calls);
            return Err(self.closed());
        }
        // A client's numbers are odd. After all of them they begin anew, and a call may wait for as long as the pod lives.
        let number = loop {
            let number = calls.next * 2 + 1;
            calls.next = (calls.next + 1) & (u32::MAX >> 1);
            if !calls.waiting.contains_key(&number) {
                break number;
            }
        };
        calls.waiting.insert(number, Call::Open(caller));
        Ok(Number { shared: &self.shared, number })
    }

    fn closed(&self) -> Error {
        let reason = lock(&self.shared.calls).ended.clone();
        Error::Others(reason.unwrap_or_else(|| "the connection to the agent has ended".into()))
    }
}

async fn write_all(mut connection: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(frame) = queue.recv().await {
        connection.write_all(&frame).await?;
    }
    Ok(())
}

/// Why a connection has ended before its time.
enum Ended {
    Broken(io::Error),
    Violated(String),
}

/// Takes frames until the connection ends.
async fn read_all(mut connection: OwnedReadHalf, shared: &Shared) -> std::result::Result<(), Ended> {
    let (mut received, mut chunk) = (Vec::new(), vec![0; READ]);
    loop {
        let length = connection.read(&mut chunk).await.map_err(Ended::Broken)?;
        if length == 0 {
            return Ok(());
        }
        received.extend_from_slice(&chunk[..length]);
        let taken = take_frames(&received, shared).map_err(Ended::Violated)?;
        received.drain(..taken);
        if received.is_empty() {
            // What a long answer took is not kept.
            received = Vec::new();
        } else {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Takes the frames that are whole; returns how many bytes they had.
fn take_frames(received: &[u8], shared: &Shared) -> std::result::Result<usize, String> {
    let mut rest = received;
    while let Some((header, after)) = rest.split_at_checked(HEADER) {
        let number = |from: usize| u32::from_be_bytes([header[from], header[from + 1], header[from + 2], header[from + 3]]);
        let (length, call, kind) = (number(0) as usize, number(4), header[8]);
        if length > MAX_LENGTH {
            return Err(format!("it sent a frame of {length} bytes, over the limit of {MAX_LENGTH}"));
        }
        // What is no answer, or to no call of ours, is not waited for.
        if kind != RESPONSE || !lock(&shared.calls).waiting.contains_key(&call) {
            shared.take(call, kind, &[])?;
        }
        let Some((payload, next)) = after.split_at_checked(length) else { break };
        shared.take(call, kind, payload)?;
        rest = next;
    }
    Ok(received.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use caisson_protocol::agent::{ContainerRequest, Empty, StatsResponse};

    use super::*;

    /// A client, the guest's end of its connection, and how often the other end did what no agent does.
    fn connected() -> (Client, UnixStream, Arc<AtomicUsize>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let violations = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&violations);
        let client = Client::new(ours, move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        (client, theirs, violations)
    }

    /// The number of the call that the guest gets next.
    async fn next_call(guest: &mut UnixStream) -> u32 {
        let mut header = [0; HEADER];
        guest.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
        guest.read_exact(&mut payload).await.unwrap();
        u32::from_be_bytes(header[4..8].try_into().unwrap())
    }

    fn frame(number: u32, kind: u8, answer: &impl Message) -> Vec<u8> {
        let response = Response { payload: answer.write_to_bytes().unwrap(), ..Response::default() };
        let payload = response.write_to_bytes().unwrap();
        [&(payload.len() as u32).to_be_bytes()[..], &number.to_be_bytes(), &[kind, 0], &payload].concat()
    }

    fn stats(pids: u64) -> StatsResponse {
        StatsResponse { pids_current: pids, ..StatsResponse::default() }
    }

    async fn ask(client: &Client) -> Result<u64> {
        client.stats(&ContainerRequest::new()).await.map(|answer| answer.pids_current)
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_whatever_order_and_pieces_they_come() {
        let (client, mut guest, violations) = connected();
        let [first, second] = [(); 2].map(|()| {
            tokio::spawn({
                let client = client.clone();
                async move { ask(&client).await }
            })
        });
        let (one, other) = (next_call(&mut guest).await, next_call(&mut guest).await);
        let both = [frame(other, RESPONSE, &stats(2)), frame(one, RESPONSE, &stats(1))].concat();
        for byte in both {
            guest.write_all(&[byte]).await.unwrap();
        }
        let mut found = [first.await.unwrap().unwrap(), second.await.unwrap().unwrap()];
        found.sort_unstable();
        assert_eq!((found, violations.load(Ordering::Relaxed)), ([1, 2], 0));
        assert!(lock(&client.shared.calls).waiting.is_empty());
    }

    #[tokio::test]
    async fn an_agent_that_answers_what_was_given_up_lives() {
        let (client, mut guest, violations) = connected();
        for pids in 0..50 {
            let asked = tokio::time::timeout(Duration::from_millis(1), ask(&client)).await;
            assert!(asked.is_err());
            let late = next_call(&mut guest).await;
            guest.write_all(&frame(late, RESPONSE, &stats(pids))).await.unwrap();
        }
        let asked = tokio::spawn({
            let client = client.clone();
            async move { ask(&client).await }
        });
        let number = next_call(&mut guest).await;
        guest.write_all(&frame(number, RESPONSE, &stats(7))).await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), 7);
        let calls = lock(&client.shared.calls);
        assert_eq!((calls.waiting.len(), calls.given_up, violations.load(Ordering::Relaxed)), (0, 0, 0));
    }

    #[tokio::test]
    async fn numbers_of_calls_that_nobody_answers_are_bounded_and_others_wait_for_them() {
        let (client, mut guest, _) = connected();
        let mut first = 0;
        for _ in 0..MAX_GIVEN_UP {
            let mut asked = Box::pin(ask(&client));
            assert!(futures_now(&mut asked).await);
            drop(asked);
            let number = next_call(&mut guest).await;
            first = if first == 0 { number } else { first };
        }
        let asked = tokio::spawn({
            let client = client.clone();
            async move { ask(&client).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(lock(&client.shared.calls).waiting.len(), MAX_GIVEN_UP);
        guest.write_all(&frame(first, RESPONSE, &stats(0))).await.unwrap();
        let number = next_call(&mut guest).await;
        guest.write_all(&frame(number, RESPONSE, &stats(3))).await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), 3);
    }

    /// Whether a call waits for its answer, having been sent.
    async fn futures_now(call: &mut (impl Future<Output = Result<u64>> + Unpin)) -> bool {
        tokio::time::timeout(Duration::ZERO, call).await.is_err()
    }

    #[tokio::test]
    async fn what_no_agent_sends_ends_the_connection_and_all_calls() {
        let data = |number| frame(number, 3, &stats(1));
        let unknown = |number: u32| frame(number + 2, RESPONSE, &stats(1));
        let even = |_| frame(2, RESPONSE, &stats(1));
        let long = |number: u32| [&(MAX_LENGTH as u32 + 1).to_be_bytes()[..], &number.to_be_bytes(), &[RESPONSE, 0]].concat();
        let request = |number| frame(number, REQUEST, &Empty::new());
        let garbage = |number: u32| [&3_u32.to_be_bytes()[..], &number.to_be_bytes(), &[RESPONSE, 0], &[0xff; 3]].concat();
        // A header is enough: nobody waits for what is to follow.
        let begun = |number: u32| [&64_u32.to_be_bytes()[..], &(number + 2).to_be_bytes(), &[RESPONSE, 0]].concat();
        let tries: [&dyn Fn(u32) -> Vec<u8>; 7] = [&data, &unknown, &even, &long, &request, &garbage, &begun];
        for (index, send) in tries.into_iter().enumerate() {
            let (client, mut guest, violations) = connected();
            let asked = tokio::spawn({
                let client = client.clone();
                async move { ask(&client).await }
            });
            let number = next_call(&mut guest).await;
            guest.write_all(&send(number)).await.unwrap();
            assert!(tokio::time::timeout(Duration::from_secs(5), asked).await.unwrap().unwrap().is_err(), "{index}");
            assert!(ask(&client).await.is_err(), "{index}");
            assert_eq!(violations.load(Ordering::Relaxed), 1, "{index}");
        }
    }

    #[tokio::test]
    async fn an_answer_twice_is_one_too_many() {
        let (client, mut guest, violations) = connected();
        let asked = tokio::spawn({
            let client = client.clone();
            async move { ask(&client).await }
        });
        let number = next_call(&mut guest).await;
        guest.write_all(&frame(number, RESPONSE, &stats(1)).repeat(2)).await.unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), 1);
        assert!(ask(&client).await.is_err());
        assert_eq!(violations.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_no_violation() {
        let (client, guest, violations) = connected();
        drop(guest);
        assert!(ask(&client).await.is_err());
        assert_eq!(violations.load(Ordering::Relaxed), 0);
    }
}
