//! What each vCPU says of itself (CPUID): what KVM supports on this host, with the pod's topology.
//!
//! One package of single-threaded cores, in the leaves of Intel and of AMD, so that a guest on
//! either sees the same.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// CPUID.1:ECX bit 24, the local APIC's TSC deadline timer, and bit 31, "runs under a hypervisor".
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:EDX bit 28, more than one logical processor.
const HTT: u32 = 1 << 28;
/// Domain types of leaf 0xb, in ECX bits 15:8.
const DOMAIN_THREAD: u32 = 1 << 8;
const DOMAIN_CORE: u32 = 2 << 8;

/// CPUID.1:ECX bit 2, 64-bit debug store; 4, it by privilege; 15, performance capabilities. CPUID.1:EDX bit 21, debug store.
const COUNTS_1_ECX: u32 = 1 << 2 | 1 << 4 | 1 << 15;
const COUNTS_1_EDX: u32 = 1 << 21;
/// CPUID.1:EDX bits 7 and 14, machine checks and their banks, which a guest has no registers for.
const MACHINE_CHECKS_1_EDX: u32 = 1 << 7 | 1 << 14;
/// CPUID.7.0:EBX bit 25, trace of the processor; CPUID.7.0:EDX bit 19, records of branches.
const TRACES_7_EBX: u32 = 1 << 25;
const TRACES_7_EDX: u32 = 1 << 19;
/// CPUID.80000001:ECX bits 10, samples of instructions; 23, 24 and 28, performance counters of cores, of the north bridge
/// and of the last cache.
const COUNTS_8_ECX: u32 = 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28;
/// CPUID.1:ECX bit 5, VMX; CPUID.80000001:ECX bit 2, SVM.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;

/// Takes out what says of performance counters, of traces, of machine checks, and, unless `nested`, of virtualization within the guest.
fn mask(cpuid: &mut CpuId, nested: bool) {
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ecx &= !(COUNTS_1_ECX | if nested { 0 } else { VMX });
                entry.edx &= !(COUNTS_1_EDX | MACHINE_CHECKS_1_EDX);
            }
            (0x7, 0) => {
                entry.ebx &= !TRACES_7_EBX;
                entry.edx &= !TRACES_7_EDX;
            }
            (0x8000_0001, _) => entry.ecx &= !(COUNTS_8_ECX | if nested { 0 } else { SVM }),
            // Performance counters of Intel and AMD, trace, records of branches, samples, and SVM's own leaf.
            (0xa | 0x14 | 0x1c | 0x8000_001b | 0x8000_0022, _) => clear(entry),
            (0x8000_000a, _) if !nested => clear(entry),
            _ => {}
        }
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Fills in the leaves that depend on the vCPU and on how many there are, and takes out what a guest is not to have.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, vcpus: u8, tsc_deadline: bool, nested: bool) -> CpuId {
    let mut cpuid = supported.clone();
    mask(&mut cpuid, nested);
    let (id, count) = (u32::from(vcpu), u32::from(vcpus));
    // Bits that an APIC id needs for the core number.
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | (id << 24) | (count << 16);
                entry.ecx |= HYPERVISOR | if tsc_deadline { TSC_DEADLINE } else { 0 };
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Deterministic cache parameters: cores of the package in 31:26, sharers of a cache in
            // 25:14; caches up to level 2 are a core's own.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharers = if level <= 2 { 0 } else { count - 1 };
                entry.eax = (entry.eax & 0x3fff) | (sharers << 14) | ((count - 1) << 26);
            }
            0xb | 0x1f => {
                let (shift, processors, domain) = match entry.index {
                    0 => (0, 1, DOMAIN_THREAD),
                    1 => (core_bits, count, DOMAIN_CORE),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = processors;
                entry.ecx = domain | entry.index;
                entry.edx = id;
            }
            // AMD: number of cores and width of the core number.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | (count - 1),
            // AMD: extended APIC id; core id with one thread a core.
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_its_apic_id_in_every_leaf() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_001e, 0)]).unwrap();
        let cpuid = for_vcpu(&supported, 3, 4, true, false);
        let leaves = cpuid.as_slice();
        assert_eq!(leaves[0].ebx >> 24, 3);
        assert_eq!((leaves[1].edx, leaves[2].edx, leaves[3].eax), (3, 3, 3));
        assert_eq!((leaves[2].eax, leaves[2].ebx & 0xffff), (2, 4));
        assert_ne!(leaves[0].ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn a_guest_hears_of_no_counters_or_traces_and_of_virtualization_if_it_may() {
        let full = |function, index| kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() };
        let leaves = [0x1, 0x7, 0xa, 0x14, 0x8000_0001, 0x8000_000a, 0x8000_001b, 0x8000_0022].map(|function| full(function, 0));
        let supported = CpuId::from_entries(&leaves).unwrap();
        for nested in [false, true] {
            let cpuid = for_vcpu(&supported, 0, 1, true, nested);
            let leaf = |function| *cpuid.as_slice().iter().find(|entry| entry.function == function).unwrap();
            assert_eq!((leaf(1).ecx & VMX != 0, leaf(0x8000_0001).ecx & SVM != 0, leaf(0x8000_000a).eax != 0), (nested, nested, nested));
            assert_eq!(leaf(1).edx & (COUNTS_1_EDX | MACHINE_CHECKS_1_EDX), 0);
            assert_eq!((leaf(1).ecx & COUNTS_1_ECX, leaf(7).ebx & TRACES_7_EBX, leaf(0x8000_0001).ecx & COUNTS_8_ECX), (0, 0, 0));
            for function in [0xa, 0x14, 0x8000_001b, 0x8000_0022] {
                let leaf = leaf(function);
                assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4], "{function:#x}");
            }
        }
    }
}
