//! The block device (virtio 1.2, 5.2): a disk or a file of the host, or several one behind the other, as a disk of the guest.
//!
//! A machine has a few empty places for disks, as it has for network interfaces (see `net`): a pod's
//! volumes are known only when its containers are made. A disk can be taken away again, and its
//! place be used for another one.
//!
//! ```text
//! empty -> attached (id 2) -> in service (the driver is ready)
//!   ^---------- any <---------'   `-> attached (the driver has reset it)
//! ```
//!
//! Each queue has a thread of its own, which reads and writes guest memory directly. By itself it answers one request after
//! the other, and the host reads ahead for those that wait; with a ring (`ring`) many are under way. Why not always:
//! docs/decisions/010.
#![expect(unsafe_code, reason = "a descriptor is borrowed from a type that does not lend it")]

pub mod backing;
pub mod request;
pub mod ring;
pub mod under_way;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caisson_host::control::Control;
use caisson_protocol::vmm::{Disk, Stopped};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use self::backing::{Backing, SECTOR};
use self::request::{MAX_RANGE, Request};
use self::ring::Ring;
use self::under_way::UnderWay;
use super::mmio::QUEUE_FEATURES;
use super::queue::ActiveQueue;
use super::{ActivateError, Activation, Interrupt, VirtioDevice, lock, read_config_bytes};
use crate::filters;
use crate::machine::stop;
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 2;
/// The most requests that are taken from a queue before one of them is started.
const AT_ONCE: usize = 64;
/// When the kernel is asked again to take requests that it did not take.
const RETRY: Duration = Duration::from_millis(10);
const QUEUE_SIZE: u16 = 256;
/// The most queues of a disk; a machine with fewer vCPUs has as many.
const MAX_QUEUES: u32 = 4;
/// Feature bits (5.2.3).
const F_SEG_MAX: u32 = 2;
const F_RO: u32 = 5;
const F_BLK_SIZE: u32 = 6;
const F_FLUSH: u32 = 9;
const F_MQ: u32 = 12;
const F_DISCARD: u32 = 13;
const F_WRITE_ZEROES: u32 = 14;
/// Buffers of a request beside its header and its outcome.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// A place for a disk, shared by the device's front and the thread that attaches.
#[derive(Clone, Default)]
pub struct Place {
    attached: Arc<Mutex<Option<Attached>>>,
    /// One for each queue, or none at all. The disk that is in the place uses them.
    rings: Vec<Arc<Mutex<Ring>>>,
}

/// The disk in a place.
struct Attached {
    disk: Disk,
    backing: Arc<Backing>,
    workers: Vec<Worker>,
    /// Of the driver that is ready.
    service: Option<Service>,
}

/// A thread that serves one queue at a time.
struct Worker {
    work: Sender<QueueServer>,
    /// Has it look whether it is to stop.
    wake: Arc<EventFd>,
}

/// A driver that is ready.
struct Service {
    interrupt: Arc<Interrupt>,
    /// Whether its queues are to be let go.
    stopping: Arc<AtomicBool>,
    /// Disconnected once a queue is let go.
    done: Vec<Receiver<()>>,
}

impl Place {
    /// Gives disks in this place a ring for each queue of a machine with at most so many vCPUs.
    ///
    /// # Errors
    /// When the host has none.
    pub fn add_rings(&mut self, max_vcpus: u32) -> io::Result<()> {
        self.rings = (0..queue_count(max_vcpus)).map(|_| Ring::new().map(Mutex::new).map(Arc::new)).collect::<io::Result<_>>()?;
        Ok(())
    }

    /// Takes them away again.
    pub fn remove_rings(&mut self) {
        self.rings.clear();
    }

    /// Makes a disk appear, with a thread for each queue.
    ///
    /// # Errors
    /// When one is there already, or a thread cannot be started.
    pub fn attach(&self, disk: Disk, files: Vec<File>, queues: usize, control: &Arc<Control>) -> io::Result<()> {
        let mut place = lock(&self.attached);
        if place.is_some() {
            return Err(io::Error::other("its place is taken"));
        }
        let backing = Arc::new(Backing::new(&disk, files, Arc::clone(control)));
        let workers = (0..queues)
            .map(|queue| Worker::start(&backing, disk.place, queue, self.rings.get(queue), control))
            .collect::<io::Result<_>>()?;
        *place = Some(Attached { disk, backing, workers, service: None });
        Ok(())
    }

    /// Takes the disk away, whatever its driver thinks of that; once no request is under way any more it
    /// is closed, and the shim hears of it.
    pub fn detach(&self) {
        let taken = lock(&self.attached).take();
        if let Some(mut attached) = taken {
            attached.stop();
            // A worker closes it: that may take as long as writing out what the host has cached of it.
            drop(attached.backing);
        }
    }

