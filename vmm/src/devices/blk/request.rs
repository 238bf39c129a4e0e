//! A disk's requests (virtio 1.2, 5.2.6): taken apart, checked, done.
#![expect(unsafe_code, reason = "guest memory is given to the kernel by its address")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use caisson_host::control::Control;
use caisson_protocol::vmm::{Disk, Event};
use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{GuestMemory as _, VolatileSlice};

use crate::devices::lock;
use crate::devices::queue::Chain;
use crate::devices::rate::Limiter;
use crate::memory::GuestMemory;

/// Bytes of what the protocol calls a sector, whatever the disk's own are (5.2.4).
pub const SECTOR: u64 = 512;
/// Types of requests, and of their outcomes (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Bytes of a request's header, of a disk's id, and of a range to discard or to clear.
const HEADER: usize = 16;
const ID_BYTES: usize = 20;
const RANGE: usize = 16;
/// Of a range to clear: it may be given back to the host.
const MAY_UNMAP: u32 = 1;
/// The most sectors of such a range: 1 GiB.
pub const MAX_RANGE: u32 = 1 << 21;
/// Buffers of a request: what preadv(2) takes (`UIO_MAXIOV`). The header and the outcome have one each.
const MAX_BUFFERS: usize = 1024;

/// A disk's content and size, which all of its queues share.
pub struct Backing {
    // Closed before it is said to be.
    file: File,
    sectors: AtomicU64,
    generation: AtomicU32,
    read_only: bool,
    serial: [u8; ID_BYTES],
    /// None without a limit: then the queues do not wait for each other.
    limiter: Option<Mutex<Limiter>>,
    _farewell: Farewell,
}

/// Says that a disk is closed.
struct Farewell {
    control: Arc<Control>,
    place: u32,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        // When the shim is gone there is nobody to tell.
        let _ = self.control.send(&Event::DiskDetached { place: self.place }, &[], true);
    }
}

/// Does what a request asks for; returns how many bytes of its chain were written.
pub fn answer(backing: &Backing, memory: &GuestMemory, chain: Chain<'_>) -> u32 {
    // A chain that has no place for the outcome cannot be answered.
    let Some(mut request) = Request::read(memory, chain) else { return 0 };
    backing.pay(total(&request.sent) + total(&request.room));
    let (outcome, written) = match request.serve(backing) {
        Ok(written) => (OK, written),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)) => (UNSUPPORTED, 0),
        Err(_) => (IOERR, 0),
    };
    request.status.copy_from(&[outcome]);
    u32::try_from(written).unwrap_or(u32::MAX - 1) + 1
}

/// A request's parts, in guest memory but for the header, which is our copy.
struct Request<'m> {
    kind: u32,
    sector: u64,
    /// What the driver sends, without the header.
    sent: Vec<VolatileSlice<'m>>,
    /// Where the driver wants an answer, without its outcome.
    room: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
}

impl<'m> Request<'m> {
    fn read(memory: &'m GuestMemory, chain: Chain<'m>) -> Option<Self> {
        let (mut sent, mut room) = (Vec::new(), Vec::new());
        for descriptor in chain {
            let list = if descriptor.is_write_only() { &mut room } else { &mut sent };
            if list.len() == MAX_BUFFERS {
                return None;
            }
            // A buffer may reach over two regions of memory; the driver's never do.
            list.push(memory.get_slice(descriptor.addr(), descriptor.len() as usize).ok()?);
        }
        // How the parts are spread over buffers is the driver's affair (2.7.4).
        let mut header = [0; HEADER];
        let mut at = 0;
        while at < HEADER {
            let first = sent.first_mut()?;
            let count = first.len().min(HEADER - at);
            first.subslice(0, count).ok()?.copy_to(&mut header[at..at + count]);
            at += count;
            *first = first.offset(count).ok()?;
            if first.is_empty() {
                sent.remove(0);
            }
        }
        while room.last()?.is_empty() {
            room.pop();
        }
        let last = room.last_mut()?;
        let end = last.len() - 1;
        let status = last.offset(end).ok()?;
        *last = last.subslice(0, end).ok()?;
        let kind = u32::from_le_bytes(header[..4].try_into().ok()?);
        let sector = u64::from_le_bytes(header[8..].try_into().ok()?);
        Some(Self { kind, sector, sent, room, status })
    }

