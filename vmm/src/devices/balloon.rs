//! The balloon (virtio 1.2, 5.5), for one thing: the guest reports which of its memory is free
//! (5.5.6.7), and the host has it back until the guest touches it again.
//!
//! It is never asked to inflate: what a hostile driver puts into those queues stays there unread.

use std::io;
use std::sync::Arc;

use vm_memory::{Address, GuestAddress};

use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, BUDGET};
use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::memory::{self, GuestMemory};

const DEVICE_ID: u32 = 5;
/// Inflate, deflate, and reports: the queues of features that are not offered are left out.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];
/// Free page reporting (5.5.3).
const F_PAGE_REPORTING: u32 = 5;

/// The device's front; the device thread serves its queues.
pub struct Balloon {
    thread: Commands,
    reports: bool,
}

impl Balloon {
    /// A device whose queues the thread behind `thread` serves; without `reports` there is none.
    pub fn new(thread: Commands, reports: bool) -> Self {
        Self { thread, reports }
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        if self.reports { DEVICE_ID } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES | 1 << F_PAGE_REPORTING
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // No pages are wanted.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.thread.send(Command::Activate(Server::Balloon, activation)).map_err(|source| ActivateError { device: "balloon", source })
    }
}

/// The queue of reports.
pub struct BalloonServer {
    reports: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl BalloonServer {
    /// Takes the queue over.
    ///
    /// # Errors
    /// When the activation does not hold it.
    pub fn new(activation: Activation) -> io::Result<Self> {
        let reports = activation.queues.into_iter().nth(2).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { reports, memory: activation.memory, interrupt: activation.interrupt })
    }

    /// The notification of the queue.
    pub fn kick(&self) -> &impl std::os::fd::AsRawFd {
        self.reports.kick()
    }

    /// Takes the reported ranges out of the memory file, at most [`BUDGET`] reports at a time.
    pub fn serve(&mut self) {
        self.reports.clear_kick();
        let memory = self.memory.clone();
        for served in 1.. {
            let Some(chain) = self.reports.next(&memory) else { break };
            let head = chain.head_index();
            for descriptor in chain.writable() {
                memory::discard(&memory, GuestAddress(descriptor.addr().raw_value()), u64::from(descriptor.len()));
            }
            self.reports.give_back(&memory, head, 0);
            if served == BUDGET {
                self.reports.come_back();
                break;
            }
        }
        self.reports.signal(&memory, &self.interrupt);
    }
}
