//! What the network device does for a driver, beside a host that these are.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::super::mmio::MmioTransport;
use super::super::queue::MAX_BUFFERS;
use super::super::window::Windows;
use super::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
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
        let activation = Activation { features: FEATURES | OFFLOADS, queues, memory: memory.clone(), reach: None, interrupt };
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
fn a_driver_has_as_many_queues_as_it_asks_for() {
    let (_, commands) = crate::devices::io_thread::IoThread::new(crate::devices::mem::Shared::new(0, 0)).unwrap();
    let place = Place::default();
    let net = Net::new(0, place.clone(), commands);
    let nic = Nic { place: 0, mac: [2; 6], wire: NicWire::Kernel { pairs: 3 }, limit: RateLimit::default() };
    assert!(place.attach(nic));
    let mut most = [0; 2];
    net.read_config(8, &mut most);
    assert_eq!((net.queue_sizes().len(), net.most_queues(), most), (7, 9, [3, 0]));
    // Several pairs, the control queue alone, neither.
    let used = [SEVERAL, 1 << F_CTRL_VQ, 0].map(|features| net.used_queues(features));
    assert_eq!((used, net.features() & SEVERAL), ([7, 3, 2], SEVERAL));
    place.detach();
    assert!(place.attach(Nic { wire: NicWire::Tap, ..nic }));
    assert_eq!((net.queue_sizes().len(), net.features() & SEVERAL), (2, 0));
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
    assert_eq!(driver.server.awaits(), EventSet::IN);
}

#[test]
fn a_frame_waits_until_there_is_room_for_all_of_it() {
    let mut driver = Driver::new(&[(BUFFERS, 16, WRITE)], &[]);
    driver.host.send(&[1; 40]).unwrap();
    driver.server.receive();
    assert_eq!(driver.server.awaits(), EventSet::empty());
    assert_eq!(driver.used(&driver.server.rx), 0);
}

#[test]
fn buffers_without_room_are_given_back_and_not_collected_for_ever() {
    let mut driver = Driver::new(&[(BUFFERS, 0, WRITE); SIZE as usize], &[]);
    driver.host.send(&[1; 40]).unwrap();
    driver.server.receive();
    assert_eq!(driver.used(&driver.server.rx), SIZE);
    // The frame waits for buffers that have room.
    assert_eq!(driver.server.awaits(), EventSet::empty());
}

#[test]
fn a_table_of_more_buffers_than_a_chain_may_have_is_given_back_unread() {
    let table = |count: usize, length: u32| {
        let driver = Driver::new(&[(BUFFERS, (count * 16) as u32, INDIRECT)], &[]);
        for index in 0..count {
            let next = if index + 1 < count { NEXT } else { 0 };
            let descriptor = RawDescriptor::from(Descriptor::new(0x8000, length, WRITE | next, (index + 1) as u16));
            driver.memory.write_obj(descriptor, GuestAddress(BUFFERS + 16 * index as u64)).unwrap();
        }
        driver
    };
    for (count, length, taken) in [(MAX_BUFFERS, 1, true), (MAX_BUFFERS + 1, 1, false), (50_000, 1, false), (3, 0, false)] {
        let mut driver = table(count, length);
        driver.host.send(&[1; 40]).unwrap();
        driver.server.receive();
        assert_eq!(driver.used(&driver.server.rx), 1, "{count} of {length}");
        let used: u32 = driver.memory.read_obj(GuestAddress(driver.server.rx.layout().used_ring() + 8)).unwrap();
        assert_eq!((used, driver.server.waiting), if taken { (40, 0) } else { (0, 40) }, "{count} of {length}");
    }
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
    assert_eq!(driver.server.awaits(), EventSet::IN);
    // It reads as one whose interface was taken away: at once, and no frame.
    driver.server.wire = Wire::Tap(File::open("/dev/null").unwrap());
    driver.server.receive();
    assert_eq!(driver.server.awaits(), EventSet::empty());
}

