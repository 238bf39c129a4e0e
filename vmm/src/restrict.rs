//! What of the processor a guest may not touch: model-specific registers that count, trace or measure what else runs on
//! the host's processor, and ways to keep a processor for itself.
//!
//! A list of what is denied, with a reason each, and not of what is allowed: an unknown register is the host kernel's to
//! refuse, as KVM does.

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_NOTIFY_VMEXIT,
    KVM_PMU_CAP_DISABLE, KVM_X86_NOTIFY_VMEXIT_ENABLED, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

/// Registers that no guest reads or writes, from the first to the last, and why (Intel SDM volume 4, AMD APM volume 2).
pub const DENIED: &[(u32, u32, &str)] = &[
    (0x34, 0x34, "counts interrupts of the host's firmware"),
    (0xc1, 0xc8, "performance counters"),
    (0x186, 0x18d, "what performance counters count"),
    (0x1c8, 0x1c9, "trace of branches"),
    (0x280, 0x29f, "interrupts of corrected machine checks"),
    (0x309, 0x30c, "performance counters of fixed events"),
    (0x329, 0x329, "performance metrics"),
    (0x345, 0x345, "what the performance counters can do"),
    (0x38d, 0x390, "performance counters together"),
    (0x3f1, 0x3f2, "samples of performance counters"),
    (0x3f6, 0x3f7, "samples of performance counters"),
    (0x400, 0x47f, "banks of machine checks, by which some are made up"),
    (0x4c1, 0x4c8, "performance counters"),
    (0x560, 0x589, "trace of the processor"),
    (0x600, 0x600, "the store of traces"),
    (0x601, 0x61e, "energy that the host uses"),
    (0x638, 0x64f, "energy that the host uses"),
    (0x680, 0x6df, "trace of branches"),
    (0xdc0, 0xddf, "trace of branches"),
    (0x1200, 0x121f, "trace of branches"),
    (0x14ce, 0x14cf, "trace of branches"),
    (0x1500, 0x151f, "trace of branches"),
    (0x1600, 0x161f, "trace of branches"),
    (0xc000_0300, 0xc000_0303, "performance counters together"),
    (0xc001_0000, 0xc001_0007, "performance counters and what they count"),
    (0xc001_0200, 0xc001_020f, "performance counters and what they count"),
    (0xc001_0230, 0xc001_0247, "performance counters of caches and memory"),
    (0xc001_0299, 0xc001_029b, "energy that the host uses"),
    (0xc001_0400, 0xc001_0417, "machine checks, by which some are made up"),
    (0xc001_1030, 0xc001_103c, "samples of instructions"),
];

/// The ranges in which they lie, as KVM takes them: first register and how many.
const RANGES: [(u32, u32); 3] = [(0, 0x1620), (0xc000_0300, 8), (0xc001_0000, 0x1040)];

/// Registers of a range that may be used, a bit each.
fn allowed(base: u32, count: u32) -> Vec<u8> {
    let mut bits = vec![0xff; count.div_ceil(8) as usize];
    for (first, last, _) in DENIED {
        for index in (*first..=*last).filter_map(|register| register.checked_sub(base)).filter(|index| *index < count) {
            bits[(index / 8) as usize] &= !(1 << (index % 8));
        }
    }
    bits
}

/// Keeps a virtual machine from what it may not touch, as far as the host's kernel knows how. No vCPU may be there yet.
///
/// # Errors
/// What KVM refused that it says it has.
pub fn restrict(kvm: &Kvm, vm: &VmFd) -> Result<()> {
    let offers = |capability: u32, option: u32| {
        let options = kvm.check_extension_raw(capability.into());
        options > 0 && options.cast_unsigned() & option != 0
    };
    let enable = |cap: u32, option: u32| vm.enable_cap(&kvm_enable_cap { cap, args: [option.into(), 0, 0, 0], ..Default::default() });
    // Linux 5.18.
    if offers(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE) {
        enable(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE).context("take the performance counters away")?;
    }
    // A lock over two cache lines stops all processors of the host; who takes one waits (Intel SDM volume 3, 28.2).
    if offers(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT) {
        enable(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT).context("hear of bus locks")?;
    }
    // Who keeps the processor from taking interrupts is taken off it.
    if offers(KVM_CAP_X86_NOTIFY_VMEXIT, KVM_X86_NOTIFY_VMEXIT_ENABLED) {
        enable(KVM_CAP_X86_NOTIFY_VMEXIT, KVM_X86_NOTIFY_VMEXIT_ENABLED).context("hear of a guest that takes no interrupts")?;
    }
    // Linux 5.10.
    if kvm.check_extension_raw(KVM_CAP_X86_MSR_FILTER.into()) > 0 {
        let bitmaps = RANGES.map(|(base, count)| allowed(base, count));
        let ranges: Vec<MsrFilterRange<'_>> = RANGES
            .iter()
            .zip(&bitmaps)
            .map(|(&(base, msr_count), bitmap)| MsrFilterRange {
                flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
                base,
                msr_count,
                bitmap,
            })
            .collect();
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).context("deny registers")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_denied_register_is_in_a_range_and_no_other_is_denied() {
        let mut denied = 0;
        for (base, count) in RANGES {
            let bits = allowed(base, count);
            // KVM takes 1,536 bytes.
            assert!(bits.len() <= 0x600);
            for index in 0..count {
                let is_listed = DENIED.iter().any(|(first, last, _)| (*first..=*last).contains(&(base + index)));
                let is_denied = bits[(index / 8) as usize] & (1 << (index % 8)) == 0;
                assert_eq!(is_denied, is_listed, "{:#x}", base + index);
                denied += u32::from(is_denied);
            }
        }
        assert_eq!(denied, DENIED.iter().map(|(first, last, _)| last - first + 1).sum::<u32>());
    }
}
