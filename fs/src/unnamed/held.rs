//! Open files of a bounded number.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many there may be.
pub struct Room {
    most: usize,
    held: AtomicUsize,
}

impl Room {
    /// For so many.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, held: AtomicUsize::new(0) })
    }

    /// Holds one.
    ///
    /// # Errors
    /// `ENFILE` when there are as many as there may be.
    pub fn hold(self: &Arc<Self>, file: OwnedFd) -> io::Result<Arc<Held>> {
        // It is counted first, so that it is taken off again if it is one too many.
        let earlier = self.held.fetch_add(1, Ordering::Relaxed);
        let held = Held { file: file.into(), room: Arc::clone(self) };
        if earlier < self.most { Ok(Arc::new(held)) } else { Err(io::Error::from_raw_os_error(libc::ENFILE)) }
    }
}

/// One of them.
pub struct Held {
    file: File,
    room: Arc<Room>,
}

impl Deref for Held {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.held.fetch_sub(1, Ordering::Relaxed);
    }
}
