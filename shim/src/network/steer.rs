//! Steers every TCP connection within a network namespace to a pair of listeners, whatever address
//! and port it is for: a program of type `sk_lookup` (Linux 5.9, Documentation/bpf/prog_sk_lookup.rst).
//!
//! The namespace has no other sockets: the pod's are in the guest. Nothing is configured in the
//! namespace, and the kernel lets go of the program with the last descriptor.
#![expect(unsafe_code, reason = "bpf(2) has no wrapper")]

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

/// Commands of bpf(2).
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
/// `BPF_MAP_TYPE_SOCKMAP`, `BPF_PROG_TYPE_SK_LOOKUP`, `BPF_SK_LOOKUP` (linux/bpf.h).
const SOCKMAP: u32 = 15;
const SK_LOOKUP_PROGRAM: u32 = 30;
const SK_LOOKUP: u32 = 36;
/// Bytes of a socket map's key and value.
const KEY: u32 = 4;
const VALUE: u32 = 8;

/// The listener for each family, IPv4 first: its key in the map.
const FAMILIES: u32 = 2;

#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that loading reads, up to the attach type.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 2],
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// What keeps the steering up; dropping it ends it.
pub struct Steering(#[expect(dead_code, reason = "held for its end")] OwnedFd);

/// Steers connections in `netns` to `v4` or, when there is one, `v6`.
///
/// # Errors
/// When the kernel is older than 5.9, or the shim may not use BPF.
pub fn steer(netns: BorrowedFd<'_>, v4: &TcpListener, v6: Option<&TcpListener>) -> Result<Steering> {
    let map = MapAttributes { kind: SOCKMAP, key_size: KEY, value_size: VALUE, max_entries: FAMILIES };
    let map = descriptor(bpf(MAP_CREATE, &map)).context("make a socket map")?;
    for (key, listener) in [(0u32, Some(v4)), (1, v6)] {
        let Some(listener) = listener else { continue };
        let value = u64::from(number(listener.as_fd()));
        let update = UpdateAttributes {
            map: number(map.as_fd()),
            _padding: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        Errno::result(bpf(MAP_UPDATE_ELEM, &update)).context("put a listener into the socket map")?;
    }
    let instructions = program(number(map.as_fd()));
    let load = LoadAttributes {
        kind: SK_LOOKUP_PROGRAM,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type: SK_LOOKUP,
        ..LoadAttributes::default()
    };
    let loaded = descriptor(bpf(PROG_LOAD, &load)).context("load the program")?;
    let link = LinkAttributes { program: number(loaded.as_fd()), target: number(netns), attach_type: SK_LOOKUP, flags: 0 };
    descriptor(bpf(LINK_CREATE, &link)).context("attach the program").map(Steering)
}

/// One instruction (Documentation/bpf/instruction-set.rst): operation, source and destination
/// register, offset, constant.
const fn instruction(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> u64 {
    code as u64 | (destination as u64) << 8 | (source as u64) << 12 | (offset as u16 as u64) << 16 | (constant as u32 as u64) << 32
}

/// For TCP, assigns the connection to the listener of its family.
const fn program(map: u32) -> [u64; 23] {
    // Offsets in `struct bpf_sk_lookup`; helpers by number.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    [
        instruction(0xbf, 6, 1, 0, 0),                  // r6 = the lookup
        instruction(0x61, 2, 6, PROTOCOL, 0),           // r2 = its protocol
        instruction(0x55, 2, 0, 18, libc::IPPROTO_TCP), // another one: pass
        instruction(0xb4, 7, 0, 0, 1),                  // key 1
        instruction(0x61, 2, 6, FAMILY, 0),             //
        instruction(0x55, 2, 0, 1, libc::AF_INET),      // or, for IPv4,
        instruction(0xb4, 7, 0, 0, 0),                  // key 0
        instruction(0x63, 10, 7, -4, 0),                // on the stack
        instruction(0x18, 1, 1, 0, map.cast_signed()),  // r1 = the map, in two words
        instruction(0, 0, 0, 0, 0),                     //
        instruction(0xbf, 2, 10, 0, 0),                 // r2 = the key's address
        instruction(0x07, 2, 0, 0, -4),                 //
        instruction(0x85, 0, 0, 0, MAP_LOOKUP),         // r0 = the listener
        instruction(0x15, 0, 0, 7, 0),                  // none: pass
        instruction(0xbf, 7, 0, 0, 0),                  //
        instruction(0xbf, 1, 6, 0, 0),                  //
        instruction(0xbf, 2, 7, 0, 0),                  //
        instruction(0xb4, 3, 0, 0, 0),                  //
        instruction(0x85, 0, 0, 0, SK_ASSIGN),          // assign it; one that cannot be is not
        instruction(0xbf, 1, 7, 0, 0),                  //
        instruction(0x85, 0, 0, 0, SK_RELEASE),         //
        instruction(0xb4, 0, 0, 0, 1),                  // pass: SK_PASS
        instruction(0x95, 0, 0, 0, 0),                  //
    ]
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> libc::c_long {
    // SAFETY: the attributes, and what they point to, live through the call, and the size is theirs.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) }
}

/// The result of a command that makes a descriptor.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
