//! The memory device (virtio 1.2, 5.15): memory that the guest takes and gives back in blocks.
//!
//! ```text
//! hidden -> shown (the shim wants memory added for the first time) -> in service
//! block:   unplugged -> plugged (PLUG, while less than requested is) -> unplugged (UNPLUG, its pages gone)
//! ```
//!
//! Until memory is wanted the device reads as id 0, the transport's placeholder (4.2.2), like an
//! empty place for a network interface, and costs a start nothing. The region's file is no larger
//! than what the guest may reach: what lies behind faults.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_protocol::vmm::ADDED_MIB_STEP;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, BUDGET, Chain};
use super::{ActivateError, Activation, Interrupt, VirtioDevice, read_config_bytes};
use crate::memory::{self, GuestMemory};

const DEVICE_ID: u32 = 24;
const QUEUE_SIZES: [u16; 1] = [64];
/// The driver does not touch what it has not plugged (5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Bytes of a block, a huge page; and of a step of the region.
const BLOCK: u64 = 2 << 20;
const STEP: u64 = ADDED_MIB_STEP << 20;

/// Requests and answers (5.15.6).
const REQUEST_BYTES: usize = 24;
const ANSWER_BYTES: usize = 10;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// What the device's front, its server and the control thread share.
pub struct Shared {
    start: u64,
    size: u64,
    sizes: Mutex<Sizes>,
}

/// The part of the configuration space that changes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sizes {
    /// The guest may reach: what is requested, and never less than its last plugged block's end, in
    /// steps of what Linux calls a memory block, as it uses none that it may reach in part only.
    usable: u64,
    plugged: u64,
    requested: u64,
    /// Goes up with each change.
    generation: u32,
    /// Whether memory was ever wanted.
    shown: bool,
}

impl Shared {
    /// Of memory at an address, none of which is wanted yet.
    pub fn new(start: u64, size: u64) -> Arc<Self> {
        Arc::new(Self { start, size, sizes: Mutex::default() })
    }

    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to have `bytes` plugged; false when that is more than there is room for.
    pub fn request(&self, bytes: u64) -> bool {
        let mut sizes = self.sizes();
        if bytes > self.size {
            return false;
        }
        sizes.requested = bytes;
        sizes.usable = sizes.usable.max(bytes.next_multiple_of(STEP));
        sizes.generation = sizes.generation.wrapping_add(1);
        sizes.shown = true;
        true
    }
}

/// The device's front; the device thread serves its queue.
pub struct Mem {
    shared: Arc<Shared>,
    thread: Commands,
}