    /// Tells the driver that the disk has another size, in bytes.
    pub fn resize(&self, bytes: u64) {
        if let Some(attached) = &*lock(&self.attached) {
            attached.backing.resize(bytes);
            attached.service.iter().for_each(|service| service.interrupt.config());
        }
    }
}

impl Attached {
    /// Has the workers let go of the queues; what is returned is disconnected when they have.
    fn stop(&mut self) -> Vec<Receiver<()>> {
        let Some(service) = self.service.take() else { return Vec::new() };
        service.stopping.store(true, Ordering::Release);
        for worker in &self.workers {
            // A full counter says the same.
            let _ = worker.wake.write(1);
        }
        service.done
    }
}

impl Worker {
    fn start(
        backing: &Arc<Backing>,
        place: u32,
        queue: usize,
        ring: Option<&Arc<Mutex<Ring>>>,
        control: &Arc<Control>,
    ) -> io::Result<Self> {
        let (work, queues) = channel::<QueueServer>();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (woken, backing, ring, control) = (Arc::clone(&wake), Arc::clone(backing), ring.cloned(), Arc::clone(control));
        std::thread::Builder::new().name(format!("disk{place}.{queue}")).spawn(move || {
            if let Err(error) = filters::disk() {
                stop(&control, Stopped::Failed(format!("{:#}", anyhow::Error::from(error))));
            }
            // Whoever served the place before has let go of it: the place was free.
            let mut ring = ring.as_deref().map(lock);
            while let Ok(mut server) = queues.recv() {
                if let Err(error) = server.serve(&backing, &woken, ring.as_deref_mut()) {
                    stop(&control, Stopped::Failed(format!("the kernel does not take requests of disk {place}: {error}")));
                }
            }
        })?;
        Ok(Self { work, wake })
    }
}

/// How many queues a disk has.
fn queue_count(max_vcpus: u32) -> u32 {
    max_vcpus.clamp(1, MAX_QUEUES)
}

/// The device's front; each queue is served by a thread.
pub struct Blk {
    queue_sizes: Vec<u16>,
    place: Place,
}

impl Blk {
    /// The device of a place, for a machine with at most so many vCPUs.
    pub fn new(place: Place, max_vcpus: u32) -> Self {
        Self { queue_sizes: vec![QUEUE_SIZE; queue_count(max_vcpus) as usize], place }
    }
}

