//! A guest kernel that does what a table says: writes to memory, registers and ports, again and again if it is to.
//!
//! It is entered as Linux is (64-bit boot protocol: long mode, paging on, interrupts off), takes page tables of its own that
//! map the first 4 GiB, and has no handler for anything: a fault of its own ends it.
#![expect(unsafe_code, reason = "the kernel's instructions stand in this program, and are copied out of it")]

use std::arch::global_asm;

/// Where it is loaded, and what follows its instructions: page tables, the table.
const BASE: u64 = 0x100_0000;
const PAGE_TABLES: u64 = BASE + 0x1000;
const TABLE: u64 = BASE + 0x8000;
/// Bytes of an entry of the table: what to do, two operands.
const ENTRY: u64 = 24;
const PAGE: u64 = 0x1000;
/// Present, writable; a large page.
const PTE: u64 = 3;
const LARGE: u64 = 0x80;

const WRITE32: u64 = 1;
const WRITE64: u64 = 2;
const OUT: u64 = 3;
const REPEAT: u64 = 4;
const WAIT: u64 = 5;
const READ32: u64 = 6;
const ADD64: u64 = 7;
const FAULT: u64 = 8;
/// Anything else.
const HALT: u64 = 0;

// rbx: the next entry; rcx, rdi, rax: the present one.
global_asm!(
    ".section .rodata",
    ".global caisson_hostile_start",
    ".global caisson_hostile_end",
    "caisson_hostile_start:",
    "lea rbx, [rip + caisson_hostile_start]",
    "lea rax, [rbx + 0x1000]",
    "mov cr3, rax",
    "add rbx, 0x8000",
    ".Lhostile_next:",
    "mov rcx, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rax, [rbx + 16]",
    "add rbx, 24",
    "cmp rcx, 1",
    "je .Lhostile_write32",
    "cmp rcx, 2",
    "je .Lhostile_write64",
    "cmp rcx, 3",
    "je .Lhostile_out",
    "cmp rcx, 4",
    "je .Lhostile_repeat",
    "cmp rcx, 5",
    "je .Lhostile_wait",
    "cmp rcx, 6",
    "je .Lhostile_read32",
    "cmp rcx, 7",
    "je .Lhostile_add64",
    "cmp rcx, 8",
    "je .Lhostile_fault",
    ".Lhostile_halt:",
    "cli",
    "hlt",
    "jmp .Lhostile_halt",
    ".Lhostile_write32:",
    "mov [rdi], eax",
    "jmp .Lhostile_next",
    ".Lhostile_write64:",
    "mov [rdi], rax",
    "jmp .Lhostile_next",
    ".Lhostile_out:",
    "mov edx, edi",
    "out dx, al",
    "jmp .Lhostile_next",
    ".Lhostile_repeat:",
    "sub qword ptr [rbx - 8], 1",
    "jz .Lhostile_next",
    "sub rbx, rdi",
    "jmp .Lhostile_next",
    ".Lhostile_wait:",
    "pause",
    "sub rax, 1",
    "jnz .Lhostile_wait",
    "jmp .Lhostile_next",
    ".Lhostile_read32:",
    "mov eax, [rdi]",
    "jmp .Lhostile_next",
    ".Lhostile_add64:",
    "add [rdi], rax",
    "jmp .Lhostile_next",
    ".Lhostile_fault:",
    "ud2",
    "caisson_hostile_end:",
    ".text",
);

unsafe extern "C" {
    static caisson_hostile_start: u8;
    static caisson_hostile_end: u8;
}

/// The kernel's instructions.
fn instructions() -> &'static [u8] {
    // SAFETY: both are symbols of one read-only section, the second behind the first; all between them is what stands above.
    unsafe {
        let start = &raw const caisson_hostile_start;
        std::slice::from_raw_parts(start, (&raw const caisson_hostile_end).offset_from_unsigned(start))
    }
}

/// What the kernel does, step by step; at its end it resets the machine, which shows that the monitor has survived all before.
#[derive(Default)]
pub struct Program(Vec<[u64; 3]>);

/// The keyboard controller's command port, and the command that resets.
const RESET: (u64, u64) = (0x64, 0xfe);

impl Program {
    fn step(&mut self, what: u64, first: u64, second: u64) -> &mut Self {
        self.0.push([what, first, second]);
        self
    }

    /// Writes four bytes.
    pub fn write32(&mut self, address: u64, value: u64) -> &mut Self {
        self.step(WRITE32, address, value)
    }

    /// Writes eight bytes.
    pub fn write64(&mut self, address: u64, value: u64) -> &mut Self {
        self.step(WRITE64, address, value)
    }

    /// Reads four bytes, and forgets them.
    pub fn read32(&mut self, address: u64) -> &mut Self {
        self.step(READ32, address, 0)
    }

    /// Writes a byte to a port.
    pub fn out(&mut self, port: u64, value: u64) -> &mut Self {
        self.step(OUT, port, value)
    }

    /// Adds to eight bytes of memory.
    pub fn add64(&mut self, address: u64, value: u64) -> &mut Self {
        self.step(ADD64, address, value)
    }

    /// Lets the machine's devices work for a while.
    pub fn wait(&mut self) -> &mut Self {
        self.step(WAIT, 0, 3_000_000)
    }

    /// Halts for ever, interrupts off.
    pub fn halt(&mut self) -> &mut Self {
        self.step(HALT, 0, 0)
    }

    /// Does what it cannot do, without anybody to handle it.
    pub fn fault(&mut self) -> &mut Self {
        self.step(FAULT, 0, 0)
    }

    /// Does `body` so many times. Not within itself: the count is used up.
    pub fn repeat(&mut self, times: u64, body: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.0.len();
        body(self);
        let back = (self.0.len() - start) as u64 * ENTRY + ENTRY;
        self.step(REPEAT, back, times)
    }

    /// Address of the second operand, or with `first` of the first one, of the step that comes next.
    pub fn operand(&self, first: bool) -> u64 {
        TABLE + self.0.len() as u64 * ENTRY + if first { 8 } else { 16 }
    }

    /// The kernel as an ELF file.
    pub fn kernel(&self) -> Vec<u8> {
        let mut image = instructions().to_vec();
        image.resize((TABLE - BASE) as usize, 0);
        let mut put = |address: u64, value: u64| {
            let at = (address - BASE) as usize;
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(PAGE_TABLES, (PAGE_TABLES + PAGE) | PTE);
        for directory in 0..4 {
            let address = PAGE_TABLES + (2 + directory) * PAGE;
            put(PAGE_TABLES + PAGE + 8 * directory, address | PTE);
            (0..512).for_each(|entry| put(address + 8 * entry, (directory << 30 | entry << 21) | PTE | LARGE));
        }
        let end = [[OUT, RESET.0, RESET.1], [HALT, 0, 0]];
        image.extend(self.0.iter().chain(&end).flatten().flat_map(|word| word.to_le_bytes()));
        elf(&image)
    }
}

/// An executable of one segment (elf(5)).
fn elf(image: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [BASE, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for half in [1_u32, 7] {
        file.extend(half.to_le_bytes());
    }
    let bytes = image.len() as u64;
    for word in [HEADERS, BASE, BASE, bytes, bytes, PAGE] {
        file.extend(word.to_le_bytes());
    }
    file.extend(image);
    file
}
