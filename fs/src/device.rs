//! The virtio-fs device behind its vhost-user front (virtio 1.2, 5.11): takes requests off the queues, has the file
//! system answer them, and gives them back.
//!
//! ```text
//! kick --> look at both queues --> answer in place ----------------> look again, for a while --> sleep
//!                             \--> what may wait --> a worker answers
//! ```
//!
//! A guest's program mostly makes its requests one after another, and what one costs is waking this thread, more than the
//! work. So the thread looks for the next one for a moment before it sleeps; the guest need not wake it then. How long pays
//! depends on the machine, and shows in how long it takes to answer: a few times that, so that looking never costs more
//! than a few times what serving does.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use vhost::vhost_user::Backend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemory as _, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::dax::Dax;
use crate::descriptors::Descriptors;
use crate::request::{self, Make};

/// Requests of high priority (forget, interrupt), and others.
const QUEUES: usize = 2;
const LARGEST_QUEUE: usize = 1024;
/// Looking for the next request goes on for so many times what the last ones took to answer.
const LOOKS: u32 = 4;
/// Feature bits (virtio 1.2, 6).
const VIRTIO_F_INDIRECT_DESC: u64 = 28;
const VIRTIO_F_EVENT_IDX: u64 = 29;
const VIRTIO_F_VERSION_1: u64 = 32;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;
type Loaded = GuestMemoryLoadGuard<GuestMemoryMmap<BitmapMmapRegion>>;
type Vring = VringMutex<Memory>;
/// Ends the process, for the reason that it is given.
type Fail = Arc<dyn Fn(String) + Send + Sync>;
/// A request that waits for a worker; it hears whether it is one that runs it.
type Job = Box<dyn FnOnce(bool) + Send>;

/// The device.
pub struct Device<F: FileSystem + Send + Sync + 'static> {
    shared: Arc<Shared<F>>,
    memory: RwLock<Option<Memory>>,
    poll: Duration,
    workers: Workers,
    descriptors: Arc<Descriptors>,
}

/// What workers need as well.
struct Shared<F: FileSystem + Sync> {
    server: Server<F>,
    make: Make,
    /// Of a guest that has a window for files.
    dax: Option<Dax>,
    fail: Fail,
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// A device that looks for another request for at most so long after the last one, and has so many workers for requests
    /// that wait: for disks, or for descriptors. `make` makes files without a name, `dax` serves what the guest maps, where it
    /// may. `fail` ends the process, for the reason that it is given.
    pub fn new(
        fs: F,
        make: Make,
        dax: Option<Dax>,
        poll: Duration,
        workers: usize,
        descriptors: Arc<Descriptors>,
        fail: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        let fail: Fail = Arc::new(fail);
        let workers = Workers { count: workers, fail: Arc::clone(&fail), jobs: OnceLock::new() };
        Self {
            shared: Arc::new(Shared { server: Server::new(fs), make, dax, fail }),
            memory: RwLock::default(),
            poll,
            workers,
            descriptors,
        }
    }

    /// Serves the queues until nothing has come for a while, and the guest knows that it has to wake us.
    fn serve(&self, memory: &Memory, vrings: &[Vring]) -> Result<(), String> {
        let mut last = Instant::now();
        let mut patience = Duration::ZERO;
        loop {
            let begin = Instant::now();
            let mut served = 0;
            for vring in vrings {
                served += self.serve_queue(memory, vring)?;
            }
            if served > 0 {
                last = Instant::now();
                let pays = (last - begin) / served * LOOKS;
                patience = self.poll.min(if patience.is_zero() { pays } else { (3 * patience + pays) / 4 });
            } else if last.elapsed() < patience {
                // Whoever else is to run on this processor runs.
                thread::yield_now();
            } else if !is_awaited(vrings)? {
                return Ok(());
            }
        }
    }

