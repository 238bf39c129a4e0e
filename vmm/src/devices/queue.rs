//! A queue of a device that is in service, and how its buffers are taken and given back.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::memory::GuestMemory;

/// A split virtqueue (virtio 1.2, 2.7) that its driver has set up, with its notification.
pub struct ActiveQueue {
    queue: Queue,
    kick: EventFd,
    /// Where the used ring ended when the driver was last considered for an interrupt.
    signalled: u16,
}

/// The used ring (virtio 1.2, 2.7.8): bytes before its elements, and of each.
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// The available ring (2.7.6): bytes before its elements, and of each; `used_event` comes after them.
const AVAIL_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;

/// A chain of guest buffers.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// Buffers that a chain may have, in an indirect table, too: those of a disk's longest request, and its header and status.
pub const MAX_BUFFERS: usize = 2 * 1024 + 2;
/// Chains of one queue that a device serves before it looks at the others.
pub const BUDGET: usize = 64;

/// The buffers of a chain that a device writes to, read once; `None` when they are more than a chain may have, or one has
/// no room (virtio 1.2, 2.7.5: a driver has no use for either).
pub fn writable_buffers(chain: Chain<'_>) -> Option<Vec<(GuestAddress, u32)>> {
    let mut buffers = Vec::new();
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_BUFFERS || descriptor.len() == 0 {
            return None;
        }
        if descriptor.is_write_only() {
            buffers.push((descriptor.addr(), descriptor.len()));
        }
    }
    Some(buffers)
}

/// Whether a chain has as many buffers as one may have, and none without room.
fn is_sound(chain: &Chain<'_>) -> bool {
    let mut count = 0;
    chain.clone().all(|descriptor| {
        count += 1;
        descriptor.len() > 0 && count <= MAX_BUFFERS
    })
}

impl ActiveQueue {
    /// A queue whose addresses were checked against guest memory.
    pub fn new(queue: Queue, kick: EventFd) -> Self {
        Self { signalled: queue.next_used(), queue, kick }
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

    /// The next chain that the driver made available; when there is none, the driver notifies of the next.
    pub fn next<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        if let Some(chain) = self.take(memory) {
            return Some(chain);
        }
        // Buffers may have come in before notifications were asked for. One look: a driver whose
        // index makes no sense has some for ever.
        let more = self.queue.enable_notification(memory).unwrap_or(false);
        more.then(|| self.take(memory)).flatten()
    }

    /// The next chain; when there is none, the driver does not hear that it is to notify. Chains that no driver makes are
    /// given back with nothing in them, at most a queue of them at a time.
    pub fn take<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        for _ in 0..self.queue.size() {
            let chain = self.queue.pop_descriptor_chain(memory)?;
            if is_sound(&chain) {
                return Some(chain);
            }
            self.give_back(memory, chain.head_index(), 0);
        }
        None
    }

    /// Has the device come back to the queue, when it has served [`BUDGET`] chains and there may be more.
    pub fn come_back(&self) {
        // It fails only when the device is to come back already.
        let _ = self.kick.write(1);
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

    /// Gives back the chains of one packet, each with the bytes in it, so that the driver sees either
    /// none of them or all (5.1.6.4.1).
    pub fn give_back_together(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) {
        let Some(((last, written), rest)) = chains.split_last() else { return };
        for (head, written) in rest {
            let slot = u64::from(self.queue.next_used() % self.queue.size());
            let address = GuestAddress(self.queue.used_ring().saturating_add(USED_HEADER + USED_ELEMENT * slot));
            // As above, it fails only for a hostile driver.
            let _ = memory.write_obj(u64::from(*head) | u64::from(*written) << 32, address);
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.give_back(memory, *last, *written);
    }

    /// Interrupts the driver when buffers were given back and it asked to hear of them.
    pub fn signal(&mut self, memory: &GuestMemory, interrupt: &Interrupt) {
        if self.wants_interrupt(memory) {
            interrupt.queue();
        }
    }

    /// Whether the driver's `used_event` lies among the elements that were added since this was last
    /// asked (2.7.10).
    fn wants_interrupt(&mut self, memory: &GuestMemory) -> bool {
        let (old, new) = (self.signalled, self.queue.next_used());
        self.signalled = new;
        if new == old {
            return false;
        }
        if !self.queue.event_idx_enabled() {
            return true;
        }
        // What was added must be seen before the driver's answer to it is read.
        fence(Ordering::SeqCst);
        let end = AVAIL_HEADER + AVAIL_ELEMENT * u64::from(self.queue.size());
        let event = memory.load::<u16>(GuestAddress(self.queue.avail_ring().saturating_add(end)), Ordering::Relaxed);
        event.map_or(true, |event| new.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < new.wrapping_sub(old))
    }
}