    /// Returns the bytes written into the driver's room.
    fn serve(&mut self, backing: &Backing) -> io::Result<usize> {
        match self.kind {
            IN => {
                let bytes = total(&self.room);
                let offset = backing.place_of(self.sector, bytes as u64)?;
                transfer(&backing.file, &self.room, offset, libc::preadv).map(|()| bytes)
            }
            OUT => {
                backing.check_writable()?;
                let offset = backing.place_of(self.sector, total(&self.sent) as u64)?;
                transfer(&backing.file, &self.sent, offset, libc::pwritev).map(|()| 0)
            }
            FLUSH => backing.file.sync_data().map(|()| 0),
            GET_ID => {
                let mut rest = &backing.serial[..];
                for slice in &self.room {
                    let count = slice.len().min(rest.len());
                    slice.copy_from(&rest[..count]);
                    rest = &rest[count..];
                }
                Ok(ID_BYTES - rest.len())
            }
            DISCARD | WRITE_ZEROES => {
                backing.check_writable()?;
                let mut range = [0; RANGE];
                match self.sent.as_slice() {
                    [slice] if slice.len() == RANGE => slice.copy_to(&mut range),
                    _ => return Err(io::ErrorKind::InvalidInput.into()),
                };
                self.clear(backing, range).map(|()| 0)
            }
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    /// Discards a range or fills it with zeroes (`struct virtio_blk_discard_write_zeroes`).
    fn clear(&self, backing: &Backing, range: [u8; RANGE]) -> io::Result<()> {
        let [sector, rest] = [&range[..8], &range[8..]].map(|half| half.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)));
        let (count, flags) = (rest as u32, (rest >> 32) as u32);
        let may_unmap = self.kind == WRITE_ZEROES && flags == MAY_UNMAP;
        if flags != 0 && !may_unmap {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        if count > MAX_RANGE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let length = u64::from(count) * SECTOR;
        let offset = backing.place_of(sector, length)?;
        if length == 0 {
            return Ok(());
        }
        let give_back = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let keep = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let clear = |flags| fallocate(&backing.file, flags, offset, length as i64);
        match self.kind {
            DISCARD => clear(give_back)?,
            // Where a range cannot be given back it is cleared all the same (5.2.6.2).
            _ if may_unmap && clear(give_back).is_ok() => {}
            _ => clear(keep)?,
        }
        Ok(())
    }
}

impl Backing {
    /// What is behind a disk; when it is let go the shim hears of it.
    pub fn new(disk: &Disk, file: File, control: Arc<Control>) -> Self {
        let mut serial = [0; ID_BYTES];
        serial.iter_mut().zip(disk.serial.bytes()).for_each(|(to, from)| *to = from);
        Self {
            file,
            sectors: AtomicU64::new(disk.bytes / SECTOR),
            generation: AtomicU32::new(0),
            read_only: disk.read_only,
            serial,
            limiter: (!disk.limit.is_none()).then(|| Mutex::new(Limiter::new(disk.limit, Instant::now()))),
            _farewell: Farewell { control, place: disk.place },
        }
    }

    /// How long its limit has the next request wait.
    pub fn wait(&self) -> Option<Duration> {
        lock(self.limiter.as_ref()?).wait(Instant::now())
    }

    fn pay(&self, bytes: usize) {
        if let Some(limiter) = &self.limiter {
            lock(limiter).pay(bytes);
        }
    }

