//! bpf(2): programs loaded and attached (Linux `Documentation/bpf`, `linux/bpf.h`).
#![expect(unsafe_code, reason = "raw system calls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::descriptor;

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const LINK_CREATE: libc::c_long = 28;

/// `BPF_MAP_TYPE_SOCKMAP`.
const SOCKMAP: u32 = 15;
/// Bytes of a socket map's key and value.
const SOCKMAP_KEY: u32 = 4;
const SOCKMAP_VALUE: u32 = 8;

/// One instruction (`Documentation/bpf/instruction-set.rst`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source in the high ones.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

impl Instruction {
    /// An instruction from its parts.
    pub const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: destination | source << 4, offset, immediate }
    }
}

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

/// What attaching reads, and likewise making a link (with the first two exchanged).
#[repr(C)]
struct AttachAttributes {
    first: u32,
    second: u32,
    kind: u32,
    flags: u32,
}

/// A map of sockets, with room for `entries`.
///
/// # Errors
/// The kernel's.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    let map = MapAttributes { kind: SOCKMAP, key_size: SOCKMAP_KEY, value_size: SOCKMAP_VALUE, max_entries: entries };
    // SAFETY: the attributes are those of the command, and hold no address.
    descriptor(unsafe { call(MAP_CREATE, &map) })
}

/// Puts a socket into a map of sockets.
///
/// # Errors
/// The kernel's.
pub fn put_socket(map: BorrowedFd<'_>, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = u64::from(number(socket));
    let update =
        UpdateAttributes { map: number(map), _padding: 0, key: (&raw const key) as u64, value: (&raw const value) as u64, flags: 0 };
    // SAFETY: key and value live through the call and have a socket map's sizes.
    Ok(Errno::result(unsafe { call(MAP_UPDATE_ELEM, &update) }).map(drop)?)
}

/// Loads a program of a type (`BPF_PROG_TYPE_*`) for a place (`BPF_*`, 0 where the type has but one).
///
/// # Errors
/// The kernel's; EPERM without the right to load programs.
pub fn load(kind: u32, attach_type: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type,
        ..LoadAttributes::default()
    };
    // SAFETY: program and licence live through the call, and the count is the program's.
    descriptor(unsafe { call(PROG_LOAD, &attributes) })
}

/// Attaches a program to a cgroup, for as long as the cgroup lives.
///
/// # Errors
/// The kernel's.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, place: u32, flags: u32) -> io::Result<()> {
    let attributes = AttachAttributes { first: number(cgroup), second: number(program), kind: place, flags };
    // SAFETY: the attributes hold no address.
    Ok(Errno::result(unsafe { call(PROG_ATTACH, &attributes) }).map(drop)?)
}

/// Attaches a program for as long as the returned link is open.
///
/// # Errors
/// The kernel's.
pub fn link(program: BorrowedFd<'_>, target: BorrowedFd<'_>, place: u32) -> io::Result<OwnedFd> {
    let attributes = AttachAttributes { first: number(program), second: number(target), kind: place, flags: 0 };
    // SAFETY: the attributes hold no address.
    descriptor(unsafe { call(LINK_CREATE, &attributes) })
}

/// Makes a bpf(2) call.
///
/// # Safety
/// Every address in the attributes is valid for what the command does with it.
unsafe fn call<T>(command: libc::c_long, attributes: &T) -> libc::c_long {
    // SAFETY: the attributes live through the call and the size is theirs; the rest is the caller's word.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}
