//! A queue of a device that is in service, and how its buffers are taken and given back.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::memory::GuestMemory;

/// A split virtqueue (virtio 1.2, 2.7) that its driver has set up, with its notification.
pub struct ActiveQueue {
    queue: Queue,
    kick: EventFd,
}

/// A chain of guest buffers.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

impl ActiveQueue {
    /// A queue whose addresses were checked against guest memory.
    pub fn new(queue: Queue, kick: EventFd) -> Self {
        Self { queue, kick }
    }

    /// The notification: readable when the driver made buffers available.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The addresses and size, for a server in another process.
    pub fn layout(&self) -> &Queue {
        &self.queue
    }

    /// Takes back a notification, before the queue is looked at.
    pub fn clear_kick(&self) {
        // Nothing to take back means another look did it already.
        let _ = self.kick.read();
    }

    /// The next chain that the driver made available.
    pub fn next<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        self.queue.pop_descriptor_chain(memory)
    }

    /// Puts back the chain that was taken last, as when there is nothing to fill it with.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in it.
    pub fn give_back(&mut self, memory: &GuestMemory, head: u16, written: u32) {
        // It fails only for a head or an address that the driver never made valid; the queue was
        // checked when it was set up, so what is lost is the hostile driver's own buffer.
        let _ = self.queue.add_used(memory, head, written);
    }

    /// Asks for notifications again; true when buffers came in meanwhile and must be served first.
    pub fn rearm(&mut self, memory: &GuestMemory) -> bool {
        self.queue.enable_notification(memory).unwrap_or(false)
    }

    /// Interrupts the driver when it asked to be.
    pub fn signal(&mut self, memory: &GuestMemory, interrupt: &Interrupt) {
        if self.queue.needs_notification(memory).unwrap_or(true) {
            interrupt.queue();
        }
    }
}
