//! What each vCPU says of itself (CPUID): what KVM supports on this host, with the pod's topology.
//!
//! One package of single-threaded cores, in the leaves of Intel and of AMD, so that a guest on
//! either sees the same.

use kvm_bindings::CpuId;

/// CPUID.1:ECX bit 24, the local APIC's TSC deadline timer, and bit 31, "runs under a hypervisor".
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:EDX bit 28, more than one logical processor.
const HTT: u32 = 1 << 28;
/// Domain types of leaf 0xb, in ECX bits 15:8.
const DOMAIN_THREAD: u32 = 1 << 8;
const DOMAIN_CORE: u32 = 2 << 8;

/// Fills in the leaves that depend on the vCPU and on how many there are.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
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
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn each_vcpu_has_its_apic_id_in_every_leaf() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_001e, 0)]).unwrap();
        let cpuid = for_vcpu(&supported, 3, 4, true);
        let leaves = cpuid.as_slice();
        assert_eq!(leaves[0].ebx >> 24, 3);
        assert_eq!((leaves[1].edx, leaves[2].edx, leaves[3].eax), (3, 3, 3));
        assert_eq!((leaves[2].eax, leaves[2].ebx & 0xffff), (2, 4));
        assert_ne!(leaves[0].ecx & TSC_DEADLINE, 0);
    }
}
