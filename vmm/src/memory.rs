//! Guest memory: where things lie in it, and the mapping of the shim's memory file.
//!
//! ```text
//! 0        zero page, command line, MP table, page tables (below 640 KiB)
//! 16 MiB   kernel, where its ELF says
//! ...      initramfs, at the end of low memory but for the panic log
//! -64 KiB  panic log (ramoops), reserved
//! 0xd0000000..4 GiB   devices: virtio-mmio, IOAPIC, local APIC
//! 4 GiB    the rest of memory
//! ...      room for memory that is added later, from a multiple of 1 GiB on
//! ...      the window for files, likewise (`devices/files.rs`)
//! ```
//!
//! Every page that the guest touches for the first time costs an exit and a fault of the host, so
//! memory is mapped in huge pages where the host allows it, and what every boot touches is made of
//! huge pages before it is touched (docs/decisions/006).
#![expect(unsafe_code, reason = "guest memory is mapped at an address of our choice")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::Arc;

use caisson_protocol::guest::PANIC_LOG_BYTES;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestRegionMmap};

use crate::devices::files::FileWindow;

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
    Stat(#[source] io::Error),
    /// The mapping failed.
    #[error("map guest memory")]
    Map(#[source] io::Error),
}

/// Size of a page, and of a huge one.
const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// `MADV_COLLAPSE` of Linux 6.1.
const MADV_COLLAPSE: i32 = 25;
/// From here to the kernel's end every boot writes to nearly every page: free memory is given out
/// from the kernel's image downwards.
const DENSE_START: u64 = 8 << 20;
/// What the kernel keeps of each CPU, beside what it keeps of each page.
const PER_CPU_AREA: u64 = 2 << 20;
/// Memory that the kernel takes to describe this many bytes, a byte (64 of 4096).
const BYTES_DESCRIBED: u64 = 64;

/// Where the parts of a guest's memory lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of memory below the device hole.
    pub low: u64,
    /// Bytes of memory from 4 GiB on.
    pub high: u64,
    /// Bytes that may be added later, from [`Layout::added_start`] on.
    pub added: u64,
}

impl Layout {
    /// Splits memory of so many MiB at the device hole; room for so many more comes behind all.
    pub const fn new(memory_mib: u64, max_added_mib: u64) -> Self {
        let (bytes, added) = (memory_mib << 20, max_added_mib << 20);
        if bytes <= MMIO_START { Self { low: bytes, high: 0, added } } else { Self { low: MMIO_START, high: bytes - MMIO_START, added } }
    }

    /// Where added memory begins: where Linux's blocks of it do, also in their largest size but one.
    pub const fn added_start(&self) -> u64 {
        (MMIO_END + self.high).next_multiple_of(1 << 30)
    }

    /// Where the window for files begins, behind all memory.
    pub const fn window_start(&self) -> u64 {
        (self.added_start() + self.added).next_multiple_of(1 << 30)
    }

    /// Where the panic log lies.
    pub const fn panic_log(&self) -> u64 {
        self.low - PANIC_LOG_BYTES
    }
}

/// Maps the memory files as guest memory; `added` is that of memory to be added later.
///
/// # Errors
/// When a file's size is not that of the layout, or a mapping fails.
pub fn map(file: File, added: File, layout: Layout) -> Result<GuestMemory, MemoryError> {
    for (file, expected) in [(&file, layout.low + layout.high), (&added, layout.added)] {
        let actual = file.metadata().map_err(MemoryError::Stat)?.len();
        if actual != expected {
            return Err(MemoryError::Size { actual, expected });
        }
    }
    let file = Arc::new(file);
    let mut regions = vec![map_region(&file, 0, layout.low, GuestAddress(0))?];
    if layout.high > 0 {
        regions.push(map_region(&file, layout.low, layout.high, GuestAddress(MMIO_END))?);
    }
    if layout.added > 0 {
        regions.push(map_region(&Arc::new(added), 0, layout.added, GuestAddress(layout.added_start()))?);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Map(io::Error::other(error)))
}

