//! Whether KVM runs an unmodified guest: it is tried, with a machine of one vCPU and three
//! instructions.
//!
//! The device node alone says little: a nested or paravirtual KVM may have it and fail on the first
//! ordinary instruction.
#![expect(unsafe_code, reason = "KVM takes guest memory by address")]

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Real mode: add two registers, write the sum to a port, halt. CPUID in between, because a
/// virtual machine that cannot take that exit cannot take any.
const CODE: &[u8] = &[
    0x0f, 0xa2, // cpuid
    0xb0, 0x28, // mov al, 40
    0x04, 0x02, // add al, 2
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];
const START: u64 = 0x1000;
const PORT: u16 = 0x10;
const SUM: u8 = 42;
/// Exits before the answer, at the most.
const MAX_EXITS: usize = 16;

/// Runs the machine.
///
/// # Errors
/// What failed, in one sentence.
pub fn run_guest() -> Result<()> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = kvm.create_vm().context("create a virtual machine")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).context("map guest memory")?;
    memory.write_slice(CODE, GuestAddress(START)).context("write guest memory")?;
    let host = memory.get_host_address(GuestAddress(0)).context("find guest memory")?;
    let region = kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: 0x4000, userspace_addr: host as u64 };
    // SAFETY: the mapping lives to the end of this function, and the machine does not outlive it.
    unsafe { vm.set_user_memory_region(region) }.context("give the virtual machine memory")?;
    let mut vcpu = vm.create_vcpu(0).context("create a vCPU")?;
    let mut sregs = vcpu.get_sregs().context("read the vCPU's registers")?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).context("set the vCPU's registers")?;
    let mut regs = vcpu.get_regs().context("read the vCPU's registers")?;
    (regs.rip, regs.rflags) = (START, 2);
    vcpu.set_regs(&regs).context("set the vCPU's registers")?;
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