    /// Its size now.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// How often that has changed.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Changes it, to so many bytes.
    pub fn resize(&self, bytes: u64) {
        self.sectors.store(bytes / SECTOR, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    /// Where in the file so many bytes from a sector on are, when the disk has them.
    fn place_of(&self, sector: u64, bytes: u64) -> io::Result<i64> {
        let end = sector.checked_mul(SECTOR).and_then(|start| start.checked_add(bytes));
        let inside = end.is_some_and(|end| end <= self.sectors().saturating_mul(SECTOR));
        match i64::try_from(sector.saturating_mul(SECTOR)) {
            Ok(offset) if inside && bytes.is_multiple_of(SECTOR) => Ok(offset),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// preadv(2) or pwritev(2).
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Reads or writes all that the buffers hold.
fn transfer(file: &File, buffers: &[VolatileSlice<'_>], mut offset: i64, call: Call) -> io::Result<()> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<libc::iovec> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let mut done = 0;
    while done < vectors.len() {
        let rest = &mut vectors[done..];
        // SAFETY: each vector is a part of guest memory, which is mapped to the process's end and which
        // only raw accesses like this one go to; the guards keep it.
        let count = unsafe { call(file.as_raw_fd(), rest.as_ptr(), rest.len() as libc::c_int, offset) };
        let mut count = match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        offset += count as i64;
        for vector in rest {
            let part = count.min(vector.iov_len);
            count -= part;
            vector.iov_base = vector.iov_base.wrapping_byte_add(part);
            vector.iov_len -= part;
            done += usize::from(vector.iov_len == 0);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Read, Seek, Write};

    use caisson_protocol::vmm::RateLimit;
    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::queue::ActiveQueue;

    const QUEUE: u64 = 0x1000;
    pub const HEADER_AT: u64 = 0x8000;
    pub const DATA: u64 = 0x10000;
    pub const STATUS: u64 = 0x9000;
    pub const WRITE: u16 = 2;
    const DISK_BYTES: u64 = 64 << 10;

    pub fn disk(read_only: bool) -> Disk {
        Disk { place: 3, bytes: DISK_BYTES, block_size: 512, read_only, serial: "volume".into(), limit: RateLimit::default() }
    }

    pub fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; DISK_BYTES as usize]).unwrap();
        file
    }

    /// A driver's side of a queue with one chain, and the disk.
    struct Driver {
        memory: GuestMemory,
        queue: ActiveQueue,
        backing: Backing,
        _shim: Control,
    }

    impl Driver {
        fn new(read_only: bool, buffers: &[(u64, u32, u16)]) -> Self {
            let (shim, control) = Control::pair().unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let backing = Backing::new(&disk(read_only), file(), Arc::new(control));
            let queue = queue(&memory, buffers);
            Self { memory, queue, backing, _shim: shim }
        }

        /// A request in the usual three buffers, one of them with data both ways as its flag says.
        fn request(read_only: bool, kind: u32, sector: u64, length: u32, flag: u16) -> Self {
            let driver = Self::new(read_only, &[(HEADER_AT, 16, 0), (DATA, length, flag), (STATUS, 1, WRITE)]);
            driver.ask(kind, sector);
            driver
        }

        fn ask(&self, kind: u32, sector: u64) {
            let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            self.memory.write_slice(&header, GuestAddress(HEADER_AT)).unwrap();
            self.memory.write_slice(&[0xff], GuestAddress(STATUS)).unwrap();
        }

        /// The outcome, and the bytes that were written.
        fn serve(&mut self) -> (u8, u32) {
            let chain = self.queue.next(&self.memory).unwrap();
            let written = answer(&self.backing, &self.memory, chain);
            (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written)
        }

        fn content(&mut self, sector: u64) -> [u8; SECTOR as usize] {
            let mut content = [0; SECTOR as usize];
            self.backing.file.seek(io::SeekFrom::Start(sector * SECTOR)).unwrap();
            self.backing.file.read_exact(&mut content).unwrap();
            content
        }
    }

    pub fn queue(memory: &GuestMemory, buffers: &[(u64, u32, u16)]) -> ActiveQueue {
        let mock = MockSplitQueue::create(memory, GuestAddress(QUEUE), 16);
        let next = |index: usize| if index + 1 < buffers.len() { 1 } else { 0 };
        let descriptor = |(index, (address, length, flags)): (usize, &(u64, u32, u16))| {
            RawDescriptor::from(Descriptor::new(*address, *length, *flags | next(index), index as u16 + 1))
        };
        let descriptors: Vec<RawDescriptor> = buffers.iter().enumerate().map(descriptor).collect();
        mock.build_desc_chain(&descriptors).unwrap();
        ActiveQueue::new(mock.create_queue().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut driver = Driver::request(false, OUT, 3, 1024, 0);
        driver.memory.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        assert_eq!(driver.serve(), (OK, 1));
        assert_eq!((driver.content(2)[0], driver.content(3), driver.content(4), driver.content(5)[0]), (1, [7; 512], [7; 512], 1));
        let mut driver = Driver { backing: driver.backing, ..Driver::request(false, IN, 4, 1024, WRITE) };
        assert_eq!(driver.serve(), (OK, 1025));
        let mut data = [0; 1024];
        driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!((&data[..512], &data[512..]), (&[7; 512][..], &[1; 512][..]));
    }

    #[test]
    fn parts_of_a_request_may_be_spread_over_buffers() {
        let buffers = [(HEADER_AT, 7, 0), (HEADER_AT + 7, 9, 0), (DATA, 100, WRITE), (DATA + 100, 413, WRITE), (0, 0, WRITE)];
        let mut driver = Driver::new(false, &buffers);
        driver.ask(IN, 0);
        let chain = driver.queue.next(&driver.memory).unwrap();
        assert_eq!(answer(&driver.backing, &driver.memory, chain), 513);
        let mut data = [9; 513];
        driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!((&data[..512], data[512]), (&[1; 512][..], OK));
    }

    #[test]
    fn what_is_beyond_the_end_is_refused() {
        let sectors = DISK_BYTES / SECTOR;
        for (sector, length) in [(sectors, 512), (sectors - 1, 1024), (u64::MAX, 512), (u64::MAX / SECTOR, 1024), (0, 511)] {
            assert_eq!(Driver::request(false, IN, sector, length, WRITE).serve(), (IOERR, 1), "{sector} {length}");
        }
        assert_eq!(Driver::request(false, IN, sectors - 1, 512, WRITE).serve(), (OK, 513));
    }

    #[test]
    fn a_read_only_disk_is_not_written() {
        for (kind, length) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
            let mut driver = Driver::request(true, kind, 0, length, 0);
            driver.memory.write_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], GuestAddress(DATA)).unwrap();
            assert_eq!((driver.serve(), driver.content(0)), ((IOERR, 1), [1; 512]));
        }
    }

    #[test]
    fn a_range_is_discarded_or_cleared() {
        for (kind, flags, outcome) in [(DISCARD, 0, OK), (WRITE_ZEROES, 1, OK), (DISCARD, 1, UNSUPPORTED), (WRITE_ZEROES, 2, UNSUPPORTED)] {
            let mut driver = Driver::request(false, kind, 0, 16, 0);
            driver.memory.write_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, flags, 0, 0, 0], GuestAddress(DATA)).unwrap();
            assert_eq!(driver.serve(), (outcome, 1));
            let expected = if outcome == OK { 0 } else { 1 };
            assert_eq!((driver.content(1)[511], driver.content(2)[0], driver.content(3)[0]), (1, expected, 1));
        }
    }