/// Guest memory together with a window for files at a guest physical address: what a device that touches it by system
/// calls alone may be told to read and write.
///
/// # Errors
/// When there is no place for the window.
pub fn with_window(memory: &GuestMemory, window: &FileWindow, start: u64) -> Result<GuestMemory, MemoryError> {
    let failed = |error: &dyn std::fmt::Display| MemoryError::Map(io::Error::other(error.to_string()));
    let builder = MmapRegionBuilder::new(window.bytes() as usize).with_mmap_prot(libc::PROT_NONE).with_mmap_flags(libc::MAP_NORESERVE);
    // SAFETY: the window's addresses are its own to the process's end.
    let region = unsafe { builder.with_raw_mmap_pointer(window.address()) }.build().map_err(|error| failed(&error))?;
    let region = GuestRegionMmap::new(region, GuestAddress(start)).ok_or_else(|| failed(&"there is no such address"))?;
    memory.insert_region(Arc::new(region)).map_err(|error| failed(&error))
}

/// Maps a part of the file where huge pages fit: at a multiple of their size.
fn map_region(file: &Arc<File>, offset: u64, size: u64, start: GuestAddress) -> Result<GuestRegionMmap<()>, MemoryError> {
    let (length, prot, flags) = (size as usize, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
    let checked = |address: *mut libc::c_void| if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) };
    let map = || -> io::Result<*mut u8> {
        let reserved = length + HUGE_PAGE as usize;
        // SAFETY: a new mapping at a place of the kernel's choice takes nothing from anybody.
        let place = checked(unsafe { libc::mmap(null_mut(), reserved, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) })?;
        let slack = place.align_offset(HUGE_PAGE as usize);
        let address = place.wrapping_byte_add(slack);
        // SAFETY: it replaces a part of what was just reserved, which nobody uses.
        checked(unsafe { libc::mmap(address, length, prot, flags | libc::MAP_FIXED, file.as_raw_fd(), offset.cast_signed()) })?;
        // SAFETY: the two ends of the reservation that the mapping left; nobody uses them.
        unsafe {
            libc::munmap(place, slack);
            libc::munmap(address.wrapping_byte_add(length), HUGE_PAGE as usize - slack);
            // Advice: a host whose settings refuse it serves small pages.
            libc::madvise(address, length, libc::MADV_HUGEPAGE);
        }
        Ok(address.cast())
    };
    let address = map().map_err(MemoryError::Map)?;
    let builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    // SAFETY: the mapping was made above for this size, protection and file, and is never unmapped.
    let region = unsafe { builder.with_raw_mmap_pointer(address) }.build().map_err(|error| MemoryError::Map(io::Error::other(error)))?;
    GuestRegionMmap::new(region, start).ok_or_else(|| MemoryError::Map(io::ErrorKind::InvalidInput.into()))
}

/// Makes what every boot touches of huge pages: from below the kernel to its end, and the end of
/// low memory with the initramfs and what the kernel keeps of pages and CPUs.
pub fn populate(memory: &GuestMemory, layout: Layout, kernel_end: u64, initramfs: u64) {
    let kept = (layout.low + layout.high) / BYTES_DESCRIBED + PER_CPU_AREA;
    let top = layout.low.saturating_sub(initramfs + kept);
    collapse(memory, DENSE_START, kernel_end.min(layout.low).next_multiple_of(HUGE_PAGE));
    collapse(memory, top.max(DENSE_START) / HUGE_PAGE * HUGE_PAGE, layout.low);
}

