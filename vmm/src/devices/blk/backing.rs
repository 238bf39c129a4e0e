//! What is behind a disk: a device or file of the host, or several of them, one behind the other.
#![expect(unsafe_code, reason = "guest memory is given to the kernel by its address")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use caisson_host::control::Control;
use caisson_protocol::vmm::{Disk, Event};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use vm_memory::VolatileSlice;

use super::request::total;
use super::ring::Ring;
use crate::devices::lock;
use crate::devices::rate::Limiter;

/// Bytes of what the protocol calls a sector, whatever the disk's own are (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of a disk's id.
pub const ID_BYTES: usize = 20;

/// A disk's content and size, which all of its queues share.
pub struct Backing {
    // Closed before they are said to be.
    parts: Vec<Part>,
    sectors: AtomicU64,
    generation: AtomicU32,
    read_only: bool,
    serial: [u8; ID_BYTES],
    /// None without a limit: then the queues do not wait for each other.
    limiter: Option<Mutex<Limiter>>,
    _farewell: Farewell,
}

/// A device or file, and which bytes of the disk are in it. The last one may grow.
struct Part {
    file: File,
    start: u64,
    end: u64,
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

impl Backing {
    /// What is behind a disk, a file for each of its parts; when it is let go the shim hears of it.
    pub fn new(disk: &Disk, files: Vec<File>, control: Arc<Control>) -> Self {
        let mut serial = [0; ID_BYTES];
        serial.iter_mut().zip(disk.serial.bytes()).for_each(|(to, from)| *to = from);
        let mut parts: Vec<Part> = Vec::new();
        let mut size = 0u64;
        for (file, bytes) in files.into_iter().zip(&disk.parts) {
            let start = size;
            size = size.saturating_add(bytes / SECTOR * SECTOR);
            parts.push(Part { file, start, end: size });
        }
        if let Some(last) = parts.last_mut() {
            last.end = u64::MAX;
        }
        Self {
            parts,
            sectors: AtomicU64::new(size / SECTOR),
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

    /// Counts a request of so many bytes.
    pub fn pay(&self, bytes: usize) {
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

    /// By which the guest knows it.
    pub const fn serial(&self) -> &[u8; ID_BYTES] {
        &self.serial
    }

    /// Changes it, to so many bytes.
    pub fn resize(&self, bytes: u64) {
        self.sectors.store(bytes / SECTOR, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Reads what is from a sector on, as much as the buffers hold.
    ///
    /// # Errors
    /// When the disk has not so much there, or its file cannot be read.
    pub fn read(&self, sector: u64, room: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(self.place_of(sector, total(room) as u64)?, room, libc::preadv)
    }

    /// Writes all that the buffers hold from a sector on.
    ///
    /// # Errors
    /// When the disk is read-only, has not so much room there, or its file cannot be written.
    pub fn write(&self, sector: u64, sent: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check_writable()?;
        self.transfer(self.place_of(sector, total(sent) as u64)?, sent, libc::pwritev)
    }

    /// Has what was written on the host's disk.
    ///
    /// # Errors
    /// When that fails.
    pub fn flush(&self) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| part.file.sync_data())
    }

    /// Has the host begin to read what a request will read that waits for its turn.
    pub fn expect(&self, sector: u64, room: &[VolatileSlice<'_>]) {
        if self.limiter.is_some() {
            // It has not been paid for.
            return;
        }
        if let Some((file, at)) = self.within_part(sector, room) {
            // What does not come by this comes when it is read.
            let _ = posix_fadvise(file, at.cast_signed(), total(room) as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        }
    }

    /// Has a ring read as [`Backing::read`] does, when it is of one part; returns what the ring reads until that has ended.
    pub fn start_read(&self, sector: u64, room: &[VolatileSlice<'_>], ring: &mut Ring, key: u64) -> Option<Vec<libc::iovec>> {
        let (file, at) = self.within_part(sector, room)?;
        let vectors = vectors(room);
        // SAFETY: as in `transfer`; who calls keeps the vectors.
        unsafe { ring.read(file, &vectors, at, key) }.then_some(vectors)
    }

    /// Has a ring write as [`Backing::write`] does; as above.
    pub fn start_write(&self, sector: u64, sent: &[VolatileSlice<'_>], ring: &mut Ring, key: u64) -> Option<Vec<libc::iovec>> {
        self.check_writable().ok()?;
        let (file, at) = self.within_part(sector, sent)?;
        let vectors = vectors(sent);
        // SAFETY: as above.
        unsafe { ring.write(file, &vectors, at, key) }.then_some(vectors)
    }

    /// Has a ring do what [`Backing::flush`] does; as above.
    pub fn start_flush(&self, ring: &mut Ring, key: u64) -> Option<Vec<libc::iovec>> {
        let [part] = self.parts.as_slice() else { return None };
        ring.sync(part.file.as_fd(), key).then(Vec::new)
    }

    /// The file in which all that these hold lies from a sector on, and where.
    fn within_part(&self, sector: u64, buffers: &[VolatileSlice<'_>]) -> Option<(BorrowedFd<'_>, u64)> {
        let bytes = total(buffers) as u64;
        let offset = self.place_of(sector, bytes).ok().filter(|_| bytes > 0)?;
        let part = self.parts.iter().find(|part| offset < part.end)?;
        (bytes <= part.end - offset).then(|| (part.file.as_fd(), offset - part.start))
    }

    /// Gives so many sectors back to the host.
    ///
    /// # Errors
    /// When the disk is read-only or has not so many there, or the host cannot do so.
    pub fn discard(&self, sector: u64, count: u64) -> io::Result<()> {
        self.change(sector, count, FallocateFlags::FALLOC_FL_PUNCH_HOLE)
    }

    /// Fills so many sectors with zeroes; they may be given back to the host.
    ///
    /// # Errors
    /// When the disk is read-only or has not so many there, or the host cannot do so.
    pub fn clear(&self, sector: u64, count: u64, may_give_back: bool) -> io::Result<()> {
        // Where a range cannot be given back it is cleared all the same (5.2.6.2).
        if may_give_back && self.discard(sector, count).is_ok() {
            return Ok(());
        }
        self.change(sector, count, FallocateFlags::FALLOC_FL_ZERO_RANGE)
    }

    fn change(&self, sector: u64, count: u64, how: FallocateFlags) -> io::Result<()> {
        self.check_writable()?;
        let length = count.saturating_mul(SECTOR);
        let offset = self.place_of(sector, length)?;
        match self.parts.first() {
            // What can be written is of one part.
            Some(part) if length > 0 => {
                Ok(fallocate(&part.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset.cast_signed(), length.cast_signed())?)
            }
            _ => Ok(()),
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    /// Where on the disk so many bytes from a sector on are, when it has them.
    fn place_of(&self, sector: u64, bytes: u64) -> io::Result<u64> {
        let end = sector.checked_mul(SECTOR).and_then(|start| start.checked_add(bytes));
        let limit = self.sectors().saturating_mul(SECTOR).min(i64::MAX as u64);
        if end.is_some_and(|end| end <= limit) && bytes.is_multiple_of(SECTOR) {
            Ok(sector * SECTOR)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    /// Reads or writes all that the buffers hold, from a byte of the disk on.
    fn transfer(&self, mut offset: u64, buffers: &[VolatileSlice<'_>], call: Call) -> io::Result<()> {
        let mut vectors = vectors(buffers);
        let mut done = 0;
        while done < vectors.len() {
            let part = self.parts.iter().find(|part| offset < part.end).ok_or(io::ErrorKind::UnexpectedEof)?;
            let rest = &mut vectors[done..];
            // What is left may lie in several parts; the last one has no end.
            let piece = (part.end != u64::MAX).then(|| within(rest, part.end - offset));
            let wanted = piece.as_deref().unwrap_or(rest);
            let at = (offset - part.start).cast_signed();
            // SAFETY: each vector is a part of guest memory, which is mapped to the process's end and which
            // only raw accesses like this one go to.
            let count = unsafe { call(part.file.as_raw_fd(), wanted.as_ptr(), wanted.len() as libc::c_int, at) };
            let mut count = match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            };
            offset += count as u64;
            for vector in rest {
                let done_of_it = count.min(vector.iov_len);
                count -= done_of_it;
                vector.iov_base = vector.iov_base.wrapping_byte_add(done_of_it);
                vector.iov_len -= done_of_it;
                done += usize::from(vector.iov_len == 0);
            }
        }
        Ok(())
    }
}

/// Where buffers lie that hold something.
fn vectors(buffers: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    // Guest memory needs no guard: it is mapped as a whole.
    let all = buffers.iter().filter(|buffer| !buffer.is_empty());
    all.map(|buffer| libc::iovec { iov_base: buffer.ptr_guard_mut().as_ptr().cast(), iov_len: buffer.len() }).collect()
}

/// preadv(2) or pwritev(2).
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// The first so many bytes of what these hold.
fn within(vectors: &[libc::iovec], mut most: u64) -> Vec<libc::iovec> {
    let mut piece = Vec::new();
    for vector in vectors {
        let length = (vector.iov_len as u64).min(most);
        if length > 0 {
            piece.push(libc::iovec { iov_base: vector.iov_base, iov_len: length as usize });
        }
        most -= length;
    }
    piece
}
