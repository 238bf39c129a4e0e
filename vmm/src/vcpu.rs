//! A vCPU: its registers at the kernel's entry, and the loop that runs it.
//!
//! Exits that reach user space are few: the driver's set-up of devices, the interrupt status of a
//! device, a reset. Queue notifications go to eventfds inside KVM and never come here.

use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_EXIT_X86_BUS_LOCK, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::Bus;
use crate::kernel::Entry;
use crate::memory::{BOOT_PARAMS, BOOT_STACK, GDT, GuestMemory, PAGE_TABLES};

/// A vCPU that cannot be set up or run.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("{operation}")]
    Kvm {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// Guest memory is too small for the boot tables.
    #[error("write boot tables")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The processor could not enter the guest.
    #[error(
        "the processor refused to run the guest (reason {0:#x}); is this host's KVM able to run unmodified guests? see `caisson check`"
    )]
    Entry(u64),
    /// KVM gave up on an instruction.
    #[error(
        "KVM could not emulate what the guest did (internal error); is this host's KVM able to run unmodified guests? see `caisson check`"
    )]
    Internal,
    /// The host has no memory for the guest's.
    #[error("the host could not give the guest its memory at {0:#x}; is the file system of a file that is mapped there full?")]
    Memory(u64),
    /// Something else than we know.
    #[error("unexpected exit of the vCPU: {0}")]
    Unexpected(String),
}

trait Operation<T> {
    fn operation(self, operation: &'static str) -> Result<T, VcpuError>;
}

impl<T> Operation<T> for Result<T, kvm_ioctls::Error> {
    fn operation(self, operation: &'static str) -> Result<T, VcpuError> {
        self.map_err(|source| VcpuError::Kvm { operation, source })
    }
}

/// CR0: protection, paging; EFER: long mode enabled and active (Intel SDM volume 3, 9.8.5).
const CR0_PE_PG: u64 = 0x8000_0001;
const CR4_PAE: u64 = 0x20;
const EFER_LME_LMA: u64 = 0x500;
/// Page table entry: present, writable; and a large page.
const PTE: u64 = 0x3;
const PTE_LARGE: u64 = 0x83;
const PAGE: u64 = 4096;
/// `IA32_MISC_ENABLE` with fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// How long a vCPU pauses that has locked the bus.
const BUS_LOCK_PAUSE: Duration = Duration::from_millis(1);
/// Offsets of LINT0 and LINT1 in the local APIC's registers, and delivery modes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_EXTINT: u8 = 7;
const MODE_NMI: u8 = 4;

/// Writes the page tables and descriptors that the first vCPU starts on: an identity map of the
/// first GiB in large pages.
pub fn write_boot_tables(memory: &GuestMemory) -> Result<(), VcpuError> {
    let (pdpt, directory) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    memory.write_obj(pdpt | PTE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(directory | PTE, GuestAddress(pdpt))?;
    for index in 0..512u64 {
        memory.write_obj((index << 21) | PTE_LARGE, GuestAddress(directory + index * 8))?;
    }
    for (index, descriptor) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// Null, unused, 64-bit code (0x10), data (0x18): the selectors that the boot protocol asks for.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Sets a vCPU up; the first one enters the kernel, the others wait for it to wake them.
pub fn configure(vcpu: &VcpuFd, cpuid: &CpuId, entry: Option<Entry>) -> Result<(), VcpuError> {
    vcpu.set_cpuid2(cpuid).operation("set CPUID")?;
    let msrs = Msrs::from_entries(&[kvm_msr_entry { index: MSR_MISC_ENABLE, data: FAST_STRINGS, ..Default::default() }])
        .map_err(|_| VcpuError::Unexpected("MSR list".into()))?;
    vcpu.set_msrs(&msrs).operation("set MSRs")?;
    let mut lapic = vcpu.get_lapic().operation("get the local APIC")?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        // Delivery mode is in bits 10:8 of the register, so in its second byte.
        lapic.regs[register + 1] = mode.cast_signed();
    }
    vcpu.set_lapic(&lapic).operation("set the local APIC")?;
    let Some(entry) = entry else { return Ok(()) };
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).operation("set the FPU")?;
    let mut sregs = vcpu.get_sregs().operation("get system registers")?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.cs = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE_PG;
    sregs.efer |= EFER_LME_LMA;
    vcpu.set_sregs(&sregs).operation("set system registers")?;
    let regs = kvm_regs { rflags: 2, rip: entry.address.0, rsi: BOOT_PARAMS, rsp: BOOT_STACK, rbp: BOOT_STACK, ..Default::default() };
    vcpu.set_regs(&regs).operation("set registers")
}

/// Runs a vCPU until the guest resets the machine.
///
/// # Errors
/// What KVM could not go on with.
pub fn run(vcpu: &mut VcpuFd, bus: &Arc<Bus>) -> Result<(), VcpuError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if bus.port_write(port, data) {
                    return Ok(());
                }
            }
            // A triple fault: how the guest is told to reset (reboot=t).
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Ok(()),
            // Of a file that was mapped and has become shorter it is memory from now on.
            Ok(VcpuExit::MemoryFault { gpa, .. }) if bus.repair(gpa) => {}
            Ok(VcpuExit::MemoryFault { gpa, .. }) => return Err(VcpuError::Memory(gpa)),
            Ok(VcpuExit::FailEntry(reason, _)) => return Err(VcpuError::Entry(reason)),
            Ok(VcpuExit::InternalError) => return Err(VcpuError::Internal),
            Ok(VcpuExit::Intr | VcpuExit::IoapicEoi(_)) => {}
            // It has stopped all processors of the host for a moment, and does that seldom now.
            Ok(VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK)) => std::thread::park_timeout(BUS_LOCK_PAUSE),
            Ok(other) => return Err(VcpuError::Unexpected(format!("{other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(source) => return Err(VcpuError::Kvm { operation: "run the vCPU", source }),
        }
    }
}