    /// Answers what is in a queue; how much there was.
    fn serve_queue(&self, memory: &Memory, vring: &Vring) -> Result<u32, String> {
        let mut served = 0;
        while let Some(chain) = next(memory, vring)? {
            served += 1;
            let (shared, vring, memory) = (Arc::clone(&self.shared), vring.clone(), memory.clone());
            let kind = kind(&memory.memory(), &chain);
            let is_short = takes_descriptor(kind) && self.descriptors.are_short();
            if is_short || may_wait(kind) {
                let (descriptors, begin) = (Arc::clone(&self.descriptors), Instant::now());
                self.workers.give(Box::new(move |by_worker| {
                    // What the guest forgets is heard of here meanwhile.
                    if is_short && by_worker {
                        descriptors.wait(begin);
                    }
                    shared.answer_or_fail(&memory, &vring, chain, kind);
                }));
            } else {
                shared.answer(&memory, &vring, chain, kind)?;
            }
        }
        Ok(served)
    }
}

impl<F: FileSystem + Sync> Shared<F> {
    fn answer(&self, memory: &Memory, vring: &Vring, chain: DescriptorChain<Loaded>, kind: Option<Opcode>) -> Result<(), String> {
        let (head, memory) = (chain.head_index(), memory.memory());
        let length = match &self.dax {
            // Its kernel may name what it has mapped as a buffer: that is memory of the monitor's, not ours.
            Some(_) if !lies_in(&memory, &chain) => refuse(&memory, &chain)?,
            dax => self.length_of_answer(&memory, chain, kind, dax.as_ref())?,
        };
        let mut state = vring.get_mut();
        let give_back = |error| format!("give a request back to the guest: {error}");
        // An answer fits into a chain, whose length is a number of 32 bits.
        state.add_used(head, length as u32).map_err(give_back)?;
        if state.needs_notification().map_err(give_back)? {
            state.signal_used_queue().map_err(|error| format!("interrupt the guest: {error}"))?;
        }
        Ok(())
    }

    fn length_of_answer(
        &self,
        memory: &Loaded,
        chain: DescriptorChain<Loaded>,
        kind: Option<Opcode>,
        dax: Option<&Dax>,
    ) -> Result<usize, String> {
        let reader = Reader::new(memory, chain.clone()).map_err(|error| format!("a request of the guest: {error}"))?;
        let writer = Writer::new(memory, chain).map_err(|error| format!("room for an answer to the guest: {error}"))?;
        if takes_room_for_granted(kind) && writer.available_bytes() < size_of::<OutHeader>() {
            return Err("a request of the guest has no room for its answer".into());
        }
        let answered = match (kind, dax.filter(|_| Dax::serves(kind))) {
            (_, Some(dax)) => dax.answer(reader, writer).map_err(|error| error.to_string()),
            (Some(Opcode::TmpFile), _) => request::tmpfile(&self.make, reader, writer).map_err(|error| error.to_string()),
            _ => self.server.handle_message(reader, writer, None::<&mut Backend>).map_err(|error| error.to_string()),
        };
        answered.map_err(|error| format!("a request of the guest: {error}"))
    }

    fn answer_or_fail(&self, memory: &Memory, vring: &Vring, chain: DescriptorChain<Loaded>, kind: Option<Opcode>) {
        if let Err(reason) = self.answer(memory, vring, chain, kind) {
            (self.fail)(reason);
        }
    }
}

impl<F: FileSystem + Send + Sync + 'static> VhostUserBackend for Device<F> {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        LARGEST_QUEUE
    }

    fn features(&self) -> u64 {
        let virtio = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX;
        virtio | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let window = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::SHMEM;
        let none = VhostUserProtocolFeatures::empty();
        VhostUserProtocolFeatures::REPLY_ACK | if self.shared.dax.is_some() { window } else { none }
    }

    fn set_backend_req_fd(&self, monitor: Backend) {
        if let Some(dax) = &self.shared.dax {
            dax.connect(monitor);
        }
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know.
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn handle_event(&self, _queue: u16, _events: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner).clone();
        let served = memory.ok_or_else(|| "the guest has no memory".to_owned()).and_then(|memory| self.serve(&memory, vrings));
        if let Err(reason) = served {
            (self.shared.fail)(reason);
        }
        Ok(())
    }
}

/// The next request of a queue that is in use.
fn next(memory: &Memory, vring: &Vring) -> Result<Option<DescriptorChain<Loaded>>, String> {
    let mut state = vring.get_mut();
    if !state.is_enabled() {
        return Ok(None);
    }
    let mut chains = state.get_queue_mut().iter(memory.memory()).map_err(|error| format!("the guest's queue: {error}"))?;
    Ok(chains.next())
}

