//! The window into which the virtio-fs server maps files for the guest (virtio 1.2, 5.11.6.5): what it reads there is the
//! host's own memory of a file.
//!
//! ```text
//! empty (nobody can read it) --map--> a range of a file --map--> another one
//!   ^------------------------unmap----------'
//! ```
//!
//! The host may make a file shorter that is mapped. What lies beyond its end then cannot be read, which KVM says when a
//! vCPU tries, and zeroes come into that page. Before Linux 6.13 it does not say so, and the vCPU tries for ever.
#![expect(unsafe_code, reason = "files are mapped at addresses that the guest has as memory")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex};

use ::vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use ::vhost::vhost_user::{Error, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};
use caisson_host::control::Control;
use caisson_protocol::vmm::Stopped;

use super::lock;
use crate::filters;
use crate::machine::stop;

/// What files are mapped in: the only steps in which Linux asks for them (`FUSE_DAX_SHIFT`).
const RANGE: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// The region's number, of which the device has one.
const REGION: u8 = 0;

/// The window.
pub struct FileWindow {
    address: usize,
    ranges: Mutex<Vec<Option<Mapped>>>,
}

/// What is mapped in a range; one mapping of several ranges has one descriptor.
struct Mapped {
    file: Arc<File>,
    offset: u64,
}

