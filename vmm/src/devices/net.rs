//! The network device (virtio 1.2, 5.1): Ethernet frames between the guest and a wire of the host.
//!
//! A pod's interfaces are known only when containerd's CNI plugins have made them, which may be
//! after the boot. So each machine has a few empty places for them: until an interface is attached
//! the device reads as id 0, the transport's placeholder (4.2.2), and the guest has nothing there.
//! Then the agent makes its kernel look again, and finds a device with the interface's own address.
//!
//! ```text
//! empty -> attached (id 1, a wire waits) -> in service (the driver is ready)
//!   ^------------- detached <---------------'- reset by the driver
//! ```

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use caisson_protocol::vmm::{NIC_HEADER, Nic, RateLimit};
use virtio_queue::{QueueT, Writer};
use vmm_sys_util::eventfd::EventFd;

use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, Chain};
use super::rate::Way;
use super::wire::Wire;
use super::{ActivateError, Activation, Interrupt, VirtioDevice, lock, read_config_bytes};
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 1;
/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Feature bits (5.1.3).
const F_CSUM: u32 = 0;
pub(super) const F_GUEST_CSUM: u32 = 1;
const F_MAC: u32 = 5;
pub(super) const F_GUEST_TSO4: u32 = 7;
pub(super) const F_GUEST_TSO6: u32 = 8;
pub(super) const F_GUEST_ECN: u32 = 9;
const F_HOST_TSO4: u32 = 11;
const F_HOST_TSO6: u32 = 12;
const F_HOST_ECN: u32 = 13;
const F_MRG_RXBUF: u32 = 15;
/// What each wire can do, and what one can whose frames have a header.
const FEATURES: u64 = QUEUE_FEATURES | 1 << F_MAC | 1 << F_MRG_RXBUF;
const OFFLOADS: u64 = 1 << F_CSUM
    | 1 << F_GUEST_CSUM
    | 1 << F_GUEST_TSO4
    | 1 << F_GUEST_TSO6
    | 1 << F_GUEST_ECN
    | 1 << F_HOST_TSO4
    | 1 << F_HOST_TSO6
    | 1 << F_HOST_ECN;

/// Where the header holds the number of buffers.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// The largest frame: an IP packet of 64 KiB behind an Ethernet header with two VLAN tags.
pub const MAX_FRAME: usize = NIC_HEADER + 14 + 2 * 4 + (64 << 10);
/// Frames each way before the thread looks after its other work.
const BUDGET: usize = 64;

/// A place for an interface, shared by the device's front and the thread that attaches.
#[derive(Clone, Default)]
pub struct Place(Arc<Mutex<Option<Nic>>>);

impl Place {
    /// Makes the device appear; false when one is there already.
    pub fn attach(&self, nic: Nic) -> bool {
        let mut place = lock(&self.0);
        let empty = place.is_none();
        if empty {
            *place = Some(nic);
        }
        empty
    }

    /// Makes the device disappear.
    pub fn detach(&self) {
        lock(&self.0).take();
    }
}

/// The device's front; the device thread serves its queues.
pub struct Net {
    index: usize,
    place: Place,
    thread: Commands,
}

impl Net {
    /// The device of a place, by its number.
    pub fn new(index: usize, place: Place, thread: Commands) -> Self {
        Self { index, place, thread }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        if lock(&self.place.0).is_some() { DEVICE_ID } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let stream = lock(&self.place.0).is_some_and(|nic| nic.stream);
        if stream { FEATURES } else { FEATURES | OFFLOADS }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Of what it could say (5.1.4) the address comes first.
        let mac = lock(&self.place.0).map_or([0; 6], |nic| nic.mac);
        read_config_bytes(&mac, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let command = Command::Activate(Server::Net(self.index), activation);
        self.thread.send(command).map_err(|source| ActivateError { device: "net", source })
    }

    /// The interface is gone then, with its wire.
    fn reset(&mut self) -> bool {
        self.place.detach();
        let (done, gone) = mpsc::channel();
        // A thread that is gone serves nothing any more.
        let _ = self.thread.send(Command::DetachNic(self.index, Some(done)));
        let _ = gone.recv();
        true
    }
}

/// The queues of an interface in service, and its wire.
pub struct NetServer {
    rx: ActiveQueue,
    tx: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    wire: Wire,
    outgoing: Box<[u8]>,
    incoming: Box<[u8]>,
    /// Bytes in `incoming` that the guest had no room for.
    waiting: usize,
    /// The wire was taken away.
    gone: bool,
    sending: Way,
    receiving: Way,
    /// Heads of the chains of one frame, with the bytes in each; kept for its allocation.
    used: Vec<(u16, u32)>,
}

impl NetServer {
    /// Takes the queues over.
    ///
    /// # Errors
    /// When the activation does not hold two of them.
    pub fn new(activation: Activation, wire: Wire, limit: RateLimit) -> io::Result<Self> {
        let Ok([rx, tx]) = <[ActiveQueue; 2]>::try_from(activation.queues) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        Ok(Self {
            rx,
            tx,
            memory: activation.memory,
            interrupt: activation.interrupt,
            wire,
            outgoing: vec![0; MAX_FRAME].into(),
            incoming: vec![0; MAX_FRAME].into(),
            waiting: 0,
            gone: false,
            sending: Way::new(limit),
            receiving: Way::new(limit),
            used: Vec::new(),
        })
    }

