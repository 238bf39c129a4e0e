//! Mends the node's QEMU, whose emulation of SVM delivers an injected interrupt a second time.
//!
//! VMRUN with an external interrupt in its event injection field (AMD64 Architecture Programmer's Manual,
//! volume 2, 15.20) delivers it at once, and QEMU 10.0 leaves its number behind as an exception that is
//! pending: `helper_vmrun` in `target/i386/tcg/system/svm_helper.c` sets `exception_index` and calls
//! `do_interrupt_x86_hardirq`, which does not look at it. When another thread asks the emulated processor
//! to stop before the guest has exited, the loop around it takes the number for an exception and delivers
//! it, whether the guest has interrupts on or not. A guest whose interrupt handler is entered twice
//! hangs or resets: about one pod in some hundreds, whatever monitor it runs under.
//!
//! What is wrong is one store, which is taken out of the program's copy in the node's tree.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// The store and what follows it, as GCC lays it out; after each the bytes of an operand, which may be any.
///
/// ```text
/// mov    %esi,exception_index(%rbx)
/// movl   $0,exception_is_int(%rbx)
/// movq   $-1,exception_next_eip(%rbx)
/// testb  $2,qemu_loglevel(%rip)
/// jne    ...
/// mov    $1,%edx
/// mov    %rbx,%rdi
/// call   do_interrupt_x86_hardirq
/// ```
const STORE: [(&[u8], usize); 8] = [
    (&[0x89, 0xb3], 4),
    (&[0xc7, 0x83], 4),
    (&[0, 0, 0, 0, 0x48, 0xc7, 0x83], 4),
    (&[0xff, 0xff, 0xff, 0xff, 0xf6, 0x05], 4),
    (&[0x02, 0x0f, 0x85], 4),
    (&[0xba, 1, 0, 0, 0], 0),
    (&[0x48, 0x89, 0xdf], 0),
    (&[0xe8], 4),
];
/// Does nothing, in as many bytes as the store has.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Takes the store out of a QEMU program.
///
/// # Errors
/// When the program does not hold it exactly once: it is of another version, which may need no mending.
pub fn injection(program: &Path) -> Result<()> {
    let mut bytes = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    take_out(&mut bytes).with_context(|| format!("mend the interrupts of {}", program.display()))?;
    std::fs::write(program, bytes).with_context(|| format!("write {}", program.display()))
}

fn take_out(bytes: &mut [u8]) -> Result<()> {
    let places: Vec<usize> = (0..bytes.len()).filter(|&start| is_store(&bytes[start..])).collect();
    let [place] = places[..] else { bail!("the store to take out is there {} times", places.len()) };
    bytes[place..place + NOTHING.len()].copy_from_slice(&NOTHING);
    Ok(())
}

fn is_store(mut bytes: &[u8]) -> bool {
    STORE.iter().all(|(code, operand)| {
        let Some(rest) = bytes.strip_prefix(*code).and_then(|rest| rest.get(*operand..)) else { return false };
        bytes = rest;
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As disassembled from QEMU 10.0 of Debian 13.
    const FOUND: [u8; 52] = [
        0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff, 0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0, 0x48, 0xc7, 0x83, 0xe8, 0x33, 0, 0, 0xff, 0xff, 0xff,
        0xff, 0xf6, 0x05, 0xec, 0xe2, 0x3d, 0x01, 0x02, 0x0f, 0x85, 0xc1, 0, 0, 0, 0xba, 1, 0, 0, 0, 0x48, 0x89, 0xdf, 0xe8, 0xb9, 0xab,
        0x06,
    ];

    #[test]
    fn the_one_store_is_taken_out_and_nothing_else() {
        let program = [&[0x90; 7][..], &FOUND, &[0x00, 0x90]].concat();
        let mut mended = program.clone();
        take_out(&mut mended).unwrap();
        assert_eq!(mended[7..13], NOTHING);
        assert_eq!((&mended[..7], &mended[13..]), (&program[..7], &program[13..]));
    }

    #[test]
    fn a_program_without_it_or_with_two_is_left_alone() {
        let program = [&FOUND[..], &[0]].concat();
        for mut other in [Vec::new(), vec![0x89; 100], program.repeat(2), program[..40].to_vec()] {
            let before = other.clone();
            assert!(take_out(&mut other).unwrap_err().to_string().contains("times"));
            assert_eq!(other, before);
        }
    }
}