impl VirtioDevice for Blk {
    fn id(&self) -> u32 {
        if lock(&self.place.attached).is_some() { DEVICE_ID } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let read_only = lock(&self.place.attached).as_ref().is_some_and(|attached| attached.disk.read_only);
        let kind = if read_only { 1 << F_RO } else { 1 << F_DISCARD | 1 << F_WRITE_ZEROES };
        QUEUE_FEATURES | 1 << F_SEG_MAX | 1 << F_BLK_SIZE | 1 << F_FLUSH | 1 << F_MQ | kind
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        if let Some(attached) = &*lock(&self.place.attached) {
            let mut set = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
            // `struct virtio_blk_config` (5.2.4).
            set(0, &attached.backing.sectors().to_le_bytes());
            set(12, &SEG_MAX.to_le_bytes());
            set(20, &attached.disk.block_size.to_le_bytes());
            set(34, &(self.queue_sizes.len() as u16).to_le_bytes());
            // Of ranges to discard, and of those to clear: their most sectors and number, and for the
            // former their alignment, for the latter that they may be given back.
            set(36, &MAX_RANGE.to_le_bytes());
            set(40, &1u32.to_le_bytes());
            set(44, &(attached.disk.block_size / SECTOR as u32).to_le_bytes());
            set(48, &MAX_RANGE.to_le_bytes());
            set(52, &1u32.to_le_bytes());
            set(56, &[1]);
        }
        read_config_bytes(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        lock(&self.place.attached).as_ref().map_or(0, |attached| attached.backing.generation())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |reason: &str| ActivateError { device: "block", source: io::Error::other(reason) };
        let mut place = lock(&self.place.attached);
        let attached = place.as_mut().ok_or_else(|| failed("there is no disk"))?;
        let Activation { queues, memory, reach, interrupt, .. } = activation;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut done = Vec::new();
        for (queue, worker) in queues.into_iter().zip(&attached.workers) {
            let (alive, ended) = channel();
            let (memory, reach) = (memory.clone(), reach.clone());
            let (interrupt, stopping) = (Arc::clone(&interrupt), Arc::clone(&stopping));
            let server = QueueServer { queue, memory, reach, interrupt, stopping, _alive: alive };
            worker.work.send(server).map_err(|_| failed("its thread is gone"))?;
            done.push(ended);
        }
        attached.service = Some(Service { interrupt, stopping, done });
        Ok(())
    }

    fn reset(&mut self) -> bool {
        let done = lock(&self.place.attached).as_mut().map(Attached::stop).unwrap_or_default();
        // The driver may use its memory for something else when the reset is over (2.4.2). It waits for
        // requests that are under way, as it would for a disk, and nobody else does.
        done.into_iter().for_each(|done| {
            // It never sends: it hangs up.
            let _ = done.recv();
        });
        true
    }
}

/// A queue in service.
struct QueueServer {
    queue: ActiveQueue,
    memory: GuestMemory,
    /// Where what is read or written may lie besides.
    reach: Option<GuestMemory>,
    interrupt: Arc<Interrupt>,
    stopping: Arc<AtomicBool>,
    _alive: Sender<()>,
}

impl QueueServer {
    /// Answers requests until the queue is to be let go, of which `woken` tells, and none is under way.
    ///
    /// # Errors
    /// When the kernel takes none by the ring.
    fn serve(&mut self, backing: &Backing, woken: &EventFd, ring: Option<&mut Ring>) -> io::Result<()> {
        let (memory, reach) = (self.memory.clone(), self.reach.clone());
        let mut under_way = UnderWay::new(ring);
        let mut waiting = VecDeque::new();
        loop {
            while let Some((head, written)) = under_way.next_ended(backing) {
                self.give_back(head, written);
            }
            let stopping = self.stopping.load(Ordering::Acquire);
            if stopping && under_way.is_empty() {
                return Ok(());
            }
            let wait = backing.wait();
            let takes_more = !stopping && wait.is_none() && under_way.has_room();
            if takes_more && waiting.is_empty() {
                waiting = self.take(&memory, reach.as_ref());
                if under_way.is_at_once() {
                    // The host's device has all of them all the same.
                    waiting.iter().skip(1).for_each(|(_, request)| request.expect(backing));
                }
            }
            if takes_more && let Some((head, request)) = waiting.pop_front() {
                if let Some(written) = under_way.start(backing, head, request) {
                    self.give_back(head, written);
                }
                continue;
            }
            let retry = match under_way.submit() {
                // Much of it is answered at once.
                Ok(true) => continue,
                Ok(false) => None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(RETRY),
                Err(error) => return Err(error),
            };
            let kick = takes_more.then(|| self.queue.kick().as_raw_fd());
            // Rounded up, so that the time has come when the wait is over.
            let wait = wait.filter(|_| !stopping).map(|wait| wait + Duration::from_millis(1));
            await_ready(
                [Some(woken.as_raw_fd()), kick, under_way.ended()],
                retry.or(wait).map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)),
            );
            if takes_more {
                self.queue.clear_kick();
            }
            // Of an earlier driver, perhaps.
            let _ = woken.read();
        }
    }

    /// What the driver has made available, up to a bound.
    fn take<'m>(&mut self, memory: &'m GuestMemory, reach: Option<&'m GuestMemory>) -> VecDeque<(u16, Request<'m>)> {
        let mut taken = VecDeque::new();
        for _ in 0..AT_ONCE {
            // It is to notify when it has nothing for us.
            let chain = if taken.is_empty() { self.queue.next(memory) } else { self.queue.take(memory) };
            let Some(chain) = chain else { return taken };
            let head = chain.head_index();
            match Request::read(memory, reach, chain) {
                Some(request) => taken.push_back((head, request)),
                None => self.give_back(head, 0),
            }
        }
        // There may be more, of which nobody tells us when all of these could not be read.
        let _ = self.queue.kick().write(1);
        taken
    }

    fn give_back(&mut self, head: u16, written: u32) {
        self.queue.give_back(&self.memory, head, written);
        self.queue.signal(&self.memory, &self.interrupt);
    }
}

