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
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::descriptors::Descriptors;

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
    fail: Fail,
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// A device that looks for another request for at most so long after the last one, and has so many workers for requests
    /// that wait: for disks, or for descriptors. `fail` ends the process, for the reason that it is given.
    pub fn new(
        fs: F,
        poll: Duration,
        workers: usize,
        descriptors: Arc<Descriptors>,
        fail: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        let fail: Fail = Arc::new(fail);
        let workers = Workers { count: workers, fail: Arc::clone(&fail), jobs: OnceLock::new() };
        Self { shared: Arc::new(Shared { server: Server::new(fs), fail }), memory: RwLock::default(), poll, workers, descriptors }
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
        let reader = Reader::new(&memory, chain.clone()).map_err(|error| format!("a request of the guest: {error}"))?;
        let writer = Writer::new(&memory, chain).map_err(|error| format!("room for an answer to the guest: {error}"))?;
        if takes_room_for_granted(kind) && writer.available_bytes() < size_of::<OutHeader>() {
            return Err("a request of the guest has no room for its answer".into());
        }
        let length = self.server.handle_message(reader, writer, None::<&mut vhost::vhost_user::Backend>);
        let length = length.map_err(|error| format!("a request of the guest: {error}"))?;
        let mut state = vring.get_mut();
        let give_back = |error| format!("give a request back to the guest: {error}");
        // An answer fits into a chain, whose length is a number of 32 bits.
        state.add_used(head, length as u32).map_err(give_back)?;
        if state.needs_notification().map_err(give_back)? {
            state.signal_used_queue().map_err(|error| format!("interrupt the guest: {error}"))?;
        }
        Ok(())
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
        VhostUserProtocolFeatures::REPLY_ACK
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

/// Whether a request waits for disks by its nature, so that others would wait for it.
fn may_wait(kind: Option<Opcode>) -> bool {
    matches!(kind, Some(Opcode::Fsync | Opcode::Fsyncdir | Opcode::Syncfs | Opcode::Fallocate | Opcode::CopyFileRange))
}

/// Whether a request has us open a file, or may have.
fn takes_descriptor(kind: Option<Opcode>) -> bool {
    use Opcode::{Create, Lookup, Mkdir, Mknod, Open, Opendir, Readdirplus, Symlink};
    matches!(kind, Some(Create | Lookup | Mkdir | Mknod | Open | Opendir | Readdirplus | Symlink))
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
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use virtiofsd::filesystem::{Context, FsOptions};
    use virtiofsd::fuse::Attr;
    use vm_memory::GuestAddress;

    use super::*;

    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const DATA: u64 = 0x4000;
    /// Room for each request, and from its middle on for its answer.
    const ROOM: u64 = 0x400;
    const SIZE: u16 = 16;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const FSYNC: u32 = 20;

    /// A file system that takes its time, and in which nothing is synced until it is let go.
    struct Slow {
        answers_in: Duration,
        let_go: Mutex<Receiver<()>>,
    }

    impl FileSystem for Slow {
        type Inode = u64;
        type Handle = u64;
        type DirIter = virtiofsd::read_dir::ReadDir<Vec<u8>>;

        fn init(&self, _: FsOptions) -> io::Result<FsOptions> {
            Ok(FsOptions::empty())
        }

        fn getattr(&self, _: Context, _: u64, _: Option<u64>) -> io::Result<(Attr, Duration)> {
            thread::sleep(self.answers_in);
            Ok((Attr::default(), Duration::ZERO))
        }

        fn fsync(&self, _: Context, _: u64, _: bool, _: u64) -> io::Result<()> {
            self.let_go.lock().unwrap().recv().map_err(io::Error::other)
        }
    }

    /// A guest's side of the queues, of which it uses one.
    struct Guest {
        memory: Memory,
        vrings: Vec<Vring>,
        offered: u16,
    }

    impl Guest {
        fn new(device: &Device<Slow>) -> Self {
            let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
            let vrings = [0, 0x8000].map(|start| {
                let vring = Vring::new(memory.clone(), SIZE).unwrap();
                vring.set_queue_size(SIZE);
                vring.set_queue_info(start + DESCRIPTORS, start + AVAILABLE, start + USED).unwrap();
                vring.set_queue_event_idx(true);
                vring.set_queue_ready(true);
                vring.set_enabled(true);
                vring
            });
            device.update_memory(memory.clone()).unwrap();
            Self { memory, vrings: vrings.into(), offered: 0 }
        }

        fn write<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
            self.memory.memory().write_obj(value, GuestAddress(address)).unwrap();
        }

        /// Offers a request without a kick.
        fn offer(&mut self, opcode: u32) {
            let (index, request) = (u64::from(self.offered), DATA + u64::from(self.offered) * ROOM);
            self.write([64_u32, opcode], request);
            // struct virtq_desc: address, length, flags (1: there is a next, 2: for the device to write), next.
            for (number, address, length, flags, next) in
                [(2 * index, request, 64_u32, 1_u16, 2 * index + 1), (2 * index + 1, request + ROOM / 2, 512, 2, 0)]
            {
                let descriptor = DESCRIPTORS + 16 * number;
                self.write(address, descriptor);
                self.write(length, descriptor + 8);
                self.write([flags, next as u16], descriptor + 12);
            }
            self.write(2 * self.offered, AVAILABLE + 4 + 2 * index);
            self.offered += 1;
            self.write(self.offered, AVAILABLE + 2);
        }

        /// Waits until so many are answered; the numbers of their requests, in order.
        fn answered(&self, count: u16) -> Vec<u32> {
            let begin = Instant::now();
            while self.memory.memory().read_obj::<u16>(GuestAddress(USED + 2)).unwrap() < count {
                assert!(begin.elapsed() < Duration::from_secs(20), "not {count} are answered");
                thread::sleep(Duration::from_millis(1));
            }
            let head = |index: u64| self.memory.memory().read_obj::<u32>(GuestAddress(USED + 4 + 8 * index)).unwrap();
            (0..u64::from(count)).map(|index| head(index) / 2).collect()
        }
    }

    /// A device, what lets its syncs go, and what it fails of.
    fn device(answers_in: Duration, workers: usize) -> (Device<Slow>, Sender<()>, Receiver<String>) {
        let (sender, let_go) = channel();
        let (reason, reasons) = channel();
        let fail = move |why| reason.send(why).unwrap();
        let descriptors = Arc::new(Descriptors::new(1000, || ()));
        let fs = Slow { answers_in, let_go: Mutex::new(let_go) };
        (Device::new(fs, Duration::from_secs(1), workers, descriptors, fail), sender, reasons)
    }

    fn kick(device: &Device<Slow>, guest: &Guest) {
        device.handle_event(0, EventSet::IN, &guest.vrings, 0).unwrap();
    }

    #[test]
    fn nobody_waits_for_what_waits_for_disks() {
        let (device, let_go, _reasons) = device(Duration::ZERO, 1);
        let mut guest = Guest::new(&device);
        guest.offer(FSYNC);
        guest.offer(GETATTR);
        kick(&device, &guest);
        assert_eq!(guest.answered(1), [1]);
        let_go.send(()).unwrap();
        assert_eq!(guest.answered(2), [1, 0]);
    }

    #[test]
    fn what_takes_a_descriptor_waits_until_there_is_room_and_the_rest_does_not() {
        let (device, _let_go, _reasons) = device(Duration::ZERO, 1);
        (0..900).for_each(|_| device.descriptors.take());
        let mut guest = Guest::new(&device);
        guest.offer(OPEN);
        guest.offer(GETATTR);
        kick(&device, &guest);
        assert_eq!(guest.answered(1), [1]);
        (0..100).for_each(|_| device.descriptors.give_back());
        assert_eq!(guest.answered(2), [1, 0]);
    }

    #[test]
    fn without_workers_requests_are_answered_in_order() {
        let (device, let_go, _reasons) = device(Duration::ZERO, 0);
        let mut guest = Guest::new(&device);
        guest.offer(FSYNC);
        guest.offer(GETATTR);
        let_go.send(()).unwrap();
        kick(&device, &guest);
        assert_eq!(guest.answered(2), [0, 1]);
    }

    #[test]
    fn a_request_that_comes_soon_needs_no_kick() {
        let (device, _let_go, _reasons) = device(Duration::from_millis(100), 0);
        let mut guest = Guest::new(&device);
        guest.offer(GETATTR);
        thread::scope(|scope| {
            let vrings = guest.vrings.clone();
            let kicked = scope.spawn(move || device.handle_event(0, EventSet::IN, &vrings, 0).unwrap());
            guest.answered(1);
            thread::sleep(Duration::from_millis(50));
            guest.offer(GETATTR);
            guest.answered(2);
            kicked.join().unwrap();
        });
    }

    #[test]
    fn a_broken_queue_ends_the_server_with_its_reason() {
        let (device, _let_go, reasons) = device(Duration::ZERO, 0);
        let mut guest = Guest::new(&device);
        guest.offer(GETATTR);
        guest.write(SIZE + 5, AVAILABLE + 2);
        kick(&device, &guest);
        let reason = reasons.recv().unwrap();
        assert!(reason.starts_with("the guest's queue: "), "{reason}");
    }

    #[test]
    fn a_request_without_room_for_its_answer_ends_the_server_with_its_reason() {
        const READ: u32 = 15;
        let (device, _let_go, reasons) = device(Duration::ZERO, 0);
        let mut guest = Guest::new(&device);
        guest.offer(READ);
        // The chain ends with the request.
        guest.write([0_u16, 0], DESCRIPTORS + 12);
        kick(&device, &guest);
        assert_eq!(reasons.recv().unwrap(), "a request of the guest has no room for its answer");
    }

    #[test]
    fn a_request_whose_header_begins_with_nothing_needs_room_for_its_answer_too() {
        let (device, _let_go, reasons) = device(Duration::ZERO, 0);
        let mut guest = Guest::new(&device);
        // The first descriptor is of no bytes, before DESTROY, and the header is in the second, with READDIR.
        guest.offer(38);
        guest.write(0_u32, DESCRIPTORS + 8);
        guest.write([64_u32, 28], DATA + ROOM / 2);
        guest.write([0_u16, 0], DESCRIPTORS + 16 + 12);
        kick(&device, &guest);
        assert_eq!(reasons.recv().unwrap(), "a request of the guest has no room for its answer");
    }

    #[test]
    fn a_queue_that_is_not_enabled_is_left_alone() {
        let (device, _let_go, _reasons) = device(Duration::ZERO, 0);
        let mut guest = Guest::new(&device);
        guest.offer(GETATTR);
        guest.vrings[0].set_enabled(false);
        kick(&device, &guest);
        assert_eq!(guest.memory.memory().read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 0);
    }
}
