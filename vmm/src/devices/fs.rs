//! The file system device (virtio 1.2, 5.11), served by `caisson-fs` over vhost-user.
//!
//! We are the vhost-user front-end: the driver's queues, notifications and interrupt go to the
//! server, which maps guest memory by itself. Once activated, no request passes through us.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use caisson_protocol::guest::SHARE_TAG;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};

use super::queue::ActiveQueue;
use super::{ActivateError, Activation, Interrupt, VirtioDevice, read_config_bytes};
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 26;
/// High priority (forget, interrupt), and requests.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// `struct virtio_fs_config`: a tag of 36 bytes, then the number of request queues.
const TAG_BYTES: usize = 36;
/// For one answer of the server, which is on the same host.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The device's front and its conversation with the server.
pub struct VhostUserFs {
    server: Frontend,
    features: u64,
    config: Vec<u8>,
}

impl VhostUserFs {
    /// Asks the server for its features.
    ///
    /// # Errors
    /// When the server does not answer in time or as the protocol says.
    pub fn connect(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut server = Frontend::from_stream(socket, QUEUE_SIZES.len() as u64);
        server.set_owner().map_err(io::Error::other)?;
        let features = server.get_features().map_err(io::Error::other)?;
        let offered = server.get_protocol_features().map_err(io::Error::other)?;
        server.set_protocol_features(offered & VhostUserProtocolFeatures::REPLY_ACK).map_err(io::Error::other)?;
        let mut config = vec![0; TAG_BYTES];
        config[..SHARE_TAG.len()].copy_from_slice(SHARE_TAG.as_bytes());
        config.extend_from_slice(&(QUEUE_SIZES.len() as u32 - 1).to_le_bytes());
        Ok(Self { server, features, config })
    }

    fn hand_over(&mut self, activation: &Activation) -> vhost::Result<()> {
        self.server.set_features(activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())?;
        self.server.set_mem_table(&regions(&activation.memory)?)?;
        for (index, queue) in activation.queues.iter().enumerate() {
            self.hand_over_queue(index, queue, &activation.memory, &activation.interrupt)?;
        }
        Ok(())
    }

    fn hand_over_queue(&mut self, index: usize, queue: &ActiveQueue, memory: &GuestMemory, interrupt: &Interrupt) -> vhost::Result<()> {
        let layout = queue.layout();
        self.server.set_vring_num(index, layout.size())?;
        let host = |address| {
            memory.get_host_address(vm_memory::GuestAddress(address)).map(|host| host as u64).map_err(|_| vhost::Error::InvalidGuestMemory)
        };
        let config = VringConfigData {
            queue_max_size: layout.max_size(),
            queue_size: layout.size(),
            flags: 0,
            desc_table_addr: host(layout.desc_table())?,
            used_ring_addr: host(layout.used_ring())?,
            avail_ring_addr: host(layout.avail_ring())?,
            log_addr: None,
        };
        self.server.set_vring_addr(index, &config)?;
        self.server.set_vring_base(index, 0)?;
        self.server.set_vring_call(index, interrupt.eventfd())?;
        self.server.set_vring_kick(index, queue.kick())?;
        self.server.set_vring_enable(index, true)
    }
}

/// Guest memory as the server maps it.
fn regions(memory: &GuestMemory) -> vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    memory
        .iter()
        .map(|region| {
            let file = region.file_offset().ok_or(vhost::Error::InvalidGuestMemory)?;
            Ok(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: file.start(),
                mmap_handle: std::os::fd::AsRawFd::as_raw_fd(file.file()),
            })
        })
        .collect()
}

impl VirtioDevice for VhostUserFs {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.hand_over(&activation).map_err(|error| ActivateError { device: "virtio-fs", source: io::Error::other(error) })
    }
}