impl Mem {
    /// A device whose queue the thread behind `thread` serves.
    pub fn new(shared: Arc<Shared>, thread: Commands) -> Self {
        Self { shared, thread }
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> u32 {
        if self.shared.sizes().shown { DEVICE_ID } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES | 1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let sizes = *self.shared.sizes();
        // block_size, node_id with padding, addr, region_size, usable, plugged, requested (5.15.4).
        let fields = [BLOCK, 0, self.shared.start, self.shared.size, sizes.usable, sizes.plugged, sizes.requested];
        read_config_bytes(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.sizes().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let command = Command::Activate(Server::Mem, activation);
        self.thread.send(command).map_err(|source| ActivateError { device: "mem", source })
    }
}

/// The queue of a device in service, and the state of its blocks.
pub struct MemServer {
    queue: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    shared: Arc<Shared>,
    /// A bit for each block that is plugged.
    blocks: Vec<u64>,
}

impl MemServer {
    /// Takes the queue over.
    ///
    /// # Errors
    /// When the activation holds none.
    pub fn new(activation: Activation, shared: Arc<Shared>) -> io::Result<Self> {
        let queue = activation.queues.into_iter().next().ok_or(io::ErrorKind::InvalidInput)?;
        let blocks = vec![0; (shared.size / BLOCK).div_ceil(64) as usize];
        Ok(Self { queue, memory: activation.memory, interrupt: activation.interrupt, shared, blocks })
    }

    /// The notification of the queue.
    pub fn kick(&self) -> &impl std::os::fd::AsRawFd {
        self.queue.kick()
    }

    /// Tells the driver that more or less is wanted.
    pub fn requested(&self) {
        self.interrupt.config();
    }

    /// Where what is plugged ends in the region, in bytes: a multiple of [`STEP`].
    pub fn end(&self) -> u64 {
        let last = self.blocks.iter().rposition(|word| *word != 0);
        let end = last.map_or(0, |word| (word as u64 * 64 + u64::from(64 - self.blocks[word].leading_zeros())) * BLOCK);
        end.next_multiple_of(STEP)
    }

    /// Serves the requests that are available, at most [`BUDGET`] at a time.
    pub fn serve(&mut self) {
        self.queue.clear_kick();
        let memory = self.memory.clone();
        for served in 1.. {
            let Some(chain) = self.queue.next(&memory) else { break };
            let head = chain.head_index();
            let written = self.answer(&memory, chain);
            self.queue.give_back(&memory, head, written);
            if served == BUDGET {
                self.queue.come_back();
                break;
            }
        }
        self.queue.signal(&memory, &self.interrupt);
    }

    fn answer(&mut self, memory: &GuestMemory, chain: Chain<'_>) -> u32 {
        let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.writer(memory)) else { return 0 };
        let mut request = [0; REQUEST_BYTES];
        let mut answer = [0; ANSWER_BYTES];
        let (kind, state) = match reader.read_exact(&mut request) {
            Ok(()) => self.execute(&request),
            Err(_) => (ERROR, 0),
        };
        answer[..2].copy_from_slice(&kind.to_le_bytes());
        answer[8..].copy_from_slice(&state.to_le_bytes());
        writer.write(&answer).map_or(0, |written| written as u32)
    }

    /// Does what a request asks for; the kind of the answer, and the state that one asked for.
    fn execute(&mut self, request: &[u8; REQUEST_BYTES]) -> (u16, u16) {
        let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let kind = half(0);
        if kind == UNPLUG_ALL {
            self.unplug(0..self.blocks.len() as u64 * 64);
            return (ACK, 0);
        }
        let mut address = [0; 8];
        address.copy_from_slice(&request[8..16]);
        let Some(blocks) = self.range(u64::from_le_bytes(address), half(16)) else { return (ERROR, 0) };
        let plugged = blocks.clone().filter(|block| self.is_plugged(*block)).count() as u64;
        let (count, sizes) = (blocks.end - blocks.start, *self.shared.sizes());
        match kind {
            PLUG if plugged > 0 => (ERROR, 0),
            PLUG if sizes.plugged + count * BLOCK > sizes.requested => (NACK, 0),
            PLUG => {
                for block in blocks {
                    self.blocks[block as usize / 64] |= 1 << (block % 64);
                }
                self.account();
                (ACK, 0)
            }
            UNPLUG if plugged < count => (ERROR, 0),
            UNPLUG => {
                self.unplug(blocks);
                (ACK, 0)
            }
            STATE if plugged == count => (ACK, STATE_PLUGGED),
            STATE if plugged == 0 => (ACK, STATE_UNPLUGGED),
            STATE => (ACK, STATE_MIXED),
            _ => (ERROR, 0),
        }
    }

    /// The numbers of the blocks from an address on, when the guest may reach all of them.
    fn range(&self, address: u64, count: u16) -> Option<std::ops::Range<u64>> {
        let offset = address.checked_sub(self.shared.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let end = offset.checked_add(u64::from(count) * BLOCK)?;
        (count > 0 && end <= self.shared.sizes().usable).then_some(offset / BLOCK..end / BLOCK)
    }

    fn is_plugged(&self, block: u64) -> bool {
        self.blocks[block as usize / 64] & (1 << (block % 64)) != 0
    }

    /// Takes blocks back with what is in them.
    fn unplug(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            if self.is_plugged(block) {
                self.blocks[block as usize / 64] &= !(1 << (block % 64));
                memory::discard(&self.memory, GuestAddress(self.shared.start + block * BLOCK), BLOCK);
            }
        }
        self.account();
    }

    /// Writes what the blocks come to into the configuration space.
    fn account(&self) {
        let plugged: u64 = self.blocks.iter().map(|word| u64::from(word.count_ones())).sum();
        let mut sizes = self.shared.sizes();
        let before = sizes.usable;
        sizes.plugged = plugged * BLOCK;
        sizes.usable = sizes.requested.next_multiple_of(STEP).max(self.end());
        sizes.generation = sizes.generation.wrapping_add(1);
        if sizes.usable != before {
            self.interrupt.config();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueT};
    use vmm_sys_util::eventfd::EventFd;

    const BLOCKS: u64 = 128;

    /// A device of 256 MiB behind 64 MiB of memory, and where it begins.
    fn device(requested: u64) -> (MemServer, u64) {
        let layout = Layout::new(64, BLOCKS * 2);
        let file = |bytes| {
            let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
            file.set_len(bytes).unwrap();
            file
        };
        let memory = memory::map(file(64 << 20), file(BLOCKS * BLOCK), layout).unwrap();
        let shared = Shared::new(layout.added_start(), layout.added);
        assert!(shared.request(requested * BLOCK));
        let queue = ActiveQueue::new(Queue::new(QUEUE_SIZES[0]).unwrap(), EventFd::new(0).unwrap());
        let activation =
            Activation { features: 0, queues: vec![queue], memory, reach: None, interrupt: Arc::new(Interrupt::new().unwrap()) };
        (MemServer::new(activation, shared).unwrap(), layout.added_start())
    }

    fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST_BYTES] {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        request
    }

    #[test]
    fn a_guest_gets_as_much_as_was_requested_and_no_more() {
        let (mut device, start) = device(4);
        assert_eq!(device.execute(&request(PLUG, start, 3)).0, ACK);
        assert_eq!(device.execute(&request(PLUG, start, 1)).0, ERROR, "plugged already");
        assert_eq!(device.execute(&request(PLUG, start + STEP, 1)).0, ERROR, "out of reach");
        assert_eq!(device.execute(&request(STATE, start, 4)), (ACK, STATE_MIXED));
        assert_eq!((device.shared.sizes().plugged, device.end()), (3 * BLOCK, STEP));
        assert!(device.shared.request(2 * BLOCK));
        assert_eq!(device.execute(&request(PLUG, start + 3 * BLOCK, 1)).0, NACK, "less is wanted by now");
        assert!(!device.shared.request((BLOCKS + 1) * BLOCK), "more than there is room for");
    }

    #[test]
    fn what_a_guest_gives_back_is_empty_and_out_of_reach() {
        use vm_memory::Bytes;
        let (mut device, start) = device(4);
        assert_eq!(device.execute(&request(PLUG, start, 4)).0, ACK);
        let last = GuestAddress(start + 3 * BLOCK);
        device.memory.write_obj(42u8, last).unwrap();
        assert!(device.shared.request(3 * BLOCK));
        assert_eq!(device.execute(&request(UNPLUG, last.0, 1)).0, ACK);
        assert_eq!(device.memory.read_obj::<u8>(last).unwrap(), 0);
        assert_eq!(device.execute(&request(UNPLUG, last.0, 1)).0, ERROR, "not plugged");
        assert!(device.shared.request(0));
        assert_eq!(device.execute(&request(UNPLUG_ALL, 0, 0)).0, ACK);
        let sizes = *device.shared.sizes();
        assert_eq!((sizes.plugged, device.end(), sizes.usable), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn no_request_takes_more_than_was_requested(
            requests in proptest::collection::vec((0u16..5, 0u64..BLOCKS + 2, any::<u16>(), any::<bool>()), 0..50),
            requested in 0..=BLOCKS,
        ) {
            let (mut device, start) = device(requested);
            for (kind, block, count, odd) in requests {
                let address = start.wrapping_add(block.wrapping_sub(1).wrapping_mul(BLOCK)) + u64::from(odd);
                device.execute(&request(kind, address, count % 200));
                prop_assert!(device.shared.sizes().plugged <= requested * BLOCK);
                prop_assert!(device.end() <= (requested * BLOCK).next_multiple_of(STEP));
            }
        }
    }
}
