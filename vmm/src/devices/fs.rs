//! The file system device (virtio 1.2, 5.11), served by `caisson-fs` over vhost-user.
//!
//! We are the vhost-user front-end: the driver's queues, notifications and interrupt go to the
//! server, which maps guest memory by itself. Once activated, no request passes through us.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use ::vhost::VhostBackend;
use ::vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use ::vhost::vhost_user::{Frontend, VhostUserFrontend};
use caisson_host::control::Control;
use caisson_protocol::guest::SHARE_TAG;
use vm_memory::GuestMemory as _;

use super::files::{self, FileWindow};
use super::{ActivateError, Activation, VirtioDevice, read_config_bytes, vhost};

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
    /// Where the guest has the window for files, and its size.
    window: Option<(u64, u64)>,
}

impl VhostUserFs {
    /// Asks the server for its features, and lets it map files into a window that the guest has at an address.
    ///
    /// # Errors
    /// When the server does not answer in time or as the protocol says.
    pub fn connect(socket: UnixStream, window: Option<(u64, &Arc<FileWindow>)>, control: &Arc<Control>) -> io::Result<Self> {
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut server = Frontend::from_stream(socket, QUEUE_SIZES.len() as u64);
        server.set_owner().map_err(io::Error::other)?;
        let features = server.get_features().map_err(io::Error::other)?;
        let offered = server.get_protocol_features().map_err(io::Error::other)?;
        let maps = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::SHMEM;
        let none = VhostUserProtocolFeatures::empty();
        let wanted = VhostUserProtocolFeatures::REPLY_ACK | if window.is_some() { maps } else { none };
        server.set_protocol_features(offered & wanted).map_err(io::Error::other)?;
        if let Some((_, files)) = window {
            server.set_backend_request_fd(&files::serve(files, control)?).map_err(io::Error::other)?;
        }
        let mut config = vec![0; TAG_BYTES];
        config[..SHARE_TAG.len()].copy_from_slice(SHARE_TAG.as_bytes());
        config.extend_from_slice(&(QUEUE_SIZES.len() as u32 - 1).to_le_bytes());
        Ok(Self { server, features, config, window: window.map(|(address, files)| (address, files.bytes())) })
    }

    fn hand_over(&mut self, activation: &Activation) -> ::vhost::Result<()> {
        let memory = &activation.memory;
        let host = |address| {
            memory
                .get_host_address(vm_memory::GuestAddress(address))
                .map(|host| host as u64)
                .map_err(|_| ::vhost::Error::InvalidGuestMemory)
        };
        let features = activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        vhost::hand_over(&self.server, features, memory, &activation.queues, &activation.interrupt, host)?;
        (0..activation.queues.len()).try_for_each(|index| self.server.set_vring_enable(index, true))
    }
}

impl VirtioDevice for VhostUserFs {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn shared_memory(&self) -> Option<(u64, u64)> {
        self.window
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
