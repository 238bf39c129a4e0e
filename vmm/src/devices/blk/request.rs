//! A disk's requests (virtio 1.2, 5.2.6): taken apart, checked, done.

use std::io;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, VolatileSlice};

use super::backing::{Backing, ID_BYTES};
use super::ring::Ring;
use crate::devices::queue::Chain;
use crate::memory::GuestMemory;

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
/// Bytes of a request's header, and of a range to discard or to clear.
const HEADER: usize = 16;
const RANGE: usize = 16;
/// Of a range to clear: it may be given back to the host.
const MAY_UNMAP: u32 = 1;
/// The most sectors of such a range: 1 GiB.
pub const MAX_RANGE: u32 = 1 << 21;
/// Buffers of a request: what preadv(2) takes (`UIO_MAXIOV`). The header and the outcome have one each.
const MAX_BUFFERS: usize = 1024;

/// A request's parts, in guest memory but for the header, which is our copy.
pub struct Request<'m> {
    kind: u32,
    sector: u64,
    /// What the driver sends, without the header.
    sent: Vec<VolatileSlice<'m>>,
    /// Where the driver wants an answer, without its outcome.
    room: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
}

impl<'m> Request<'m> {
    /// Takes a chain apart. One that has no place for the outcome cannot be answered. What is read or written may lie
    /// anywhere in `reach`, all else is in memory.
    pub fn read(memory: &'m GuestMemory, reach: Option<&'m GuestMemory>, chain: Chain<'m>) -> Option<Self> {
        // Our copy: the guest may change its own.
        let buffers: Vec<Descriptor> = chain.filter(|buffer| buffer.len() > 0).take(2 * MAX_BUFFERS + 1).collect();
        let is_ours = |buffer: &Descriptor| memory.check_range(buffer.addr(), buffer.len() as usize);
        let reach = reach.filter(|_| !buffers.iter().all(is_ours));
        if reach.is_some() {
            // Drivers have header and outcome in buffers of their own.
            let header = buffers.first().filter(|first| !first.is_write_only() && first.len() as usize == HEADER)?;
            let outcome = buffers.last().filter(|last| last.is_write_only())?;
            if !is_ours(header) || !is_ours(outcome) {
                return None;
            }
        }
        let (mut sent, mut room) = (Vec::new(), Vec::new());
        for buffer in buffers {
            let list = if buffer.is_write_only() { &mut room } else { &mut sent };
            if list.len() == MAX_BUFFERS {
                return None;
            }
            // A buffer may reach over two regions of memory; the driver's never do.
            list.push(reach.unwrap_or(memory).get_slice(buffer.addr(), buffer.len() as usize).ok()?);
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
        let last = room.last_mut()?;
        let end = last.len() - 1;
        let status = last.offset(end).ok()?;
        *last = last.subslice(0, end).ok()?;
        let kind = u32::from_le_bytes(header[..4].try_into().ok()?);
        let sector = u64::from_le_bytes(header[8..].try_into().ok()?);
        // Others are done without the kernel's help.
        (reach.is_none() || matches!(kind, IN | OUT)).then_some(Self { kind, sector, sent, room, status })
    }

    /// Bytes that it moves.
    pub fn bytes(&self) -> usize {
        total(&self.sent) + total(&self.room)
    }

    /// Does what it asks for; returns how many bytes of its chain were written.
    pub fn answer(&mut self, backing: &Backing) -> u32 {
        let outcome = self.serve(backing);
        self.tell(outcome)
    }

    /// Tells the host what it will read, while another one is answered.
    pub fn expect(&self, backing: &Backing) {
        if self.kind == IN {
            backing.expect(self.sector, &self.room);
        }
    }

    /// Hands it to a ring, where that can do it; returns what the ring reads until it has ended. Then it is to be
    /// [finished](Self::finish), or, where the kernel did not do all of it, to be [answered](Self::answer).
    pub fn start(&self, backing: &Backing, ring: &mut Ring, key: u64) -> Option<Vec<libc::iovec>> {
        match self.kind {
            IN => backing.start_read(self.sector, &self.room, ring, key),
            OUT => backing.start_write(self.sector, &self.sent, ring, key),
            FLUSH => backing.start_flush(ring, key),
            _ => None,
        }
    }

    /// Says how a ring has done it; returns how many bytes of its chain were written.
    pub fn finish(&mut self, outcome: io::Result<()>) -> u32 {
        let written = if self.kind == IN { total(&self.room) } else { 0 };
        self.tell(outcome.map(|()| written))
    }

    fn tell(&mut self, outcome: io::Result<usize>) -> u32 {
        let (outcome, written) = match outcome {
            Ok(written) => (OK, written),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)) => (UNSUPPORTED, 0),
            Err(_) => (IOERR, 0),
        };
        self.status.copy_from(&[outcome]);
        u32::try_from(written).unwrap_or(u32::MAX - 1) + 1
    }

    /// Returns the bytes written into the driver's room.
    fn serve(&mut self, backing: &Backing) -> io::Result<usize> {
        match self.kind {
            IN => backing.read(self.sector, &self.room).map(|()| total(&self.room)),
            OUT => backing.write(self.sector, &self.sent).map(|()| 0),
            FLUSH => backing.flush().map(|()| 0),
            GET_ID => {
                let mut rest = &backing.serial()[..];
                for slice in &self.room {
                    let count = slice.len().min(rest.len());
                    slice.copy_from(&rest[..count]);
                    rest = &rest[count..];
                }
                Ok(ID_BYTES - rest.len())
            }
            DISCARD | WRITE_ZEROES => {
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
        if self.kind == DISCARD { backing.discard(sector, count.into()) } else { backing.clear(sector, count.into(), may_unmap) }
    }
}

pub(super) fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::sync::Arc;

    use caisson_host::control::Control;
    use caisson_protocol::vmm::{Disk, RateLimit};
    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    use super::super::backing::SECTOR;
    use super::super::under_way::UnderWay;
    use super::*;
    use crate::devices::files::FileWindow;
    use crate::devices::queue::ActiveQueue;
    use crate::memory::with_window;

    const QUEUE: u64 = 0x1000;
    pub const HEADER_AT: u64 = 0x8000;
    pub const DATA: u64 = 0x10000;
    pub const STATUS: u64 = 0x9000;
    pub const WRITE: u16 = 2;
    const DISK_BYTES: u64 = 64 << 10;

    pub fn disk(read_only: bool) -> Disk {
        Disk { place: 3, parts: vec![DISK_BYTES], block_size: 512, read_only, serial: "volume".into(), limit: RateLimit::default() }
    }

    pub fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; DISK_BYTES as usize]).unwrap();
        file
    }

    fn answer(backing: &Backing, memory: &GuestMemory, reach: Option<&GuestMemory>, chain: Chain<'_>) -> u32 {
        Request::read(memory, reach, chain).map_or(0, |mut request| request.answer(backing))
    }

    /// A driver's side of a queue with one chain, and the disk.
    struct Driver {
        memory: GuestMemory,
        queue: ActiveQueue,
        backing: Backing,
        file: File,
        _shim: Control,
    }

    impl Driver {
        fn new(read_only: bool, buffers: &[(u64, u32, u16)]) -> Self {
            let file = file();
            Self::with(&disk(read_only), vec![file.try_clone().unwrap()], file, buffers)
        }

        /// Of a disk of these files; `file` is what [`Self::content`] reads.
        fn with(disk: &Disk, files: Vec<File>, file: File, buffers: &[(u64, u32, u16)]) -> Self {
            let (shim, control) = Control::pair().unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let backing = Backing::new(disk, files, Arc::new(control));
            let queue = queue(&memory, buffers);
            Self { memory, queue, backing, file, _shim: shim }
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
            let written = answer(&self.backing, &self.memory, None, chain);
            (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written)
        }

        /// The same, by way of a ring.
        fn serve_by(&mut self, ring: &mut Ring) -> (u8, u32) {
            let chain = self.queue.next(&self.memory).unwrap();
            let head = chain.head_index();
            let mut under_way = UnderWay::new(Some(ring));
            let request = Request::read(&self.memory, None, chain);
            let mut written = request.map_or(Some(0), |request| under_way.start(&self.backing, head, request));
            while written.is_none() {
                under_way.submit().unwrap();
                written = under_way.next_ended(&self.backing).map(|(ended, written)| {
                    assert_eq!(ended, head);
                    written
                });
            }
            assert!(under_way.is_empty());
            (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written.unwrap())
        }

        fn content(&mut self, sector: u64) -> [u8; SECTOR as usize] {
            let mut content = [0; SECTOR as usize];
            self.file.seek(io::SeekFrom::Start(sector * SECTOR)).unwrap();
            self.file.read_exact(&mut content).unwrap();
            content
        }
    }

    pub fn queue(memory: &GuestMemory, buffers: &[(u64, u32, u16)]) -> ActiveQueue {
        queue_of(memory, &[buffers])
    }

    /// A queue with several chains.
    pub fn queue_of(memory: &GuestMemory, chains: &[&[(u64, u32, u16)]]) -> ActiveQueue {
        let mock = MockSplitQueue::create(memory, GuestAddress(QUEUE), 256);
        let mut descriptors: Vec<RawDescriptor> = Vec::new();
        for chain in chains {
            // Drivers leave out what has no length.
            let chain: Vec<_> = chain.iter().filter(|(_, length, _)| *length > 0).collect();
            for (index, (address, length, flags)) in chain.iter().enumerate() {
                let next = if index + 1 < chain.len() { 1 } else { 0 };
                let descriptor = Descriptor::new(*address, *length, *flags | next, descriptors.len() as u16 + 1);
                descriptors.push(RawDescriptor::from(descriptor));
            }
        }
        mock.build_multiple_desc_chains(&descriptors).unwrap();
        ActiveQueue::new(mock.create_queue().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut driver = Driver::request(false, OUT, 3, 1024, 0);
        driver.memory.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        assert_eq!(driver.serve(), (OK, 1));
        assert_eq!((driver.content(2)[0], driver.content(3), driver.content(4), driver.content(5)[0]), (1, [7; 512], [7; 512], 1));
        let mut driver = Driver { backing: driver.backing, file: driver.file, ..Driver::request(false, IN, 4, 1024, WRITE) };
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
        assert_eq!(answer(&driver.backing, &driver.memory, None, chain), 513);
        let mut data = [9; 513];
        driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!((&data[..512], data[512]), (&[1; 512][..], OK));
    }

    #[test]
    fn parts_of_a_disk_are_read_one_behind_the_other() {
        let part = |byte: u8, bytes: usize| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&vec![byte; bytes]).unwrap();
            file
        };
        // What does not fill a sector is not reached, and neither is what a file has beyond its part.
        let files = vec![part(1, 700), part(2, 2048), part(3, 512)];
        let disk = Disk { parts: vec![700, 1024, 512], ..disk(true) };
        let buffers = [(HEADER_AT, 16, 0), (DATA, 100, WRITE), (DATA + 100, 1948, WRITE), (STATUS, 1, WRITE)];
        let mut driver = Driver::with(&disk, files, file(), &buffers);
        assert_eq!(driver.backing.sectors(), 4);
        driver.ask(IN, 0);
        assert_eq!(driver.serve(), (OK, 2049));
        let mut data = [0; 2048];
        driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        let expected: Vec<u8> = [(1, 512), (2, 1024), (3, 512)].iter().flat_map(|(byte, count)| vec![*byte; *count]).collect();
        assert_eq!(data[..], expected[..]);
    }

    #[test]
    fn what_is_read_may_lie_where_only_the_kernel_goes_and_nothing_else() {
        const BEYOND: u64 = 1 << 30;
        let window = FileWindow::new(4).unwrap();
        let reach = |memory: &GuestMemory| with_window(memory, &window, BEYOND).unwrap();
        let asked = |kind: u32, buffers: &[(u64, u32, u16)]| {
            let mut driver = Driver::new(false, buffers);
            driver.ask(kind, 0);
            let chain = driver.queue.next(&driver.memory).unwrap();
            let written = answer(&driver.backing, &driver.memory, Some(&reach(&driver.memory)), chain);
            (written, driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap())
        };
        let (header, status) = ((HEADER_AT, 16, 0), (STATUS, 1, WRITE));
        // Nothing is there, which the kernel finds out.
        assert_eq!(asked(IN, &[header, (BEYOND, 512, WRITE), status]), (1, IOERR));
        assert_eq!(asked(OUT, &[header, (BEYOND, 512, 0), status]), (1, IOERR));
        for buffers in [
            &[(BEYOND, 16, 0), (DATA, 512, WRITE), status][..],
            &[header, (DATA, 512, WRITE), (BEYOND, 1, WRITE)],
            &[header, (BEYOND, 512, WRITE), (BEYOND, 0, WRITE)],
            &[(BEYOND, 16, WRITE), header, status],
            &[(HEADER_AT, 8, 0), (BEYOND, 8, 0), status],
        ] {
            assert_eq!(asked(IN, buffers), (0, 0xff), "{buffers:?}");
        }
        assert_eq!(asked(GET_ID, &[header, (BEYOND, 20, WRITE), status]), (0, 0xff));
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

    #[test]
    fn a_ring_does_what_is_done_without_one() {
        let mut ring = Ring::new().unwrap();
        let part = |bytes: usize| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&(0..bytes).map(|index| (index / 512) as u8).collect::<Vec<u8>>()).unwrap();
            file
        };
        // The last part is shorter than the disk says, so that there are requests of which the kernel can do some.
        let several = Disk { parts: vec![2048, 4096], ..disk(true) };
        for (disk, kind, sector, length, flag) in [
            (disk(false), IN, 1, 4096, WRITE),
            (disk(false), IN, 0, 1024, 0),
            (disk(false), OUT, 7, 8192, 0),
            (disk(true), OUT, 7, 512, 0),
            (disk(false), FLUSH, 0, 0, 0),
            (disk(false), GET_ID, 0, 20, WRITE),
            (disk(false), DISCARD, 0, 16, 0),
            (disk(false), 99, 0, 0, 0),
            (disk(false), IN, DISK_BYTES / SECTOR, 512, WRITE),
            (several.clone(), IN, 1, 1024, WRITE),
            (several.clone(), IN, 5, 1024, WRITE),
            (several.clone(), IN, 3, 1024, WRITE),
            (several.clone(), FLUSH, 0, 0, 0),
            (several, IN, 7, 4096, WRITE),
        ] {
            let buffers = [(HEADER_AT, 16, 0), (DATA, length, flag), (STATUS, 1, WRITE)];
            let mut seen = [false, true].map(|by_ring| {
                let files: Vec<File> = if disk.parts.len() > 1 { vec![part(2048), part(2048)] } else { vec![part(DISK_BYTES as usize)] };
                let file = files[0].try_clone().unwrap();
                let mut driver = Driver::with(&disk, files, file, &buffers);
                driver.ask(kind, sector);
                driver.memory.write_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 1], GuestAddress(DATA)).unwrap();
                let answer = if by_ring { driver.serve_by(&mut ring) } else { driver.serve() };
                let mut data = vec![0; 8192];
                driver.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
                let content: Vec<_> = (0..4).chain(7..23).map(|sector| driver.content(sector.min(disk.parts[0] / SECTOR - 1))).collect();
                Some((answer, data, content))
            });
            assert!(seen[0].take() == seen[1].take(), "{kind} {sector} {length} {disk:?}");
        }
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
                answer(&driver.backing, &driver.memory, None, chain);
            }
        }
    }
}