    #[test]
    fn a_disk_tells_its_id_and_does_not_know_other_requests() {
        let mut driver = Driver::request(false, GET_ID, 0, 20, WRITE);
        assert_eq!(driver.serve(), (OK, 21));
        let mut id = [0; 20];
        driver.memory.read_slice(&mut id, GuestAddress(DATA)).unwrap();
        assert_eq!(&id, b"volume\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(Driver::request(false, FLUSH, 0, 0, 0).serve(), (OK, 1));
        assert_eq!(Driver::request(false, 99, 0, 0, 0).serve(), (UNSUPPORTED, 1));
    }

    proptest! {
        #[test]
        fn whatever_the_driver_asks_is_answered(
            header in any::<[u8; 16]>(),
            buffers in proptest::collection::vec((0u64..1 << 21, 0u32..1 << 20, prop_oneof![Just(0), Just(WRITE)]), 0..8),
        ) {
            let buffers = [vec![(HEADER_AT, 16, 0)], buffers].concat();
            let mut driver = Driver::new(false, &buffers);
            driver.memory.write_slice(&header, GuestAddress(HEADER_AT)).unwrap();
            if let Some(chain) = driver.queue.next(&driver.memory) {
                answer(&driver.backing, &driver.memory, chain);
            }
        }
    }
}