    /// Readable when the guest has room for frames.
    pub fn rx_kick(&self) -> &EventFd {
        self.rx.kick()
    }

    /// Readable when the guest has sent frames.
    pub fn tx_kick(&self) -> &EventFd {
        self.tx.kick()
    }

    /// Readable when the host has sent frames.
    pub fn wire(&self) -> &File {
        self.wire.file()
    }

    /// Whether the wire is to be watched: the guest has room, no limit holds frames back, and the interface is still
    /// there. A wire that is gone is ready for ever.
    pub fn wants_frames(&self) -> bool {
        self.waiting == 0 && !self.gone && self.receiving.held().is_none()
    }

    /// When frames that a limit holds back may pass: those of the guest, those of the host.
    pub fn held(&self) -> [Option<Instant>; 2] {
        [self.sending.held(), self.receiving.held()]
    }

    /// Sends what the guest has made available, at most [`BUDGET`] frames; true when there is more that may pass.
    pub fn transmit(&mut self) -> bool {
        self.tx.clear_kick();
        let mut more = true;
        let now = Instant::now();
        for _ in 0..BUDGET {
            if !self.sending.is_open(now) {
                more = false;
                break;
            }
            let Some(chain) = self.tx.next(&self.memory) else {
                more = false;
                break;
            };
            let head = chain.head_index();
            if let Some(length) = copy_out(&self.memory, chain, &mut self.outgoing) {
                self.wire.send(&mut self.outgoing[..length]);
                self.sending.pay(length - NIC_HEADER);
            }
            self.tx.give_back(&self.memory, head, 0);
        }
        self.tx.signal(&self.memory, &self.interrupt);
        more
    }

    /// The guest has made room.
    pub fn room(&mut self) {
        self.rx.clear_kick();
    }

    /// Gives the guest what the host has sent, at most [`BUDGET`] frames; true when there is more of which the wire does not
    /// tell.
    pub fn receive(&mut self) -> bool {
        let now = Instant::now();
        for _ in 0..BUDGET {
            if self.waiting == 0 {
                if !self.receiving.is_open(now) {
                    break;
                }
                match self.wire.receive(&mut self.incoming) {
                    Ok(length) => self.waiting = length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.gone = true;
                        break;
                    }
                }
            }
            if !self.deliver() {
                break;
            }
            self.receiving.pay(self.waiting - NIC_HEADER);
            self.waiting = 0;
        }
        self.rx.signal(&self.memory, &self.interrupt);
        self.wants_frames() && self.wire.has_frame()
    }

