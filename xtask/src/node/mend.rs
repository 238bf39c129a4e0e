//! Mends the node's QEMU: two mistakes in its emulation of SVM, of which guests in a node hang or reset now and then,
//! whatever monitor they run under. Each is one store, which is taken out of the program's copy in the node's tree.
//!
//! **An injected interrupt is delivered twice.** VMRUN with an external interrupt in its event injection field (AMD64
//! Architecture Programmer's Manual, volume 2, 15.20) delivers it at once, and QEMU 10.0 leaves its number behind as an
//! exception that is pending: `helper_vmrun` in `target/i386/tcg/system/svm_helper.c` sets `exception_index` and calls
//! `do_interrupt_x86_hardirq`, which does not look at it. When another thread asks the emulated processor to stop
//! before the guest has exited, the loop around it takes the number for an exception and delivers it, whether the guest
//! has interrupts on or not.
//!
//! **A guest loses its nested page table.** Each x87 state that is loaded without an error in it, by whatever processor,
//! clears IGNNE# in the first processor's flags (`cpu_clear_ignne` in `target/i386/tcg/system/fpu_helper.c`), not
//! atomically and from another thread than that processor's. What that has set meanwhile is lost: among it that
//! a guest runs and has a nested page table. IGNNE# is of no use to a system that has CR0.NE set, as Linux has.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// A store that is not to happen: how GCC lays it out with what is around it, as bytes with the number of bytes after them
/// that may be any, and the bytes of which it is one.
struct Store {
    name: &'static str,
    code: &'static [(&'static [u8], usize)],
    /// What does nothing in as many bytes.
    nothing: &'static [u8],
}

const STORES: [Store; 2] = [
    // mov %esi,exception_index(%rbx); movl $0,exception_is_int(%rbx); movq $-1,exception_next_eip(%rbx);
    // testb $2,qemu_loglevel(%rip); jne ...; mov $1,%edx; mov %rbx,%rdi; call do_interrupt_x86_hardirq
    Store {
        name: "the pending interrupt",
        code: &[
            (&[0x89, 0xb3], 4),
            (&[0xc7, 0x83], 4),
            (&[0, 0, 0, 0, 0x48, 0xc7, 0x83], 4),
            (&[0xff, 0xff, 0xff, 0xff, 0xf6, 0x05], 4),
            (&[0x02, 0x0f, 0x85], 4),
            (&[0xba, 1, 0, 0, 0], 0),
            (&[0x48, 0x89, 0xdf], 0),
            (&[0xe8], 4),
        ],
        nothing: &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    },
    // andl $~HF2_IGNNE_MASK,hflags2(%rax); add $8,%rsp; xor %eax,%eax
    Store {
        name: "another processor's flags",
        code: &[(&[0x81, 0xa0], 4), (&[0x7f, 0xff, 0xff, 0xff, 0x48, 0x83, 0xc4, 0x08, 0x31, 0xc0], 0)],
        nothing: &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    },
];

/// Takes the stores out of a QEMU program.
///
/// # Errors
/// When the program does not hold each exactly once: it is of another version, which may need no mending. Those that it
/// holds are taken out all the same.
pub fn emulator(program: &Path) -> Result<()> {
    let mut bytes = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let left: Vec<String> = STORES.iter().filter_map(|store| take_out(&mut bytes, store).err()).map(|error| error.to_string()).collect();
    std::fs::write(program, bytes).with_context(|| format!("write {}", program.display()))?;
    ensure!(left.is_empty(), "mend {}: {}", program.display(), left.join(", "));
    Ok(())
}

fn take_out(bytes: &mut [u8], store: &Store) -> Result<()> {
    let places: Vec<usize> = (0..bytes.len()).filter(|&start| is_store(&bytes[start..], store)).collect();
    let [place] = places[..] else { bail!("the store to {} is there {} times", store.name, places.len()) };
    bytes[place..place + store.nothing.len()].copy_from_slice(store.nothing);
    Ok(())
}

fn is_store(mut bytes: &[u8], store: &Store) -> bool {
    store.code.iter().all(|(code, operand)| {
        let Some(rest) = bytes.strip_prefix(*code).and_then(|rest| rest.get(*operand..)) else { return false };
        bytes = rest;
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store as a program could have it, its operands being nines.
    fn example(store: &Store) -> Vec<u8> {
        store.code.iter().flat_map(|(code, operand)| [code.to_vec(), vec![9; *operand]].concat()).collect()
    }

    #[test]
    fn the_one_store_is_taken_out_and_nothing_else() {
        for store in &STORES {
            let program = [&[0x90; 7][..], &example(store), &[0x00, 0x90]].concat();
            let mut mended = program.clone();
            take_out(&mut mended, store).unwrap();
            let end = 7 + store.nothing.len();
            assert_eq!(&mended[7..end], store.nothing);
            assert_eq!((&mended[..7], &mended[end..]), (&program[..7], &program[end..]));
        }
    }

    #[test]
    fn a_program_without_it_or_with_two_is_left_alone() {
        for store in &STORES {
            let program = example(store);
            for mut other in [Vec::new(), vec![0x89; 100], program.repeat(2), program[..program.len() - 1].to_vec()] {
                let before = other.clone();
                assert!(take_out(&mut other, store).unwrap_err().to_string().contains("times"));
                assert_eq!(other, before);
            }
        }
    }
}
