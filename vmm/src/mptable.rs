//! The MP table that tells the guest of its CPUs and its IOAPIC (Intel MultiProcessor
//! Specification 1.4). It lies at the end of conventional memory, where the kernel looks for it.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{EBDA_START, GuestMemory};

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
/// Interrupt lines of the in-kernel IOAPIC.
pub const IRQS: u8 = 24;

/// Writes the table for `cpus` CPUs.
///
/// # Errors
/// When guest memory ends before the table does.
pub fn write(memory: &GuestMemory, cpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&table(cpus), GuestAddress(EBDA_START))
}

/// The floating pointer structure and the configuration table behind it.
fn table(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for cpu in 0..cpus {
        // Type 0: processor; enabled, and the first is the bootstrap processor; family 6, with FPU and APIC.
        let flags = 1 | if cpu == 0 { 2 } else { 0 };
        let mut processor = vec![0, cpu, APIC_VERSION, flags];
        processor.extend_from_slice(&0x600u32.to_le_bytes());
        processor.extend_from_slice(&0x201u32.to_le_bytes());
        processor.extend_from_slice(&[0; 8]);
        entry(&processor);
    }
    // Type 1: bus 0 is ISA.
    entry(b"\x01\x00ISA   ");
    // Type 2: the IOAPIC, usable.
    let mut ioapic = vec![2, ioapic_id, APIC_VERSION, 1];
    ioapic.extend_from_slice(&IOAPIC.to_le_bytes());
    entry(&ioapic);
    for irq in 0..IRQS {
        // Type 3: I/O interrupt, vectored, polarity and trigger of the bus.
        entry(&[3, 0, 0, 0, 0, irq, ioapic_id, irq]);
    }
    // Type 4: local interrupts; LINT0 takes the 8259's, LINT1 is NMI.
    entry(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entry(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut config = Vec::new();
    config.extend_from_slice(b"PCMP");
    config.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    config.extend_from_slice(&[4, 0]); // revision 1.4, checksum below
    config.extend_from_slice(b"CAISSON VM          "); // 8 bytes of maker, 12 of product
    config.extend_from_slice(&[0; 6]); // no OEM table
    config.extend_from_slice(&count.to_le_bytes());
    config.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    config.extend_from_slice(&[0; 4]);
    config.extend_from_slice(&entries);
    config[7] = checksum(&config);

    let mut pointer = Vec::new();
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(EBDA_START as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]); // 16 bytes, revision 1.4
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&config);
    pointer
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_sum_to_zero() {
        for cpus in [1, 32] {
            let table = table(cpus);
            let (pointer, config) = table.split_at(16);
            assert_eq!(pointer.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(config.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
        }
    }

    #[test]
    fn the_table_fits_into_the_gap_for_32_cpus() {
        assert!(EBDA_START as usize + table(32).len() <= 0xa_0000);
    }
}
