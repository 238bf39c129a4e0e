//! Steers every TCP connection within a network namespace to a pair of listeners, whatever address
//! and port it is for: a program of type `sk_lookup` (Linux 5.9, Documentation/bpf/prog_sk_lookup.rst).
//!
//! The namespace has no other sockets: the pod's are in the guest. Nothing is configured in the
//! namespace, and the kernel lets go of the program with the last descriptor.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use caisson_sys::bpf::{self, Instruction};

/// `BPF_PROG_TYPE_SK_LOOKUP`, `BPF_SK_LOOKUP` (linux/bpf.h).
const SK_LOOKUP_PROGRAM: u32 = 30;
const SK_LOOKUP: u32 = 36;

/// The listener for each family, IPv4 first: its key in the map.
const FAMILIES: u32 = 2;

/// What keeps the steering up; dropping it ends it.
pub struct Steering(#[expect(dead_code, reason = "held for its end")] OwnedFd);

/// Steers connections in `netns` to `v4` or, when there is one, `v6`.
///
/// # Errors
/// When the kernel is older than 5.9, or the shim may not use BPF.
pub fn steer(netns: BorrowedFd<'_>, v4: &TcpListener, v6: Option<&TcpListener>) -> Result<Steering> {
    let map = bpf::socket_map(FAMILIES).context("make a socket map")?;
    for (key, listener) in [(0, Some(v4)), (1, v6)] {
        if let Some(listener) = listener {
            bpf::put_socket(map.as_fd(), key, listener.as_fd()).context("put a listener into the socket map")?;
        }
    }
    let program = bpf::load(SK_LOOKUP_PROGRAM, SK_LOOKUP, &program(map.as_raw_fd())).context("load the program")?;
    bpf::link(program.as_fd(), netns, SK_LOOKUP).context("attach the program").map(Steering)
}

/// For TCP, assigns the connection to the listener of its family.
const fn program(map: i32) -> [Instruction; 23] {
    // Offsets in `struct bpf_sk_lookup`; helpers by number.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    [
        Instruction::new(0xbf, 6, 1, 0, 0),                  // r6 = the lookup
        Instruction::new(0x61, 2, 6, PROTOCOL, 0),           // r2 = its protocol
        Instruction::new(0x55, 2, 0, 18, libc::IPPROTO_TCP), // another one: pass
        Instruction::new(0xb4, 7, 0, 0, 1),                  // key 1
        Instruction::new(0x61, 2, 6, FAMILY, 0),             //
        Instruction::new(0x55, 2, 0, 1, libc::AF_INET),      // or, for IPv4,
        Instruction::new(0xb4, 7, 0, 0, 0),                  // key 0
        Instruction::new(0x63, 10, 7, -4, 0),                // on the stack
        Instruction::new(0x18, 1, 1, 0, map),                // r1 = the map, in two words
        Instruction::new(0, 0, 0, 0, 0),                     //
        Instruction::new(0xbf, 2, 10, 0, 0),                 // r2 = the key's address
        Instruction::new(0x07, 2, 0, 0, -4),                 //
        Instruction::new(0x85, 0, 0, 0, MAP_LOOKUP),         // r0 = the listener
        Instruction::new(0x15, 0, 0, 7, 0),                  // none: pass
        Instruction::new(0xbf, 7, 0, 0, 0),                  //
        Instruction::new(0xbf, 1, 6, 0, 0),                  //
        Instruction::new(0xbf, 2, 7, 0, 0),                  //
        Instruction::new(0xb4, 3, 0, 0, 0),                  //
        Instruction::new(0x85, 0, 0, 0, SK_ASSIGN),          // assign it; one that cannot be is not
        Instruction::new(0xbf, 1, 7, 0, 0),                  //
        Instruction::new(0x85, 0, 0, 0, SK_RELEASE),         //
        Instruction::new(0xb4, 0, 0, 0, 1),                  // pass: SK_PASS
        Instruction::new(0x95, 0, 0, 0, 0),                  //
    ]
}
