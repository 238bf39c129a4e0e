//! Device rules: which device nodes a container may open or make.
//!
//! cgroup v2 has no files for this; a BPF program attached to the cgroup decides
//! (`BPF_PROG_TYPE_CGROUP_DEVICE`). Its context is three 32-bit words: access and type, major, minor.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use caisson_sys::bpf::{self, Instruction};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};

use crate::cgroup::Cgroup;

/// `BPF_PROG_TYPE_CGROUP_DEVICE`, `BPF_CGROUP_DEVICE`, `BPF_F_ALLOW_MULTI` of linux/bpf.h.
const DEVICE_PROGRAM: u32 = 15;
const DEVICE_ACCESS: u32 = 6;
const ALLOW_MULTI: u32 = 2;
/// `BPF_DEVCG_*` of linux/bpf.h.
const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// One rule; a later one overrides an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` for both.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may use, as other runtimes have it: making any node, and the usual ones.
const DEFAULT: &[Rule] = &[
    device(CHAR, None, None, MKNOD),
    device(BLOCK, None, None, MKNOD),
    device(CHAR, Some(1), Some(3), READ | WRITE | MKNOD),
    device(CHAR, Some(1), Some(5), READ | WRITE | MKNOD),
    device(CHAR, Some(1), Some(7), READ | WRITE | MKNOD),
    device(CHAR, Some(1), Some(8), READ | WRITE | MKNOD),
    device(CHAR, Some(1), Some(9), READ | WRITE | MKNOD),
    device(CHAR, Some(5), Some(0), READ | WRITE | MKNOD),
    device(CHAR, Some(5), Some(1), READ | WRITE | MKNOD),
    device(CHAR, Some(5), Some(2), READ | WRITE | MKNOD),
    device(CHAR, Some(136), None, READ | WRITE | MKNOD),
];

const fn device(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// Enforces the device rules of a container's specification, when it has any.
///
/// # Errors
/// When the program cannot be loaded or attached: rules are never skipped.
pub fn restrict(cgroup: &Cgroup, spec: &Spec) -> Result<()> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()).and_then(|resources| resources.devices().as_deref());
    let Some(devices) = devices.filter(|devices| !devices.is_empty()) else { return Ok(()) };
    let mut rules: Vec<Rule> = devices.iter().flat_map(rule).collect();
    rules.extend_from_slice(DEFAULT);
    let dir = File::open(cgroup.dir()).context("open the container's cgroup")?;
    let program = bpf::load(DEVICE_PROGRAM, DEVICE_ACCESS, &program(&rules)).context("load the container's device rules")?;
    bpf::attach(dir.as_fd(), program.as_fd(), DEVICE_ACCESS, ALLOW_MULTI).context("enforce the container's device rules")
}

fn rule(device: &LinuxDeviceCgroup) -> Option<Rule> {
    let number = |value: Option<i64>| value.filter(|value| *value >= 0).and_then(|value| i32::try_from(value).ok());
    let access = device.access().as_deref().unwrap_or("rwm").chars().fold(0, |access, letter| {
        access
            | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => 0,
            }
    });
    let kind = match device.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        // A FIFO is no device.
        Some(LinuxDeviceType::P) => return None,
    };
    Some(Rule { allow: device.allow(), kind, major: number(device.major()), minor: number(device.minor()), access })
}

/// Registers.
const RESULT: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Operations, with a constant as second operand unless they say otherwise.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// The program: the last rule that matches decides; what no rule matches is denied.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    // Register 1 holds the context at entry, and is free once it was read.
    let mut program = vec![
        Instruction::new(LOAD_WORD, KIND, SCRATCH, 0, 0),
        Instruction::new(AND, KIND, 0, 0, 0xffff),
        Instruction::new(LOAD_WORD, ACCESS, SCRATCH, 0, 0),
        Instruction::new(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        Instruction::new(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        Instruction::new(LOAD_WORD, MINOR, SCRATCH, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut block = Vec::new();
        if let Some(kind) = rule.kind {
            block.push(Instruction::new(JUMP_NOT_EQUAL, KIND, 0, 0, kind));
        }
        block.push(Instruction::new(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
        if rule.allow {
            // Allowed only when nothing else is asked for.
            block.push(Instruction::new(AND, SCRATCH, 0, 0, !rule.access));
            block.push(Instruction::new(JUMP_NOT_EQUAL, SCRATCH, 0, 0, 0));
        } else {
            // Denied as soon as one of them is asked for.
            block.push(Instruction::new(AND, SCRATCH, 0, 0, rule.access));
            block.push(Instruction::new(JUMP_EQUAL, SCRATCH, 0, 0, 0));
        }
        for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(number) = number {
                block.push(Instruction::new(JUMP_NOT_EQUAL, register, 0, 0, number));
            }
        }
        block.push(Instruction::new(MOVE, RESULT, 0, 0, i32::from(rule.allow)));
        block.push(Instruction::new(EXIT, 0, 0, 0, 0));
        // Every jump goes to the next rule: to the end of this block.
        let end = block.len();
        for (index, instruction) in block.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_EQUAL | JUMP_NOT_EQUAL) {
                instruction.offset = (end - index - 1) as i16;
            }
        }
        program.extend(block);
    }
    program.push(Instruction::new(MOVE, RESULT, 0, 0, 0));
    program.push(Instruction::new(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn decide(rules: &[Rule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let program = program(rules);
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i32; 6];
        let mut at = 0usize;
        loop {
            let instruction = program[at];
            let (destination, source) = (usize::from(instruction.registers & 15), usize::from(instruction.registers >> 4));
            at += 1;
            match instruction.code {
                LOAD_WORD => registers[destination] = context[instruction.offset as usize / 4],
                AND => registers[destination] &= instruction.immediate,
                SHIFT_RIGHT => registers[destination] >>= instruction.immediate,
                MOVE => registers[destination] = instruction.immediate,
                MOVE_REGISTER => registers[destination] = registers[source],
                JUMP_EQUAL if registers[destination] == instruction.immediate => at += instruction.offset as usize,
                JUMP_NOT_EQUAL if registers[destination] != instruction.immediate => at += instruction.offset as usize,
                EXIT => return registers[0] != 0,
                _ => {}
            }
        }
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let deny_all = Rule { allow: false, kind: None, major: None, minor: None, access: READ | WRITE | MKNOD };
        let rules = [deny_all, device(CHAR, Some(1), Some(3), READ | WRITE), device(BLOCK, Some(8), None, READ)];
        assert!(decide(&rules, CHAR, READ, 1, 3));
        assert!(!decide(&rules, CHAR, READ | MKNOD, 1, 3));
        assert!(!decide(&rules, BLOCK, READ, 1, 3));
        assert!(decide(&rules, BLOCK, READ, 8, 17));
        assert!(!decide(&rules, BLOCK, WRITE, 8, 17));
        let rules = [device(CHAR, None, None, READ | WRITE), Rule { allow: false, major: Some(1), minor: Some(1), ..deny_all }];
        assert!(decide(&rules, CHAR, READ, 1, 3) && !decide(&rules, CHAR, READ, 1, 1));
    }

    #[test]
    fn what_no_rule_matches_is_denied() {
        assert!(!decide(&[], CHAR, READ, 1, 3));
    }
}
