//! A ring by which requests go to the host's kernel many at a time (io_uring(7)).
//!
//! Rings are made before the process is confined, as nobody may make one afterwards, and the kernel takes nothing through
//! them but reads, writes and syncs of what the process has open (`IORING_REGISTER_RESTRICTIONS`).
#![expect(unsafe_code, reason = "the kernel reads and writes guest memory by its address")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

/// The most requests under way in a ring.
pub const DEPTH: u32 = 64;

/// The most threads of the kernel's that a ring has, for what is bounded in time and for what is not.
const WORKERS: u32 = 4;

/// A ring; its descriptor is readable while there are requests that have ended.
pub struct Ring(IoUring);

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Ring {
    /// Makes one that can read, write and sync.
    ///
    /// # Errors
    /// When the host has none, or lets the pod have none (`kernel.io_uring_disabled`).
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(DEPTH)?;
        let submitter = ring.submitter();
        // What the kernel cannot do without waiting its own threads do, which count as the process's. Before Linux 5.15 it has no bound.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS; 2]);
        let kinds = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
        submitter.register_restrictions(&mut kinds.map(Restriction::sqe_op))?;
        submitter.register_enable_rings()?;
        Ok(Self(ring))
    }

    /// Adds a request to read into guest memory.
    ///
    /// # Safety
    /// Until the request has ended, what the vectors name stays mapped and is touched by raw accesses alone, and the vectors
    /// stay where they are.
    pub unsafe fn read(&mut self, file: BorrowedFd<'_>, vectors: &[libc::iovec], offset: u64, key: u64) -> bool {
        let request = opcode::Readv::new(Fd(file.as_raw_fd()), vectors.as_ptr(), vectors.len() as u32).offset(offset).build();
        // SAFETY: as of this function.
        unsafe { self.add(request, key) }
    }

    /// Adds a request to write from guest memory.
    ///
    /// # Safety
    /// As of [`Ring::read`].
    pub unsafe fn write(&mut self, file: BorrowedFd<'_>, vectors: &[libc::iovec], offset: u64, key: u64) -> bool {
        let request = opcode::Writev::new(Fd(file.as_raw_fd()), vectors.as_ptr(), vectors.len() as u32).offset(offset).build();
        // SAFETY: as of this function.
        unsafe { self.add(request, key) }
    }

    /// Adds a request for fdatasync(2).
    pub fn sync(&mut self, file: BorrowedFd<'_>, key: u64) -> bool {
        let request = opcode::Fsync::new(Fd(file.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        // SAFETY: no memory takes part.
        unsafe { self.add(request, key) }
    }

    /// Whether there was room for it.
    unsafe fn add(&mut self, request: squeue::Entry, key: u64) -> bool {
        // SAFETY: as of who calls.
        unsafe { self.0.submission().push(&request.user_data(key)) }.is_ok()
    }

    /// Hands the kernel what was added; whether that was something.
    ///
    /// # Errors
    /// When the kernel does not take it; of the kind [`io::ErrorKind::WouldBlock`] when it may do so later. It stays added.
    pub fn submit(&mut self) -> io::Result<bool> {
        if self.0.submission().is_empty() {
            return Ok(false);
        }
        let later = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM | libc::EBUSY | libc::EINTR));
        match self.0.submit() {
            Err(error) if !later(&error) => Err(error),
            // It may have taken some.
            _ if self.0.submission().is_empty() => Ok(true),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// The next request that has ended: its key, and what the system call would have returned or minus its error.
    pub fn next_ended(&mut self) -> Option<(u64, i32)> {
        self.0.completion().next().map(|ended| (ended.user_data(), ended.result()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_ring_takes_nothing_but_reads_writes_and_syncs() {
        let mut ring = Ring::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(ring.sync(file.as_fd(), 1));
        // SAFETY: no memory takes part.
        assert!(unsafe { ring.add(opcode::Nop::new().build(), 2) });
        // SAFETY: as above.
        assert!(unsafe { ring.add(opcode::Fallocate::new(Fd(file.as_raw_fd()), 4096).build(), 3) });
        // SAFETY: as above.
        let linked = opcode::Fsync::new(Fd(file.as_raw_fd())).build().flags(squeue::Flags::IO_LINK);
        assert!(unsafe { ring.add(linked, 4) });
        let mut ended = Vec::new();
        while ended.len() < 4 {
            // What is refused ends a submission.
            assert!(ring.submit().is_ok() || !ring.0.submission().is_empty());
            ended.extend(std::iter::from_fn(|| ring.next_ended()));
        }
        ended.sort_unstable();
        assert_eq!(ended, [(1, 0), (2, -libc::EACCES), (3, -libc::EACCES), (4, -libc::EACCES)]);
        assert!(ring.0.submitter().register_files(&[file.as_raw_fd()]).is_err());
    }
}
