//! Loads the guest kernel and its initramfs, and writes what they expect to find in memory.
//!
//! The 64-bit boot protocol of Linux (`Documentation/arch/x86/boot.rst`, "64-bit boot protocol"):
//! the kernel's ELF segments at their physical addresses, a zero page, a command line.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use caisson_protocol::guest::PANIC_LOG_BYTES;
use caisson_protocol::vmm::BootConfig;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::devices::{DeviceSlot, MMIO_SIZE};
use crate::memory::{BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_MAX, EBDA_START, GuestMemory, HIGH_RAM_START, Layout, MMIO_END, populate};

/// `e820_type` of usable and of reserved memory.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `boot_flag` and `header` of a zero page ("boot.rst").
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "undefined" loader.
const LOADER_TYPE: u8 = 0xff;
/// Bytes of an ELF header and of a segment's entry, and the type of a segment that is loaded.
const ELF_HEADER: usize = 64;
const ELF_SEGMENT: u64 = 56;
const ELF_LOAD: [u8; 4] = 1u32.to_le_bytes();
/// The initramfs starts at a page.
const PAGE: u64 = 4096;

/// What cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel is no ELF file, is truncated, or does not fit into memory.
    #[error("load the guest kernel: {0}")]
    Kernel(linux_loader::loader::Error),
    /// The initramfs cannot be read.
    #[error("read the initramfs")]
    ReadInitramfs(#[source] std::io::Error),
    /// The initramfs is no cpio archive, as when it is empty or something else.
    #[error("the initramfs is no cpio archive: it begins with {0:02x?} instead of \"070701\"")]
    NoCpio(Vec<u8>),
    /// The initramfs has no end.
    #[error("the initramfs is truncated: it does not end like a cpio archive")]
    Truncated,
    /// Memory is too small for kernel and initramfs.
    #[error("{memory_mib} MiB of memory do not hold the kernel (to {kernel_mib} MiB) and the initramfs ({initramfs_mib} MiB)")]
    TooSmall {
        /// Low memory.
        memory_mib: u64,
        /// Where the kernel ends.
        kernel_mib: u64,
        /// Size of the initramfs.
        initramfs_mib: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {0} bytes; at most {max} are allowed", max = COMMAND_LINE_MAX - 1)]
    CommandLine(usize),
    /// A write to guest memory failed.
    #[error("write to guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// What a loaded kernel is entered with.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Guest physical address of the first instruction.
    pub address: GuestAddress,
}

/// The guest kernel's command line. Of its CPUs it starts `config.vcpus`; the agent may have it start the others.
pub fn command_line(layout: Layout, slots: &[DeviceSlot], config: &BootConfig) -> String {
    // reboot=t: a triple fault, which ends the VM; panic=-1: at once; oops=panic: a kernel that goes on
    // after an oops hangs sooner or later, and then nobody knows why. rcu_expedited: making
    // namespaces and cgroups waits for grace periods, which are short on a small machine. numdummies:
    // a pod has the interfaces that it was given. auto-movable: of memory that is added later most can
    // be given back, and the kernel itself has some of it.
    let mut line = String::from(
        "reboot=t panic=-1 oops=panic rdinit=/init nomodule cgroup_no_v1=all random.trust_cpu=on rcupdate.rcu_expedited=1 tsc=reliable no_timer_check dummy.numdummies=0",
    );
    line.push_str(&format!(" maxcpus={}", config.vcpus));
    if layout.added > 0 {
        line.push_str(" memory_hotplug.online_policy=auto-movable");
    }
    line.push_str(if config.console { " console=ttyS0 earlyprintk=ttyS0" } else { " 8250.nr_uarts=0 quiet" });
    line.push_str(&format!(
        " ramoops.mem_address={:#x} ramoops.mem_size={PANIC_LOG_BYTES} ramoops.record_size={PANIC_LOG_BYTES} ramoops.console_size=0 ramoops.ftrace_size=0 ramoops.pmsg_size=0",
        layout.panic_log()
    ));
    for slot in slots {
        line.push_str(&format!(" virtio_mmio.device={}K@{:#x}:{}", MMIO_SIZE >> 10, slot.base, slot.irq));
    }
    if !config.kernel_args.is_empty() {
        line.push(' ');
        line.push_str(&config.kernel_args);
    }
    line
}

/// Loads kernel and initramfs and writes zero page and command line.
///
/// # Errors
/// When a file is not what it should be or memory is too small.
pub fn load(
    memory: &GuestMemory,
    layout: Layout,
    kernel: &mut File,
    initramfs: &mut File,
    command_line: &str,
) -> Result<Entry, KernelError> {
    let initramfs_bytes = initramfs.metadata().map_err(KernelError::ReadInitramfs)?.len();
    if let Some(end) = end_of(kernel) {
        populate(memory, layout, end, initramfs_bytes);
    }
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_RAM_START))).map_err(KernelError::Kernel)?;
    let (initramfs_start, initramfs_size) = load_initramfs(memory, layout, loaded.kernel_end, initramfs)?;
    if command_line.len() >= COMMAND_LINE_MAX {
        return Err(KernelError::CommandLine(command_line.len()));
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line.len() as u32;
    // Both lie below the device hole, so within 32 bits.
    params.hdr.ramdisk_image = initramfs_start as u32;
    params.hdr.ramdisk_size = initramfs_size as u32;
    let map = memory_map(layout);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(BOOT_PARAMS))?;
    Ok(Entry { address: loaded.kernel_load })
}

