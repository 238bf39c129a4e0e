//! The entropy device (virtio 1.2, 5.4): fills what the driver offers with the host's random bytes.

use std::io::Write;

use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, Chain};
use super::{ActivateError, Activation, VirtioDevice};
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

/// Serves every request that is available; true when the driver has something to collect.
pub fn serve(queue: &mut ActiveQueue, memory: &GuestMemory) -> bool {
    let mut used = false;
    loop {
        while let Some(chain) = queue.next(memory) {
            let head = chain.head_index();
            let written = fill(memory, chain);
            queue.give_back(memory, head, written);
            used = true;
        }
        if !queue.rearm(memory) {
            return used;
        }
    }
}

fn fill(memory: &GuestMemory, chain: Chain<'_>) -> u32 {
    let Ok(mut writer) = chain.writer(memory) else { return 0 };
    let mut bytes = [0; MAX_BYTES];
    let wanted = writer.available_bytes().min(MAX_BYTES);
    let Ok(()) = getrandom::fill(&mut bytes[..wanted]) else { return 0 };
    writer.write(&bytes[..wanted]).map_or(0, |written| written as u32)
}