#[test]
fn an_empty_place_is_no_device() {
    let (_, commands) = super::super::io_thread::IoThread::new(crate::devices::mem::Shared::new(0, 0)).unwrap();
    let place = Place::default();
    let net = Net::new(0, place.clone(), commands);
    assert_eq!(net.id(), 0);
    let nic = Nic { place: 0, mac: [2, 0, 0, 0, 0, 9], wire: NicWire::Tap, limit: RateLimit::default() };
    assert!(place.attach(nic) && !place.attach(nic));
    let mut config = [7; 8];
    net.read_config(0, &mut config);
    assert_eq!((net.id(), config), (1, [2, 0, 0, 0, 0, 9, 0, 0]));
    assert_ne!(net.features() & OFFLOADS, 0);
    place.detach();
    assert_eq!(net.id(), 0);
    assert!(place.attach(Nic { wire: NicWire::Stream, ..nic }));
    assert_eq!(net.features() & OFFLOADS, 0, "a stream has no header to say what is left to do");
}

#[test]
fn a_window_shows_an_interface_as_long_as_it_is_there() {
    let (_, commands) = super::super::io_thread::IoThread::new(crate::devices::mem::Shared::new(0, 0)).unwrap();
    let (place, memory) = (Place::default(), GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let mut transport = MmioTransport::new(Box::new(Net::new(0, place.clone(), commands)), memory).unwrap();
    let windows = Windows::new(1).unwrap();
    transport.show_in(windows.window(0));
    // The device's id, the features of the first half, and the first bytes of the address.
    let shown = || [0x08, 0x10, 0x100].map(|register| windows.shown(0, register));
    assert_eq!(shown()[0], 0);
    assert!(place.attach(Nic { place: 0, mac: [2, 3, 4, 5, 6, 7], wire: NicWire::Stream, limit: RateLimit::default() }));
    transport.show();
    assert_eq!(shown(), [DEVICE_ID, FEATURES as u32, 0x0504_0302]);
    place.detach();
    transport.show();
    assert_eq!((shown()[0], shown()[2]), (0, 0));
}

/// What many small frames that came together on a stream are to a guest.
#[test]
fn frames_that_were_read_ahead_are_not_forgotten() {
    let buffers: Vec<(u64, u32, u16)> = (0..16).map(|number| (BUFFERS + 64 * number, 64, WRITE)).collect();
    let mut driver = Driver::new(&buffers, &[]);
    let (mut host, wire) = std::os::unix::net::UnixStream::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    driver.server.wire = Wire::Stream(wire::Stream::new(File::from(OwnedFd::from(wire))));
    let frames = [&[0, 0, 0, 20][..], &[1; 20]].concat().repeat(BUDGET + 5);
    host.write_all(&frames).unwrap();
    // The guest has room for sixteen, and the next one waits.
    assert!(!driver.server.receive());
    assert_eq!((driver.used(&driver.server.rx), driver.server.awaits()), (16, EventSet::empty()));
    // A limit holds them back, and they are told of when it does not any more.
    let mut driver = Driver::new(&buffers, &[]).limit(1);
    let (mut host, wire) = std::os::unix::net::UnixStream::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    driver.server.wire = Wire::Stream(wire::Stream::new(File::from(OwnedFd::from(wire))));
    host.write_all(&frames[..24 * 5]).unwrap();
    assert!(!driver.server.receive());
    assert_eq!(driver.used(&driver.server.rx), 1);
    let mut driver = driver.limit(0);
    assert!(!driver.server.receive());
    assert_eq!((driver.used(&driver.server.rx), driver.server.awaits()), (5, EventSet::IN));
    // What came before the end is delivered.
    host.write_all(&frames[..24]).unwrap();
    drop(host);
    driver.server.receive();
    assert_eq!((driver.used(&driver.server.rx), driver.server.awaits()), (6, EventSet::empty()));
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
