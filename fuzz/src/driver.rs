//! A driver's side of a virtqueue, with rings that the target can spoil at any time: they lie in
//! guest memory, where what it writes goes.

use std::sync::OnceLock;

use caisson_vmm::devices::queue::ActiveQueue;
use caisson_vmm::memory::{self, GuestMemory, Layout};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::Input;

/// Guest memory: what the rings lie in, and data.
pub const MEMORY_BYTES: u64 = 1 << 20;
/// Room for memory that is added.
pub const ADDED_BYTES: u64 = 256 << 20;
/// Entries of a queue.
pub const SIZE: u16 = 16;
/// Where the data of descriptors lies by default, behind all rings.
pub const DATA: u64 = 0x8_0000;

/// Bytes of a queue's rings, and where its parts are within them.
const QUEUE_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Flags of a descriptor (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The memory of a guest, as the monitor maps it, with nothing in it. There is one, as the monitor never
/// unmaps it.
pub fn memory() -> GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    let memory = MEMORY.get_or_init(map);
    for (start, bytes) in [(0, MEMORY_BYTES), (layout().added_start(), ADDED_BYTES)] {
        memory::discard(memory, GuestAddress(start), bytes);
    }
    memory.clone()
}

fn map() -> GuestMemory {
    let file = |bytes| {
        let fd = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty()).expect("a memory file");
        let file = std::fs::File::from(fd);
        file.set_len(bytes).expect("a memory file has any size");
        file
    };
    memory::map(file(MEMORY_BYTES), file(ADDED_BYTES), layout()).expect("guest memory can be mapped")
}

/// Where its parts lie.
pub fn layout() -> Layout {
    Layout { low: MEMORY_BYTES, high: 0, added: ADDED_BYTES }
}

/// The rings of one queue, by its number.
#[derive(Clone, Copy)]
pub struct Rings {
    /// Where they begin.
    pub base: u64,
    /// The next free descriptor, and entry of the available ring.
    next: u16,
    offered: u16,
}

impl Rings {
    /// Those of a queue, which every queue has its own of.
    pub fn new(queue: u64) -> Self {
        Self { base: 0x1000 + QUEUE_BYTES * queue, next: 0, offered: 0 }
    }

    /// The addresses of descriptors, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + AVAILABLE, self.base + USED]
    }

    /// As the transport hands it over.
    pub fn queue(&self, memory: &GuestMemory) -> ActiveQueue {
        let mut queue = Queue::new(SIZE).expect("a size that virtio knows");
        let [descriptors, available, used] = self.addresses();
        queue.set_desc_table_address(Some(descriptors as u32), Some(0));
        queue.set_avail_ring_address(Some(available as u32), Some(0));
        queue.set_used_ring_address(Some(used as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        ActiveQueue::new(queue, EventFd::new(nix::libc::EFD_NONBLOCK).expect("an eventfd"))
    }

    /// Offers one chain: buffers by address, length, and whether the device writes them.
    pub fn offer(&mut self, memory: &impl Bytes<GuestAddress>, buffers: &[(u64, u32, bool)]) {
        let head = self.next % SIZE;
        for (index, (address, length, written)) in buffers.iter().enumerate() {
            let slot = self.next % SIZE;
            self.next = self.next.wrapping_add(1);
            let flags = if index + 1 < buffers.len() { NEXT } else { 0 } | if *written { WRITE } else { 0 };
            let at = GuestAddress(self.base + 16 * u64::from(slot));
            let descriptor =
                u128::from(*address) | u128::from(*length) << 64 | u128::from(flags) << 96 | u128::from(self.next % SIZE) << 112;
            let _ = memory.write_slice(&descriptor.to_le_bytes(), at);
        }
        let ring = self.base + AVAILABLE;
        let _ = memory.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(self.offered % SIZE)));
        self.offered = self.offered.wrapping_add(1);
        let _ = memory.write_obj(self.offered, GuestAddress(ring + 2));
    }

    /// Offers a chain as the input says, of four buffers at most.
    pub fn offer_any(&mut self, memory: &impl Bytes<GuestAddress>, input: &mut Input<'_>) {
        let buffers: Vec<_> = (0..=input.u8() % 4).map(|_| any_buffer(input)).collect();
        self.offer(memory, &buffers);
    }
}

/// Mostly within memory, sometimes anywhere.
fn any_buffer(input: &mut Input<'_>) -> (u64, u32, bool) {
    let kind = input.u8();
    let (address, length) =
        if kind & 0x80 == 0 { (DATA + u64::from(input.u16()), u32::from(input.u16())) } else { (input.u64(), input.u32()) };
    (address, length, kind & 1 != 0)
}

/// Writes what the input holds anywhere into memory, the rings included.
pub fn scribble(memory: &impl Bytes<GuestAddress>, input: &mut Input<'_>) {
    let address = u64::from(input.u32()) % MEMORY_BYTES;
    let count = usize::from(input.u8());
    let _ = memory.write(input.bytes(count), GuestAddress(address));
}
