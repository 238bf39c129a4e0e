//! Guest memory: where things lie in it, and the mapping of the shim's memory file.
//!
//! ```text
//! 0        zero page, command line, MP table, page tables (below 640 KiB)
//! 16 MiB   kernel, where its ELF says
//! ...      initramfs, at the end of low memory but for the panic log
//! -64 KiB  panic log (ramoops), reserved
//! 0xd0000000..4 GiB   devices: virtio-mmio, IOAPIC, local APIC
//! 4 GiB    the rest of memory
//! ```

use std::fs::File;
use std::sync::Arc;

use caisson_protocol::guest::PANIC_LOG_BYTES;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// The guest's memory, shared with the virtio-fs server.
pub type GuestMemory = GuestMemoryMmap<()>;

/// End of conventional memory; the MP table lies just below.
pub const EBDA_START: u64 = 0x9_fc00;
/// Start of memory above the legacy hole.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// Start of the hole below 4 GiB that devices lie in.
pub const MMIO_START: u64 = 0xd000_0000;
/// End of that hole.
pub const MMIO_END: u64 = 0x1_0000_0000;

/// The zero page (`struct boot_params`).
pub const BOOT_PARAMS: u64 = 0x7000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line, with its NUL (`COMMAND_LINE_SIZE` of x86).
pub const COMMAND_LINE_MAX: usize = 2048;
/// Boot page tables: PML4, one PDPT, one page directory.
pub const PAGE_TABLES: u64 = 0x9000;
/// Boot global descriptor table.
pub const GDT: u64 = 0x500;
/// Boot stack, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Guest memory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file is not as large as the configuration says.
    #[error("guest memory file has {actual} bytes instead of {expected}")]
    Size {
        /// Bytes of the file.
        actual: u64,
        /// Bytes configured.
        expected: u64,
    },
    /// The file's size cannot be read.
    #[error("read the size of the guest memory file")]
    Stat(#[source] std::io::Error),
    /// The mapping failed.
    #[error("map guest memory")]
    Map(#[source] vm_memory::mmap::FromRangesError),
}

/// Where the parts of a guest's memory lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of memory below the device hole.
    pub low: u64,
    /// Bytes of memory from 4 GiB on.
    pub high: u64,
}

impl Layout {
    /// Splits memory of so many MiB at the device hole.
    pub const fn new(memory_mib: u64) -> Self {
        let bytes = memory_mib << 20;
        if bytes <= MMIO_START { Self { low: bytes, high: 0 } } else { Self { low: MMIO_START, high: bytes - MMIO_START } }
    }

    /// Where the panic log lies.
    pub const fn panic_log(&self) -> u64 {
        self.low - PANIC_LOG_BYTES
    }
}

/// Maps the memory file as guest memory.
///
/// # Errors
/// When the file's size is not that of the layout, or the mapping fails.
pub fn map(file: File, layout: Layout) -> Result<GuestMemory, MemoryError> {
    let actual = file.metadata().map_err(MemoryError::Stat)?.len();
    let expected = layout.low + layout.high;
    if actual != expected {
        return Err(MemoryError::Size { actual, expected });
    }
    let file = Arc::new(file);
    let mut ranges = vec![(GuestAddress(0), layout.low as usize, Some(FileOffset::from_arc(Arc::clone(&file), 0)))];
    if layout.high > 0 {
        ranges.push((GuestAddress(MMIO_END), layout.high as usize, Some(FileOffset::from_arc(file, layout.low))));
    }
    GuestMemory::from_ranges_with_files(ranges).map_err(MemoryError::Map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemory as _;

    #[test]
    fn memory_goes_around_the_device_hole() {
        assert_eq!(Layout::new(256), Layout { low: 256 << 20, high: 0 });
        assert_eq!(Layout::new(4096), Layout { low: MMIO_START, high: (4096 << 20) - MMIO_START });
    }

    #[test]
    fn a_file_of_the_wrong_size_is_refused() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        let error = map(file, Layout::new(64)).unwrap_err();
        assert_eq!(error.to_string(), "guest memory file has 1048576 bytes instead of 67108864");
    }

    #[test]
    fn high_memory_starts_at_4_gib() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let layout = Layout::new(3400);
        file.set_len(3400 << 20).unwrap();
        let memory = map(file, layout).unwrap();
        assert!(memory.address_in_range(GuestAddress(MMIO_END)));
        assert!(!memory.address_in_range(GuestAddress(MMIO_START)));
    }
}
