//! Register windows as memory: what a driver reads there it reads without leaving the guest.
//!
//! An interrupt of a virtio-mmio device is a read of its status register and a write that acknowledges
//! it (virtio 1.2, 4.2.2), and each would be an exit to this process, two for every request of the
//! guest. Of devices whose registers change with the driver's own writes alone, and when we say so, the
//! window is memory that the guest can read and not write: a write still comes to the transport, or to
//! the eventfd that it is meant for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::MMIO_SIZE;

/// The windows of some devices, one after the other.
pub struct Windows(Arc<MmapRegion>);

impl Windows {
    /// Empty windows.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(count: usize) -> io::Result<Self> {
        MmapRegion::new(count * MMIO_SIZE as usize).map(|region| Self(Arc::new(region))).map_err(io::Error::other)
    }

    /// The address of the first in this process, for KVM; it is good as long as a window is there.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.0.size() as u64
    }

    /// What the guest reads in one of them.
    #[cfg(test)]
    pub fn shown(&self, index: usize, offset: u64) -> u32 {
        u32::from_le(self.0.as_volatile_slice().load(index * MMIO_SIZE as usize + offset as usize, Ordering::Acquire).unwrap())
    }

    /// One of them, by its number.
    pub fn window(&self, index: usize) -> Window {
        Window { all: Arc::clone(&self.0), start: index * MMIO_SIZE as usize }
    }
}

/// The window of a device.
pub struct Window {
    all: Arc<MmapRegion>,
    start: usize,
}

impl Window {
    /// Shows a register's value.
    pub fn show(&self, offset: u64, value: u32) {
        // It fails only beyond the windows, where no register is.
        let _ = self.all.as_volatile_slice().store(value.to_le(), self.start + offset as usize, Ordering::Release);
    }

    /// Shows bytes of the configuration space.
    pub fn show_bytes(&self, offset: u64, bytes: &[u8]) {
        let _ = self.all.as_volatile_slice().write_slice(bytes, self.start + offset as usize);
    }
}