    /// Puts the waiting frame into as many chains as it needs; false when there are too few.
    fn deliver(&mut self) -> bool {
        let mut buffers = Vec::new();
        let mut room = 0;
        // First all that it takes, so that its header can say in how many buffers it is. What does not fit into
        // a whole queue of them is cut off: a driver could go on with such buffers for ever.
        while room < self.waiting && buffers.len() < usize::from(self.rx.layout().size()) {
            let Some(chain) = self.rx.next(&self.memory) else {
                buffers.iter().for_each(|_| self.rx.put_back());
                return false;
            };
            // A chain that cannot be written to is used with nothing in it.
            let (head, writer) = (chain.head_index(), chain.writer(&self.memory).ok());
            room += writer.as_ref().map_or(0, Writer::available_bytes);
            buffers.push((head, writer));
        }
        let count = u16::try_from(buffers.len()).unwrap_or(u16::MAX);
        self.incoming[NUM_BUFFERS].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.incoming[..self.waiting];
        self.used.clear();
        for (head, writer) in buffers {
            let written = writer.and_then(|mut writer| writer.write(rest).ok()).unwrap_or(0);
            rest = &rest[written..];
            self.used.push((head, written as u32));
        }
        self.rx.give_back_together(&self.memory, &self.used);
        true
    }
}

