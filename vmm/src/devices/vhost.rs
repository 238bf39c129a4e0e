//! What is the same for every device whose queues are served outside of our process, by another one
//! (vhost-user) or by the host's kernel (vhost): who serves it maps guest memory, waits for the driver's
//! notifications, and interrupts the driver.

use std::os::fd::AsRawFd;

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, FileOffset, GuestMemory as _, GuestMemoryRegion};

use super::Interrupt;
use super::queue::ActiveQueue;
use crate::memory::GuestMemory;

/// Hands guest memory and queues over; `translate` makes the addresses of the rings into those that the server expects.
///
/// # Errors
/// When the server refuses, or an address is not in guest memory.
pub fn hand_over(
    server: &impl VhostBackend,
    features: u64,
    memory: &GuestMemory,
    queues: &[ActiveQueue],
    interrupt: &Interrupt,
    translate: impl Fn(u64) -> vhost::Result<u64>,
) -> vhost::Result<()> {
    server.set_features(features)?;
    server.set_mem_table(&regions(memory)?)?;
    for (index, queue) in queues.iter().enumerate() {
        let layout = queue.layout();
        server.set_vring_num(index, layout.size())?;
        let config = VringConfigData {
            queue_max_size: layout.max_size(),
            queue_size: layout.size(),
            flags: 0,
            desc_table_addr: translate(layout.desc_table())?,
            used_ring_addr: translate(layout.used_ring())?,
            avail_ring_addr: translate(layout.avail_ring())?,
            log_addr: None,
        };
        server.set_vring_addr(index, &config)?;
        server.set_vring_base(index, 0)?;
        server.set_vring_call(index, interrupt.eventfd())?;
        server.set_vring_kick(index, queue.kick())?;
    }
    Ok(())
}

/// Guest memory as the server maps it.
fn regions(memory: &GuestMemory) -> vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    memory
        .iter()
        .map(|region| {
            // The host's kernel needs no file: it sees our memory.
            let file = region.file_offset();
            Ok(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: file.map_or(0, FileOffset::start),
                mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
            })
        })
        .collect()
}