/// Waits until one of these is readable, or for so long, or until a signal comes: who calls looks again.
fn await_ready(events: [Option<RawFd>; 3], timeout: PollTimeout) {
    // SAFETY: they outlive the call.
    let borrow = |event: RawFd| unsafe { BorrowedFd::borrow_raw(event) };
    let mut ready: Vec<PollFd<'_>> = events.into_iter().flatten().map(|event| PollFd::new(borrow(event), PollFlags::POLLIN)).collect();
    let _ = poll(&mut ready, timeout);
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use caisson_protocol::vmm::{Event, RateLimit};
    use vm_memory::{Bytes, GuestAddress};

    use super::request::tests::{DATA, HEADER_AT, STATUS, WRITE, disk, file, queue, queue_of};
    use super::*;

    #[test]
    fn a_limit_has_requests_wait_and_a_disk_that_goes_has_not() {
        let (_shim, control) = Control::pair().unwrap();
        let control = Arc::new(control);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let place = Place::default();
        let mut device = Blk::new(place.clone(), 1);
        let limit = RateLimit { operations: 1, ..RateLimit::default() };
        place.attach(Disk { limit, ..disk(false) }, vec![file()], 1, &control).unwrap();
        let backing = Arc::clone(&lock(&place.attached).as_ref().unwrap().backing);
        let queue = queue(&memory, &[(HEADER_AT, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        queue.kick().write(1).unwrap();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        device.activate(Activation { features: 0, queues: vec![queue], memory: memory.clone(), reach: None, interrupt }).unwrap();
        let held = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            backing.wait().is_some()
        });
        let wait = backing.wait().unwrap();
        assert!(held && wait > Duration::from_millis(100) && wait <= Duration::from_secs(1), "{wait:?}");
        let begin = Instant::now();
        assert!(device.reset());
        assert!(begin.elapsed() < wait, "the reset waited for the limit");
    }

    /// One without rings and one with.
    fn places() -> [Place; 2] {
        let mut with_rings = Place::default();
        with_rings.add_rings(1).unwrap();
        [Place::default(), with_rings]
    }

    #[test]
    fn requests_behind_many_that_cannot_be_answered_are() {
        const STATUSES: [u64; 3] = [STATUS, STATUS + 1, STATUS + 2];
        const FLUSH_AT: u64 = HEADER_AT + 0x100;
        for place in places() {
            let (_shim, control) = Control::pair().unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let mut device = Blk::new(place.clone(), 1);
            place.attach(disk(false), vec![file()], 1, &Arc::new(control)).unwrap();
            let mut chains: Vec<&[(u64, u32, u16)]> = vec![&[(HEADER_AT, 16, 0)]; AT_ONCE + 1];
            let [first, second, third] = STATUSES.map(|status| (status, 1, WRITE));
            let read = |status, data| [(HEADER_AT, 16, 0), (data, 512, WRITE), status];
            let (first, flush, third) = (read(first, DATA), [(FLUSH_AT, 16, 0), second], read(third, DATA + 512));
            chains.extend([&first[..], &flush, &third]);
            let queue = queue_of(&memory, &chains);
            memory.write_slice(&4u32.to_le_bytes(), GuestAddress(FLUSH_AT)).unwrap();
            memory.write_slice(&[0xff; 3], GuestAddress(STATUS)).unwrap();
            queue.kick().write(1).unwrap();
            let interrupt = Arc::new(Interrupt::new().unwrap());
            device.activate(Activation { features: 0, queues: vec![queue], memory: memory.clone(), reach: None, interrupt }).unwrap();
            let answered = (0..500).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                STATUSES.iter().all(|status| memory.read_obj::<u8>(GuestAddress(*status)).unwrap() == 0)
            });
            let mut data = [0; 1024];
            memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
            assert!(answered && device.reset() && data == [1; 1024]);
        }
    }

    #[test]
    fn a_disk_serves_one_driver_after_another_until_it_is_taken_away() {
        for place in places() {
            serves_one_driver_after_another(&place);
        }
    }

    fn serves_one_driver_after_another(place: &Place) {
        let (shim, control) = Control::pair().unwrap();
        let control = Arc::new(control);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let mut device = Blk::new(place.clone(), 1);
        assert_eq!(device.id(), 0);
        place.attach(disk(false), vec![file()], 1, &control).unwrap();
        assert!(place.attach(disk(false), vec![file()], 1, &control).is_err());
        assert_eq!(device.id(), DEVICE_ID);
        for _ in 0..2 {
            // All zeroes: to read from the first sector.
            let queue = queue(&memory, &[(HEADER_AT, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
            queue.kick().write(1).unwrap();
            memory.write_slice(&[0xff], GuestAddress(STATUS)).unwrap();
            let activation =
                Activation { features: 0, queues: vec![queue], memory: memory.clone(), reach: None, interrupt: Arc::clone(&interrupt) };
            device.activate(activation).unwrap();
            let answered = (0..500).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap() == 0
            });
            assert!(answered && device.reset());
        }
        place.resize(1 << 20);
        let mut sectors = [0; 8];
        device.read_config(0, &mut sectors);
        assert_eq!((u64::from_le_bytes(sectors), device.config_generation()), (2048, 1));
        place.detach();
        assert_eq!(device.id(), 0);
        let (event, _) = shim.receive::<Event>(true).unwrap().unwrap();
        assert_eq!(event, Event::DiskDetached { place: 3 });
    }
}