/// Copies a frame out of guest memory, its header first; `None` when it is too short or too long.
fn copy_out(memory: &GuestMemory, chain: Chain<'_>, frame: &mut [u8]) -> Option<usize> {
    let mut reader = chain.reader(memory).ok()?;
    let length = reader.available_bytes();
    if !(NIC_HEADER..=frame.len()).contains(&length) {
        return None;
    }
    reader.read_exact(&mut frame[..length]).ok()?;
    Some(length)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const WRITE: u16 = 2;
    const SIZE: u16 = 16;
    const RX: u64 = 0x1000;
    const TX: u64 = 0x4000;
    const BUFFERS: u64 = 0x10000;

    /// A driver's side of both queues, and the other end of the tap.
    struct Driver {
        memory: GuestMemory,
        host: UnixDatagram,
        server: NetServer,
    }

    impl Driver {
        /// With these descriptors on offer, each a chain of its own.
        fn new(rx: &[(u64, u32, u16)], tx: &[(u64, u32, u16)]) -> Self {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let queue = |start: u64, chains: &[(u64, u32, u16)]| {
                let mock = MockSplitQueue::create(&memory, GuestAddress(start), SIZE);
                let descriptor = |(address, length, flags): &(u64, u32, u16)| Descriptor::new(*address, *length, *flags, 0);
                let descriptors: Vec<RawDescriptor> = chains.iter().map(|chain| descriptor(chain).into()).collect();
                mock.add_desc_chains(&descriptors, 0).unwrap();
                ActiveQueue::new(mock.create_queue().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap())
            };
            let queues = vec![queue(RX, rx), queue(TX, tx)];
            let (host, tap) = UnixDatagram::pair().unwrap();
            tap.set_nonblocking(true).unwrap();
            host.set_nonblocking(true).unwrap();
            let interrupt = Arc::new(Interrupt::new().unwrap());
            let activation = Activation { features: FEATURES | OFFLOADS, queues, memory: memory.clone(), interrupt };
            let server = NetServer::new(activation, Wire::Tap(File::from(OwnedFd::from(tap))), RateLimit::default()).unwrap();
            Self { memory, host, server }
        }

        /// With a limit of so many frames a second.
        fn limit(mut self, operations: u64) -> Self {
            let limit = RateLimit { operations, ..RateLimit::default() };
            (self.server.sending, self.server.receiving) = (Way::new(limit), Way::new(limit));
            self
        }

        /// Chains that the driver got back.
        fn used(&self, queue: &ActiveQueue) -> u16 {
            self.memory.read_obj(GuestAddress(queue.layout().used_ring() + 2)).unwrap()
        }
    }

    #[test]
    fn what_the_guest_sends_reaches_the_wire() {
        let mut driver = Driver::new(&[], &[(BUFFERS, 20, 0), (BUFFERS, 4, 0), (BUFFERS, 30, 0)]);
        driver.memory.write_slice(&[7; 30], GuestAddress(BUFFERS)).unwrap();
        assert!(!driver.server.transmit());
        let mut frame = [0; 64];
        // The second has no room for a header and is lost.
        assert_eq!((driver.host.recv(&mut frame).unwrap(), driver.host.recv(&mut frame).unwrap()), (20, 30));
        assert!(driver.host.recv(&mut frame).is_err());
        assert_eq!(driver.used(&driver.server.tx), 3);
    }

    #[test]
    fn a_frame_fills_as_many_buffers_as_it_needs() {
        let mut driver = Driver::new(&[(BUFFERS, 16, WRITE), (BUFFERS + 16, 16, WRITE), (BUFFERS + 32, 16, WRITE)], &[]);
        let frame: Vec<u8> = (0..40).collect();
        driver.host.send(&frame).unwrap();
        driver.server.receive();
        let mut got = [0; 40];
        driver.memory.read_slice(&mut got, GuestAddress(BUFFERS)).unwrap();
        assert_eq!((&got[..10], &got[12..]), (&frame[..10], &frame[12..]));
        assert_eq!((got[10], driver.used(&driver.server.rx)), (3, 3));
        assert!(driver.server.wants_frames());
    }

    #[test]
    fn a_frame_waits_until_there_is_room_for_all_of_it() {
        let mut driver = Driver::new(&[(BUFFERS, 16, WRITE)], &[]);
        driver.host.send(&[1; 40]).unwrap();
        driver.server.receive();
        assert!(!driver.server.wants_frames());
        assert_eq!(driver.used(&driver.server.rx), 0);
    }

    #[test]
    fn buffers_without_room_are_given_back_and_not_collected_for_ever() {
        let mut driver = Driver::new(&[(BUFFERS, 0, WRITE); SIZE as usize], &[]);
        driver.host.send(&[1; 40]).unwrap();
        driver.server.receive();
        assert_eq!(driver.used(&driver.server.rx), SIZE);
        assert!(driver.server.wants_frames());
    }

    #[test]
    fn a_limit_holds_frames_back_and_loses_none() {
        let mut driver = Driver::new(&[(BUFFERS, 64, WRITE); 4], &[(BUFFERS, 20, 0); 4]).limit(1);
        // A bucket holds a tenth of a frame, and the first frame is owed.
        assert!(!driver.server.transmit());
        driver.host.send(&[1; 40]).unwrap();
        driver.host.send(&[1; 40]).unwrap();
        driver.server.receive();
        assert_eq!((driver.used(&driver.server.tx), driver.used(&driver.server.rx)), (1, 1));
        assert!(!driver.server.wants_frames() && driver.server.held().iter().all(Option::is_some));
        let mut driver = driver.limit(0);
        driver.server.transmit();
        driver.server.receive();
        assert_eq!((driver.used(&driver.server.tx), driver.used(&driver.server.rx)), (4, 2));
        assert!(driver.server.wants_frames() && driver.server.held() == [None, None]);
    }

    #[test]
    fn a_wire_that_is_gone_is_not_watched_any_more() {
        let mut driver = Driver::new(&[(BUFFERS, 64, WRITE)], &[]);
        driver.server.receive();
        assert!(driver.server.wants_frames());
        // It reads as one whose interface was taken away: at once, and no frame.
        driver.server.wire = Wire::Tap(File::open("/dev/null").unwrap());
        driver.server.receive();
        assert!(!driver.server.wants_frames());
    }

    #[test]
    fn an_empty_place_is_no_device() {
        let (_, commands) = super::super::io_thread::IoThread::new(crate::devices::mem::Shared::new(0, 0)).unwrap();
        let place = Place::default();
        let net = Net::new(0, place.clone(), commands);
        assert_eq!(net.id(), 0);
        let nic = Nic { place: 0, mac: [2, 0, 0, 0, 0, 9], stream: false, vhost: false, limit: RateLimit::default() };
        assert!(place.attach(nic) && !place.attach(nic));
        let mut config = [7; 8];
        net.read_config(0, &mut config);
        assert_eq!((net.id(), config), (1, [2, 0, 0, 0, 0, 9, 0, 0]));
        assert_ne!(net.features() & OFFLOADS, 0);
        place.detach();
        assert_eq!(net.id(), 0);
        assert!(place.attach(Nic { stream: true, ..nic }));
        assert_eq!(net.features() & OFFLOADS, 0, "a stream has no header to say what is left to do");
    }

    proptest! {
        #[test]
        fn whatever_the_driver_offers_is_served(
            rx in proptest::collection::vec((any::<u64>(), any::<u32>(), any::<u16>()), 0..8),
            tx in proptest::collection::vec((0u64..1 << 21, 0u32..1 << 18, any::<u16>()), 0..8),
        ) {
            let mut driver = Driver::new(&rx, &tx);
            driver.host.send(&[1; 100]).unwrap();
            driver.server.receive();
            driver.server.transmit();
        }
    }
}
