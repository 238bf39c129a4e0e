//! The entropy device (virtio 1.2, 5.4): fills what the driver offers with the host's random bytes.

use std::io::{self, Write};
use std::sync::Arc;

use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, BUDGET, Chain};
use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// The most bytes a request gets; the driver asks again for more.
const MAX_BYTES: usize = 4096;

/// The device's front; the device thread serves its queue.
pub struct Rng {
    thread: Commands,
}

impl Rng {
    /// A device whose queue the thread behind `thread` serves.
    pub fn new(thread: Commands) -> Self {
        Self { thread }
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.thread.send(Command::Activate(Server::Rng, activation)).map_err(|source| ActivateError { device: "rng", source })
    }
}

/// The queue of a device in service.
pub struct RngServer {
    queue: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl RngServer {
    /// Takes the queue over.
    ///
    /// # Errors
    /// When the activation holds none.
    pub fn new(activation: Activation) -> io::Result<Self> {
        let queue = activation.queues.into_iter().next().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { queue, memory: activation.memory, interrupt: activation.interrupt })
    }

    /// The notification of the queue.
    pub fn kick(&self) -> &impl std::os::fd::AsRawFd {
        self.queue.kick()
    }

    /// Serves the requests that are available, at most [`BUDGET`] at a time.
    pub fn serve(&mut self) {
        self.queue.clear_kick();
        for served in 1.. {
            let Some(chain) = self.queue.next(&self.memory) else { break };
            let head = chain.head_index();
            let written = fill(&self.memory, chain);
            self.queue.give_back(&self.memory, head, written);
            if served == BUDGET {
                self.queue.come_back();
                break;
            }
        }
        self.queue.signal(&self.memory, &self.interrupt);
    }
}

fn fill(memory: &GuestMemory, chain: Chain<'_>) -> u32 {
    let Ok(mut writer) = chain.writer(memory) else { return 0 };
    let mut bytes = [0; MAX_BYTES];
    let wanted = writer.available_bytes().min(MAX_BYTES);
    let Ok(()) = getrandom::fill(&mut bytes[..wanted]) else { return 0 };
    writer.write(&bytes[..wanted]).map_or(0, |written| written as u32)
}
