//! Tries in a virtual machine which model-specific registers it may read and write, and prints what came of each as
//! `HOW REGISTER: OUTCOME`; then whether it may read a performance counter by its instruction. A node test reads that.
//!
//! The machine is restricted as a pod's is, and has one page of memory with four instructions at a time.
#![expect(unsafe_code, reason = "the machine's memory is ours to give")]

use anyhow::{Context, Result, bail};
use caisson_vmm::restrict::{DENIED, restrict};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Where the instructions are, and a page of the machine's memory.
const CODE: u64 = 0x1000;
const MEMORY: u64 = 0x4000;
/// `rdmsr`, `wrmsr` and `rdpmc`, each followed by `out 0x80, al`, which tells that it was done.
const READ: [u8; 4] = [0x0f, 0x32, 0xe6, 0x80];
const WRITE: [u8; 4] = [0x0f, 0x30, 0xe6, 0x80];
const COUNT: [u8; 4] = [0x0f, 0x33, 0xe6, 0x80];
/// One that every guest may use, as a sign that those which may be used are not refused: `IA32_TSC`.
const ALLOWED: u32 = 0x10;

fn main() -> Result<()> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    // Each register between is denied by the same bits, as a unit test shows.
    let mut registers: Vec<u32> = DENIED.iter().flat_map(|(first, last, _)| [*first, *last]).collect();
    registers.dedup();
    for register in registers.into_iter().chain([ALLOWED]) {
        println!("read {register:#x}: {}", attempt(&kvm, READ, register)?);
        println!("write {register:#x}: {}", attempt(&kvm, WRITE, register)?);
    }
    println!("rdpmc 0: {}", attempt(&kvm, COUNT, 0)?);
    Ok(())
}

/// What comes of an instruction with a register's number. A fault without a handler ends the machine, so each has its own.
fn attempt(kvm: &Kvm, instructions: [u8; 4], register: u32) -> Result<&'static str> {
    let vm = kvm.create_vm().context("make a virtual machine")?;
    restrict(kvm, &vm)?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).context("map its memory")?;
    memory.write_slice(&instructions, GuestAddress(CODE)).context("write its instructions")?;
    let userspace_addr = memory.get_host_address(GuestAddress(0)).context("find its memory")? as u64;
    let region = kvm_userspace_memory_region { slot: 0, flags: 0, guest_phys_addr: 0, memory_size: MEMORY, userspace_addr };
    // SAFETY: the mapping lives until the machine is gone.
    unsafe { vm.set_user_memory_region(region) }.context("give it memory")?;
    let mut vcpu = vm.create_vcpu(0).context("make a vCPU")?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).context("ask for CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("set CPUID")?;
    enter(&vcpu, register)?;
    loop {
        match vcpu.run().context("run the vCPU")? {
            VcpuExit::IoOut(0x80, _) => return Ok("done"),
            VcpuExit::Shutdown => return Ok("refused"),
            VcpuExit::Intr => {}
            other => bail!("unexpected exit {other:?}"),
        }
    }
}

/// Stands the vCPU at the instructions, in real mode, with no table of interrupts.
fn enter(vcpu: &VcpuFd, register: u32) -> Result<()> {
    let mut system = vcpu.get_sregs().context("get system registers")?;
    (system.cs.base, system.cs.selector, system.idt.limit) = (0, 0, 0);
    vcpu.set_sregs(&system).context("set system registers")?;
    let registers = kvm_regs { rip: CODE, rcx: register.into(), rflags: 2, ..Default::default() };
    vcpu.set_regs(&registers).context("set registers")
}
