//! Files that the guest has mapped: the requests by which it does that (linux/fuse.h, `FUSE_SETUPMAPPING` and
//! `FUSE_REMOVEMAPPING`), passed on to the monitor.
//!
//! ```text
//! guest: map this file here ──► the file is opened ──► monitor: maps it into the guest's window ──► answered
//! ```
//!
//! What is mapped is the host's own memory of the file: it is there once, for all pods and the host.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::Context;
use virtiofsd::fuse::{ATTR_DAX, Attr, InHeader, Opcode, RemovemappingIn, RemovemappingOne, SetupmappingFlags, SetupmappingIn};

use crate::request::{answer, read};

/// From this size on a file is mapped: each takes a range of the window, of 2 MiB (`FUSE_DAX_SHIFT` of Linux), however
/// small it is.
const LEAST_BYTES: u64 = 512 << 10;
/// Of the guest's memory.
const PAGE_BYTES: u32 = 4096;
/// The most mappings that one request removes: more than there are in a window.
const MOST_REMOVED: u32 = 4096;

/// Opens a file that the guest knows, to be written or not.
type Open = Box<dyn Fn(Context, u64, bool) -> io::Result<File> + Send + Sync>;

/// The window, as the file server sees it.
pub struct Dax {
    open: Open,
    monitor: OnceLock<Backend>,
}

impl Dax {
    /// A window into which files go that `open` opens.
    pub fn new(open: impl Fn(Context, u64, bool) -> io::Result<File> + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open), monitor: OnceLock::new() }
    }

    /// Takes the way to the monitor.
    pub fn connect(&self, monitor: Backend) {
        // There is one conversation.
        let _ = self.monitor.set(monitor);
    }

    /// Whether a request is one about the window.
    pub const fn serves(kind: Option<Opcode>) -> bool {
        matches!(kind, Some(Opcode::SetupMapping | Opcode::RemoveMapping))
    }

    /// Answers such a request; returns the length of the answer.
    ///
    /// # Errors
    /// When the request has no header, or its answer no room.
    pub fn answer(&self, mut request: Reader<'_>, mut room: Writer<'_>) -> io::Result<usize> {
        let header: InHeader = read(&mut request)?;
        let outcome = if header.opcode == Opcode::SetupMapping as u32 { self.map(header, &mut request) } else { self.remove(&mut request) };
        answer(&mut room, header.unique, outcome.map(|()| []))
    }

    fn map(&self, header: InHeader, request: &mut Reader<'_>) -> io::Result<()> {
        let wanted: SetupmappingIn = read(request)?;
        let writes = wanted.flags & SetupmappingFlags::WRITE.bits() != 0;
        let file = (self.open)(Context::from(header), header.nodeid, writes)?;
        let flags = if writes { VhostUserMMapFlags::WRITABLE } else { VhostUserMMapFlags::empty() };
        let place = VhostUserMMap {
            fd_offset: wanted.foffset,
            shm_offset: wanted.moffset,
            len: wanted.len,
            flags: flags.bits(),
            ..Default::default()
        };
        self.monitor()?.shmem_map(&place, &file).map(drop)
    }

    fn remove(&self, request: &mut Reader<'_>) -> io::Result<()> {
        let RemovemappingIn { count } = read(request)?;
        if count > MOST_REMOVED {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        for _ in 0..count {
            let RemovemappingOne { moffset, len } = read(request)?;
            self.monitor()?.shmem_unmap(&VhostUserMMap { shm_offset: moffset, len, ..Default::default() })?;
        }
        Ok(())
    }

    fn monitor(&self) -> io::Result<&Backend> {
        self.monitor.get().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// Says of a file whether the guest is to map it, and that it is made of pages, whatever its file system reads best: of files
/// that are not, Linux never gives back what it has mapped (`dax_writeback_mapping_range`), until there is no room in the window.
pub const fn mark(attr: &mut Attr) {
    if attr.mode & libc::S_IFMT != libc::S_IFREG {
        return;
    }
    attr.blksize = PAGE_BYTES;
    if attr.size >= LEAST_BYTES {
        attr.flags |= ATTR_DAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_made_of_pages_and_large_ones_are_mapped() {
        let marked = |mode, size| {
            let mut attr = Attr { mode, size, blksize: 1 << 20, ..Attr::default() };
            mark(&mut attr);
            (attr.blksize, attr.flags)
        };
        assert_eq!(marked(libc::S_IFREG | 0o644, LEAST_BYTES), (PAGE_BYTES, ATTR_DAX));
        assert_eq!(marked(libc::S_IFREG | 0o644, LEAST_BYTES - 1), (PAGE_BYTES, 0));
        assert_eq!(marked(libc::S_IFDIR | 0o755, LEAST_BYTES), (1 << 20, 0));
    }
}
