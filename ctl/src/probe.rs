//! Whether KVM runs an unmodified guest: it is tried, with a machine of one vCPU that does what a
//! kernel does.
//!
//! The device node alone says little: a nested or paravirtual KVM may have it and fail on the first
//! ordinary instruction, or emulate a guest's kernel a thousand times slower than the processor is.
#![expect(unsafe_code, reason = "KVM takes guest memory by address")]

use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// 64-bit mode, ring 0: eight million instructions in a loop, then some that only kernels use, then
/// a sum is written to a port.
const CODE: &[u8] = &[
    0xb9, 0x00, 0x09, 0x3d, 0x00, // mov ecx, 4000000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz to dec
    0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, // mov rax, cr3; mov cr3, rax
    0x0f, 0x01, 0x3c, 0x25, 0x00, 0x10, 0x00, 0x00, // invlpg [0x1000]
    0x0f, 0x01, 0xf8, // swapgs
    0x0f, 0x10, 0x04, 0x25, 0x00, 0x10, 0x00, 0x00, // movups xmm0, [0x1000]
    0x0f, 0xa2, // cpuid
    0xb0, 0x28, // mov al, 40
    0x04, 0x02, // add al, 2
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];
const START: u64 = 0x1000;
const PORT: u16 = 0x10;
const SUM: u8 = 42;
/// Page tables that map the first 2 MiB onto itself: three levels, the last entry a large page.
const TABLES: [(u64, u64); 3] = [(0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x83)];
const MEMORY: usize = 0x8000;
/// CR0: protection, paging. CR4: PAE, SSE. EFER: long mode (Intel SDM volume 3, 2.5).
const CR0: u64 = 0x8000_0001;
const CR4: u64 = 0x620;
const EFER: u64 = 0x500;
/// Exits before the answer, at the most.
const MAX_EXITS: usize = 16;
/// For all of it: a processor takes milliseconds, an emulated one some tenths of a second.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Runs the machine.
///
/// # Errors
/// What failed, in one sentence.
pub fn run_guest() -> Result<()> {
    let (tell, told) = channel();
    // A guest that does not end is left behind with this process.
    std::thread::spawn(move || tell.send(run()));
    told.recv_timeout(TIMEOUT)
        .map_err(|_| anyhow!("eight million instructions took more than {} s: this KVM emulates a guest's kernel", TIMEOUT.as_secs()))?
}

fn run() -> Result<()> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = kvm.create_vm().context("create a virtual machine")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).context("map guest memory")?;
    memory.write_slice(CODE, GuestAddress(START)).context("write guest memory")?;
    for (address, entry) in TABLES {
        memory.write_obj(entry, GuestAddress(address)).context("write guest memory")?;
    }
    let host = memory.get_host_address(GuestAddress(0)).context("find guest memory")?;
    let region =
        kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: MEMORY as u64, userspace_addr: host as u64 };
    // SAFETY: the mapping lives to the end of this function, and the machine does not outlive it.
    unsafe { vm.set_user_memory_region(region) }.context("give the virtual machine memory")?;
    let mut vcpu = vm.create_vcpu(0).context("create a vCPU")?;
    // KVM refuses registers that the vCPU's CPUID does not know; recent ones also when it has none.
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("ask KVM for its CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("set the vCPU's CPUID")?;
    set_registers(&vcpu)?;
    for _ in 0..MAX_EXITS {
        match vcpu.run().context("run the vCPU")? {
            VcpuExit::IoOut(PORT, data) => {
                ensure!(data == [SUM], "the guest computed {data:?} instead of {SUM}");
                return Ok(());
            }
            VcpuExit::Intr => {}
            other => bail!("the guest ended with {other:?} before its first output"),
        }
    }
    bail!("the guest made {MAX_EXITS} exits without output")
}

/// 64-bit mode at the first instruction.
fn set_registers(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("read the vCPU's registers")?;
    let segment =
        |type_, l| kvm_segment { limit: 0xffff_ffff, selector: 8, type_, present: 1, s: 1, l, db: 1 - l, g: 1, ..Default::default() };
    sregs.cs = segment(0xb, 1);
    let data = segment(0x3, 0);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, TABLES[0].0, CR4, EFER);
    vcpu.set_sregs(&sregs).context("set the vCPU's registers")?;
    let mut regs = vcpu.get_regs().context("read the vCPU's registers")?;
    (regs.rip, regs.rflags) = (START, 2);
    vcpu.set_regs(&regs).context("set the vCPU's registers")
}