fn collapse(memory: &GuestMemory, from: u64, to: u64) {
    let Some(length) = to.checked_sub(from).filter(|length| *length > 0) else { return };
    let Ok(address) = memory.get_slice(GuestAddress(from), length as usize).map(|slice| slice.ptr_guard_mut().as_ptr()) else { return };
    for page in (from..to).step_by(HUGE_PAGE as usize) {
        // The kernel makes no huge page of nothing: each needs one small page to begin with.
        let kept = memory.read_obj::<u8>(GuestAddress(page)).unwrap_or_default();
        let _ = memory.write_obj(kept, GuestAddress(page));
    }
    // SAFETY: the slice is guest memory, which stays mapped; its content stays what it is. A kernel
    // that does not know the advice, or has no huge page left, refuses it, and pages come one by one.
    unsafe { libc::madvise(address.cast(), length as usize, MADV_COLLAPSE) };
}

/// Gives the whole pages of a range back to the host; they read as zero from then on. What is not
/// guest memory is passed over.
pub fn discard(memory: &GuestMemory, from: GuestAddress, length: u64) {
    let Some(end) = from.0.checked_add(length).map(|end| end / PAGE * PAGE) else { return };
    let Some(start) = from.0.checked_next_multiple_of(PAGE) else { return };
    let Some(length) = end.checked_sub(start).filter(|length| *length > 0) else { return };
    let Ok(slice) = memory.get_slice(GuestAddress(start), length as usize) else { return };
    // SAFETY: the slice is guest memory, which stays mapped, and whose content is the guest's to lose.
    // It fails only for memory that is no shared file's, as in tests: then it keeps its content.
    unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), length as usize, libc::MADV_REMOVE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> File {
        vmm_sys_util::tempfile::TempFile::new().unwrap().into_file()
    }

    #[test]
    fn memory_goes_around_the_device_hole() {
        assert_eq!(Layout::new(256, 0), Layout { low: 256 << 20, high: 0, added: 0 });
        assert_eq!(Layout::new(4096, 128), Layout { low: MMIO_START, high: (4096 << 20) - MMIO_START, added: 128 << 20 });
        assert_eq!((Layout::new(256, 128).added_start(), Layout::new(4096, 128).added_start()), (4 << 30, 5 << 30));
    }

    #[test]
    fn a_file_of_the_wrong_size_is_refused() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        let error = map(file, none(), Layout::new(64, 0)).unwrap_err();
        assert_eq!(error.to_string(), "guest memory file has 1048576 bytes instead of 67108864");
    }

    #[test]
    fn memory_lies_where_huge_pages_fit_and_keeps_its_content() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(64 << 20).unwrap();
        let memory = map(file.try_clone().unwrap(), none(), Layout::new(64, 0)).unwrap();
        let address = memory.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(address as u64 % HUGE_PAGE, 0);
        memory.write_obj(42u8, GuestAddress(20 << 20)).unwrap();
        populate(&memory, Layout::new(64, 0), 30 << 20, 4 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(20 << 20)).unwrap(), 42);
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 20 << 20).unwrap();
        assert_eq!(byte, [42]);
    }

    #[test]
    fn only_what_is_memory_is_given_back() {
        let file = none();
        file.set_len(64 << 20).unwrap();
        let memory = map(file.try_clone().unwrap(), none(), Layout::new(64, 0)).unwrap();
        memory.write_slice(&[1; 4 * PAGE as usize], GuestAddress(0)).unwrap();
        for (from, length) in [(u64::MAX, 0), (u64::MAX - 7, 7), (u64::MAX, 8), (64 << 20, PAGE), ((64 << 20) - PAGE, 2 * PAGE), (1, PAGE)]
        {
            discard(&memory, GuestAddress(from), length);
        }
        discard(&memory, GuestAddress(1), 3 * PAGE);
        let kept = [0, 1, 2, 3].map(|page| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap());
        assert_eq!(kept, [1, 0, 0, 1]);
    }

    #[test]
    fn high_memory_starts_at_4_gib() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let layout = Layout::new(3400, 0);
        file.set_len(3400 << 20).unwrap();
        let memory = map(file, none(), layout).unwrap();
        assert!(memory.address_in_range(GuestAddress(MMIO_END)));
        assert!(!memory.address_in_range(GuestAddress(MMIO_START)));
    }
}