/// Has the guest wake us for the next request; whether one has come already.
fn is_awaited(vrings: &[Vring]) -> Result<bool, String> {
    let mut awaited = false;
    for vring in vrings {
        let mut state = vring.get_mut();
        if state.is_enabled() {
            awaited |= state.enable_notification().map_err(|error| format!("the guest's queue: {error}"))?;
        }
    }
    Ok(awaited)
}

/// What a request says that it is; nothing when its first descriptor does not hold its header, as drivers have it.
///
/// The header is read from the guest's memory once more when the request is answered; a guest that has changed it by then
/// has it answered by somebody else than meant, or ends the server.
fn kind(memory: &Loaded, chain: &DescriptorChain<Loaded>) -> Option<Opcode> {
    let first = chain.clone().next().filter(|first| first.len() as usize >= size_of::<InHeader>())?;
    let [_length, opcode] = memory.read_obj::<[u32; 2]>(first.addr()).ok()?;
    Opcode::try_from(opcode).ok()
}

/// Whether all buffers of a request are in the memory that we have.
fn lies_in(memory: &Loaded, chain: &DescriptorChain<Loaded>) -> bool {
    chain.clone().all(|buffer| memory.check_range(buffer.addr(), buffer.len() as usize))
}

/// Answers a request that its buffers lie where they cannot; returns the length of the answer.
fn refuse(memory: &Loaded, chain: &DescriptorChain<Loaded>) -> Result<usize, String> {
    let length = size_of::<OutHeader>();
    let header = chain.clone().next().and_then(|first| memory.read_obj::<InHeader>(first.addr()).ok());
    let room = chain.clone().find(|buffer| buffer.is_write_only() && buffer.len() as usize >= length);
    let (Some(header), Some(room)) = (header, room) else { return Err("a request of the guest lies outside of its memory".into()) };
    let answer = OutHeader { len: length as u32, error: -libc::EFAULT, unique: header.unique };
    memory.write_obj(answer, room.addr()).map_err(|error| format!("an answer to the guest: {error}"))?;
    Ok(length)
}

/// Whether a request waits for disks by its nature, so that others would wait for it.
fn may_wait(kind: Option<Opcode>) -> bool {
    matches!(kind, Some(Opcode::Fsync | Opcode::Fsyncdir | Opcode::Syncfs | Opcode::Fallocate | Opcode::CopyFileRange))
}

/// Whether a request has us open a file, or may have.
fn takes_descriptor(kind: Option<Opcode>) -> bool {
    use Opcode::{Create, Link, Lookup, Mkdir, Mknod, Open, Opendir, Readdirplus, Symlink, TmpFile};
    matches!(kind, Some(Create | Link | Lookup | Mkdir | Mknod | Open | Opendir | Readdirplus | Symlink | TmpFile))
}

/// Whether virtiofsd's server may panic when a request has no room for as much as an answer's header.
fn takes_room_for_granted(kind: Option<Opcode>) -> bool {
    matches!(kind, None | Some(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus))
}

/// Threads for requests that wait.
struct Workers {
    count: usize,
    fail: Fail,
    /// To those that run; they are started for the first that waits.
    jobs: OnceLock<Option<SyncSender<Job>>>,
}

impl Workers {
    /// Has a worker do something, or does it at once when there is none, or they have enough to do.
    fn give(&self, job: Job) {
        let Some(jobs) = self.jobs.get_or_init(|| self.start()) else { return job(false) };
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = jobs.try_send(job) {
            job(false);
        }
    }

    fn start(&self) -> Option<SyncSender<Job>> {
        let (sender, receiver) = sync_channel::<Job>(LARGEST_QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        let mut started = false;
        for _ in 0..self.count {
            let (receiver, fail) = (Arc::clone(&receiver), Arc::clone(&self.fail));
            let run = move || match unshare(CloneFlags::CLONE_FS) {
                // A request may come to another kind while it waits here, and need a current folder or a mask of its own.
                Ok(()) => work(&receiver),
                Err(error) => fail(format!("give a worker a folder of its own: {error}")),
            };
            started |= thread::Builder::new().name("worker".into()).spawn(run).is_ok();
        }
        started.then_some(sender)
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        job(true);
    }
}

#[cfg(test)]
mod tests;
