//! A network interface that the host's kernel serves (Linux `include/uapi/linux/vhost.h`): frames go
//! between guest memory and the tap without us.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use ::vhost::VhostBackend;
use ::vhost::vhost_kern::VhostKernBackend;

use super::queue::ActiveQueue;
use super::{Interrupt, vhost};
use crate::memory::GuestMemory;

/// `struct vhost_vring_file`.
#[repr(C)]
pub struct VringFile {
    index: u32,
    fd: i32,
}

nix::ioctl_write_ptr!(
    /// `VHOST_NET_SET_BACKEND`: where the frames of a queue go.
    set_backend, 0xaf, 0x30, VringFile
);

/// The kernel's server of one interface; it ends when this is dropped.
pub struct VhostNet {
    device: File,
    memory: Arc<GuestMemory>,
}

impl VhostNet {
    /// Hands a pair of queues over; their frames go to and come from a tap, whose frames begin with the
    /// header that the queues' have.
    ///
    /// # Errors
    /// When the kernel refuses.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    pub fn start(
        device: File,
        tap: &File,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        interrupt: &Interrupt,
    ) -> io::Result<Self> {
        let server = Self { device, memory: Arc::new(memory.clone()) };
        let set_up = || {
            server.set_owner()?;
            // The others are between the driver and the tap.
            vhost::hand_over(&server, features & server.get_features()?, memory, queues, interrupt, Ok)
        };
        set_up().map_err(io::Error::other)?;
        for (index, _) in (0u32..).zip(queues) {
            let backend = VringFile { index, fd: tap.as_raw_fd() };
            // SAFETY: the kernel reads the structure during the call; it keeps the tap open by itself.
            unsafe { set_backend(server.as_raw_fd(), &raw const backend) }?;
        }
        Ok(server)
    }
}

impl AsRawFd for VhostNet {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl VhostKernBackend for VhostNet {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}