/// Where an ELF kernel will end in memory; `None` for what is no such file, which loading will say.
fn end_of(kernel: &File) -> Option<u64> {
    let mut header = [0; ELF_HEADER];
    kernel.read_exact_at(&mut header, 0).ok()?;
    let word = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (table, count) = (word(&header, 32)?, u64::from(header[56]));
    let mut end = None;
    for index in 0..count {
        let mut segment = [0; ELF_SEGMENT as usize];
        kernel.read_exact_at(&mut segment, table.checked_add(index * ELF_SEGMENT)?).ok()?;
        if segment[..4] == ELF_LOAD {
            end = end.max(Some(word(&segment, 24)?.checked_add(word(&segment, 40)?)?));
        }
    }
    end
}

/// The name of a cpio archive's last entry, and the blocks that archives are filled up to (cpio(5)).
const CPIO_END: &[u8] = b"TRAILER!!!";
const CPIO_BLOCK: u64 = 512;

/// Puts the initramfs at the end of low memory, below the panic log.
fn load_initramfs(memory: &GuestMemory, layout: Layout, kernel_end: u64, file: &mut File) -> Result<(u64, u64), KernelError> {
    let size = file.metadata().map_err(KernelError::ReadInitramfs)?.len();
    let mut magic = vec![0; 6];
    let got = file.read(&mut magic).map_err(KernelError::ReadInitramfs)?;
    magic.truncate(got);
    if magic != b"070701" {
        return Err(KernelError::NoCpio(magic));
    }
    let length = size.min(CPIO_BLOCK);
    let mut end = vec![0; length as usize];
    file.read_exact_at(&mut end, size - length).map_err(KernelError::ReadInitramfs)?;
    if !end.windows(CPIO_END.len()).any(|name| name == CPIO_END) {
        return Err(KernelError::Truncated);
    }
    let too_small = KernelError::TooSmall {
        memory_mib: layout.low >> 20,
        kernel_mib: kernel_end.div_ceil(1 << 20),
        initramfs_mib: size.div_ceil(1 << 20),
    };
    let Some(start) = layout.panic_log().checked_sub(size).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel_end) else {
        return Err(too_small);
    };
    std::io::Seek::rewind(file).map_err(KernelError::ReadInitramfs)?;
    let slice = vm_memory::GuestMemory::get_slice(memory, GuestAddress(start), size as usize)?;
    file.read_exact_volatile(&mut { slice }).map_err(|error| KernelError::ReadInitramfs(std::io::Error::other(error)))?;
    Ok((start, size))
}

/// The memory map that the kernel is given: RAM but for the legacy hole, the panic log, the devices.
fn memory_map(layout: Layout) -> Vec<boot_e820_entry> {
    let entry = |addr, size, type_| boot_e820_entry { addr, size, type_ };
    let mut map = vec![
        entry(0, EBDA_START, E820_RAM),
        entry(EBDA_START, HIGH_RAM_START - EBDA_START, E820_RESERVED),
        entry(HIGH_RAM_START, layout.panic_log() - HIGH_RAM_START, E820_RAM),
        entry(layout.panic_log(), PANIC_LOG_BYTES, E820_RESERVED),
    ];
    if layout.high > 0 {
        map.push(entry(MMIO_END, layout.high, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn file(bytes: &[u8]) -> File {
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn memory() -> (GuestMemory, Layout) {
        let layout = Layout::new(64, 0);
        (GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap(), layout)
    }

    #[test]
    fn a_kernel_that_is_no_elf_is_refused() {
        let (memory, layout) = memory();
        let error = load(&memory, layout, &mut file(b"not a kernel"), &mut file(b"070701"), "").unwrap_err();
        assert!(error.to_string().starts_with("load the guest kernel"), "{error}");
    }

    #[test]
    fn an_initramfs_that_is_no_archive_is_refused() {
        let (memory, layout) = memory();
        let error = load_initramfs(&memory, layout, 0, &mut file(b"")).unwrap_err();
        assert!(error.to_string().contains("no cpio archive"), "{error}");
    }

    #[test]
    fn an_initramfs_without_an_end_is_refused() {
        let (memory, layout) = memory();
        let error = load_initramfs(&memory, layout, 0, &mut file(b"070701")).unwrap_err();
        assert!(error.to_string().contains("truncated"), "{error}");
    }

    #[test]
    fn an_initramfs_that_reaches_into_the_kernel_is_refused() {
        let (memory, layout) = memory();
        let error = load_initramfs(&memory, layout, 64 << 20, &mut file(b"070701 TRAILER!!!")).unwrap_err();
        assert!(error.to_string().starts_with("64 MiB of memory do not hold the kernel"), "{error}");
    }

    #[test]
    fn the_memory_map_does_not_overlap() {
        for mib in [64, 3328, 8192] {
            let map = memory_map(Layout::new(mib, 0));
            for pair in map.windows(2) {
                let (end, next) = (pair[0].addr + pair[0].size, pair[1].addr);
                assert!(end <= next);
            }
        }
    }
}