impl FileWindow {
    /// An empty window of so many MiB, an even number.
    ///
    /// # Errors
    /// When there are no addresses for it.
    pub fn new(mib: u64) -> io::Result<Self> {
        let ranges = (mib << 20) / RANGE;
        let length = (ranges * RANGE) as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Where huge pages of a file fit, should its file system have some.
        // SAFETY: a new mapping at a place of the kernel's choice takes nothing from anybody.
        let place = unsafe { libc::mmap(null_mut(), length + RANGE as usize, libc::PROT_NONE, flags, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = (place as usize).next_multiple_of(RANGE as usize);
        Ok(Self { address, ranges: Mutex::new((0..ranges).map(|_| None).collect()) })
    }

    /// Where it is in our memory.
    pub const fn address(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        lock(&self.ranges).len() as u64 * RANGE
    }

    /// Which ranges lie from `offset` on; nothing when they are not whole ones of the window.
    fn indices(&self, offset: u64, length: u64) -> io::Result<std::ops::Range<usize>> {
        let end = offset.checked_add(length).filter(|end| *end <= self.bytes());
        match end {
            Some(end) if length > 0 && offset.is_multiple_of(RANGE) && length.is_multiple_of(RANGE) => {
                Ok((offset / RANGE) as usize..(end / RANGE) as usize)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn map(&self, request: &VhostUserMMap, file: File) -> io::Result<()> {
        let (offset, length, from) = (request.shm_offset, request.len, request.fd_offset);
        let indices = self.indices(offset, length)?;
        if request.shmid != REGION || !from.is_multiple_of(PAGE) || from.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let writes = request.flags & VhostUserMMapFlags::WRITABLE.bits() != 0;
        let protection = libc::PROT_READ | if writes { libc::PROT_WRITE } else { 0 };
        let file = Arc::new(file);
        let mut ranges = lock(&self.ranges);
        self.place(offset, length, protection, Some((&file, from)))?;
        for (step, index) in (0u64..).zip(indices) {
            ranges[index] = Some(Mapped { file: Arc::clone(&file), offset: from + step * RANGE });
        }
        Ok(())
    }

    fn unmap(&self, offset: u64, length: u64) -> io::Result<()> {
        let indices = self.indices(offset, length)?;
        let mut ranges = lock(&self.ranges);
        self.place(offset, length, libc::PROT_NONE, None)?;
        indices.for_each(|index| ranges[index] = None);
        Ok(())
    }

    /// Puts a page of zeroes where a vCPU found none, at an offset in the window, when that lies beyond the end of what is
    /// mapped there; whether it does.
    pub fn repair(&self, at: u64) -> bool {
        let ranges = lock(&self.ranges);
        let Some(Some(Mapped { file, offset })) = ranges.get((at / RANGE) as usize) else { return false };
        let place = at / PAGE * PAGE;
        let is_beyond = (&**file).seek(SeekFrom::End(0)).is_ok_and(|end| offset + place % RANGE >= end);
        is_beyond && self.place(place, PAGE, libc::PROT_READ | libc::PROT_WRITE, None).is_ok()
    }

    /// Maps a range of a file, or memory that nobody else has, in the place of what is there.
    fn place(&self, at: u64, length: u64, protection: i32, file: Option<(&File, u64)>) -> io::Result<()> {
        let address = self.address().wrapping_add(at as usize).cast();
        let (descriptor, offset, kind) = match file {
            Some((file, offset)) => (file.as_raw_fd(), offset.cast_signed(), libc::MAP_SHARED),
            None => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        // SAFETY: callers have checked that this is a part of the window, which is the guest's: we never read or write it
        // but by system calls, which fail where nothing is.
        let placed = unsafe { libc::mmap(address, length as usize, protection, kind | libc::MAP_FIXED, descriptor, offset) };
        if placed == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Serves what the file server asks of a window, in a thread of its own.
///
/// # Errors
/// When no thread or socket can be had.
pub fn serve(window: &Arc<FileWindow>, control: &Arc<Control>) -> io::Result<OwnedFd> {
    let mut requests = FrontendReqHandler::new(Arc::new(Server(Arc::clone(window)))).map_err(io::Error::other)?;
    requests.set_reply_ack_flag(true);
    // SAFETY: it is open, as the handler is there; the copy is ours alone.
    let servers_end = unsafe { libc::fcntl(requests.get_tx_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if servers_end < 0 {
        return Err(io::Error::last_os_error());
    }
    let control = Arc::clone(control);
    std::thread::Builder::new().name("files".into()).spawn(move || {
        if let Err(error) = filters::files() {
            stop(&control, Stopped::Failed(format!("{:#}", anyhow::Error::from(error))));
        }
        loop {
            match requests.handle_request() {
                // What cannot be mapped the server hears of.
                Ok(_) | Err(Error::ReqHandlerError(_)) => {}
                Err(error) => stop(&control, Stopped::Failed(format!("map files for the guest: {error}"))),
            }
        }
    })?;
    // SAFETY: it was just made.
    Ok(unsafe { OwnedFd::from_raw_fd(servers_end) })
}

/// The window as the vhost-user conversation has it.
struct Server(Arc<FileWindow>);

impl VhostUserFrontendReqHandler for Server {
    fn shmem_map(&self, request: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        // SAFETY: the descriptor is open for as long as the call goes on.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(file.as_raw_fd()) };
        self.0.map(request, File::from(file.try_clone_to_owned()?)).map(|()| 0)
    }

    fn shmem_unmap(&self, request: &VhostUserMMap) -> HandlerResult<u64> {
        self.0.unmap(request.shm_offset, request.len).map(|()| 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; bytes]).unwrap();
        file
    }

    fn request(at: u64, length: u64, from: u64, flags: VhostUserMMapFlags) -> VhostUserMMap {
        VhostUserMMap { shm_offset: at, len: length, fd_offset: from, flags: flags.bits(), ..VhostUserMMap::default() }
    }

    /// Reads as a device does, by a system call that fails where nothing is.
    fn read(window: &FileWindow, at: u64) -> Option<u8> {
        let (mut out, input) = io::pipe().unwrap();
        // SAFETY: the kernel checks the address.
        let count = unsafe { libc::write(input.as_raw_fd(), window.address().wrapping_add(at as usize).cast(), 1) };
        let mut byte = [0];
        (count == 1).then(|| io::Read::read_exact(&mut out, &mut byte).map(|()| byte[0]).unwrap())
    }

    #[test]
    fn a_file_is_seen_where_it_was_mapped_until_it_is_taken_away() {
        let window = FileWindow::new(8).unwrap();
        assert_eq!((window.bytes(), read(&window, 0)), (8 << 20, None));
        window.map(&request(RANGE, 2 * RANGE, 0, VhostUserMMapFlags::empty()), file(3 << 20)).unwrap();
        assert_eq!([0, RANGE, 2 * RANGE, 3 * RANGE].map(|at| read(&window, at)), [None, Some(7), Some(7), None]);
        window.unmap(RANGE, RANGE).unwrap();
        assert_eq!([RANGE, 2 * RANGE].map(|at| read(&window, at)), [None, Some(7)]);
    }

    #[test]
    fn what_does_not_fit_the_window_is_refused() {
        let window = FileWindow::new(4).unwrap();
        let none = VhostUserMMapFlags::empty();
        let bad = [(0, 0, 0), (1, RANGE, 0), (0, RANGE - PAGE, 0), (RANGE, 2 * RANGE, 0), (u64::MAX - RANGE + 1, RANGE, 0), (0, RANGE, 1)];
        for (at, length, from) in bad.into_iter().chain([(0, RANGE, i64::MAX as u64 - PAGE + 1), (0, u64::MAX - RANGE + 1, 0)]) {
            assert!(window.map(&request(at, length, from, none), file(4096)).is_err(), "{at} {length} {from}");
            assert!(from != 0 || window.unmap(at, length).is_err(), "{at} {length}");
        }
        assert!(window.map(&VhostUserMMap { shmid: 1, ..request(0, RANGE, 0, none) }, file(4096)).is_err());
        assert_eq!(read(&window, 0), None);
    }

    #[test]
    fn beyond_the_end_of_a_file_that_became_shorter_zeroes_are_read() {
        let window = FileWindow::new(4).unwrap();
        let (cut, short) = (file(2 << 20), file(5));
        let writable = VhostUserMMapFlags::WRITABLE;
        window.map(&request(0, RANGE, 0, writable), cut.try_clone().unwrap()).unwrap();
        window.map(&request(RANGE, RANGE, 0, writable), short.try_clone().unwrap()).unwrap();
        assert!(!window.repair(2 * PAGE), "that page is the file's");
        cut.set_len(PAGE + 1).unwrap();
        assert_eq!(read(&window, 2 * PAGE), None);
        assert!(window.repair(2 * PAGE + 7));
        assert_eq!([0, PAGE, 2 * PAGE, 3 * PAGE].map(|at| read(&window, at)), [Some(7), Some(7), Some(0), None]);
        // Nobody has touched what lies beyond the end of the other one: it is the file's when that grows.
        short.set_len(2 * PAGE).unwrap();
        assert_eq!(read(&window, RANGE + PAGE), Some(0));
        assert!(!window.repair(RANGE + PAGE) && !window.repair(4 * RANGE));
    }
}
