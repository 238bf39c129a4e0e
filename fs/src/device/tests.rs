//! The device with a file system that takes its time.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
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

/// Makes no file without a name.
fn makes_none() -> Make {
    Box::new(|_, _, _| Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
}

/// A device, what lets its syncs go, and what it fails of.
fn device(answers_in: Duration, workers: usize) -> (Device<Slow>, Sender<()>, Receiver<String>) {
    let (sender, let_go) = channel();
    let (reason, reasons) = channel();
    let fail = move |why| reason.send(why).unwrap();
    let descriptors = Arc::new(Descriptors::new(1000, || ()));
    let fs = Slow { answers_in, let_go: Mutex::new(let_go) };
    (Device::new(fs, makes_none(), None, Duration::from_secs(1), workers, descriptors, fail), sender, reasons)
}

/// A device with a window, into which a file goes, what fails, and the monitor's end.
fn device_with_window() -> (Device<Slow>, Receiver<String>, UnixStream) {
    let ((_sender, let_go), (reason, reasons)) = (channel(), channel());
    let descriptors = Arc::new(Descriptors::new(1000, || ()));
    let fs = Slow { answers_in: Duration::ZERO, let_go: Mutex::new(let_go) };
    let dax = Dax::new(
        |_, inode, writes| if writes { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { File::open(format!("/dev/fd/{inode}")) },
    );
    let device = Device::new(fs, makes_none(), Some(dax), Duration::ZERO, 0, descriptors, move |why| reason.send(why).unwrap());
    let (ours, monitors) = UnixStream::pair().unwrap();
    let backend = Backend::from_stream(ours);
    backend.set_shmem_flag(true);
    device.set_backend_req_fd(backend);
    (device, reasons, monitors)
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

/// The error in the answer to the first request.
fn error(guest: &Guest) -> i32 {
    guest.answered(1);
    let [_length, error]: [i32; 2] = guest.memory.memory().read_obj(GuestAddress(DATA + ROOM / 2)).unwrap();
    error
}

#[test]
fn a_file_that_the_guest_maps_is_handed_to_the_monitor() {
    const SETUP: u32 = 48;
    const LENGTH: u64 = 2 << 20;
    let file = tempfile::tempfile().unwrap();
    for (flags, answer) in [(2, 0), (3, -libc::EROFS)] {
        let (device, _reasons, mut monitor) = device_with_window();
        let mut guest = Guest::new(&device);
        guest.offer(SETUP);
        guest.write(80_u32, DESCRIPTORS + 8);
        guest.write(file.as_raw_fd() as u64, DATA + 16);
        // struct fuse_setupmapping_in: handle, where in the file, how much, how, where in the window.
        guest.write([u64::MAX, LENGTH], DATA + 40);
        guest.write([LENGTH, flags], DATA + 56);
        guest.write(3 * LENGTH, DATA + 72);
        kick(&device, &guest);
        assert_eq!(error(&guest), answer);
        drop(device);
        let mut message = Vec::new();
        monitor.read_to_end(&mut message).unwrap();
        let asked: Vec<u64> =
            message.get(12..).unwrap_or_default().chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(asked, if answer == 0 { vec![0, LENGTH, 3 * LENGTH, LENGTH, 0] } else { Vec::new() });
    }
}

#[test]
fn a_buffer_that_is_not_memory_is_refused_where_there_is_a_window() {
    let (device, reasons, _monitor) = device_with_window();
    let mut guest = Guest::new(&device);
    guest.offer(GETATTR);
    // A third descriptor is of what was mapped.
    guest.write([1_u16 | 2, 2], DESCRIPTORS + 16 + 12);
    guest.write(1_u64 << 40, DESCRIPTORS + 32);
    guest.write(512_u32, DESCRIPTORS + 32 + 8);
    guest.write([2_u16, 0], DESCRIPTORS + 32 + 12);
    kick(&device, &guest);
    assert_eq!((error(&guest), reasons.try_recv().is_err()), (-libc::EFAULT, true));
}
