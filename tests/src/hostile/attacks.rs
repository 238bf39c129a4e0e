//! What the hostile kernel does, by device and by idea.

use super::guest::Program;

/// Registers of the devices (`vmm/src/memory.rs`, virtio 1.2, 4.2.2), and their numbers.
const REGISTERS: u64 = 0xd000_0000;
const WINDOW: u64 = 0x1000;
const FS: u64 = 0;
const VSOCK: u64 = 1;
const RNG: u64 = 2;
const DEVICES: u64 = 21;
const STATUS: u64 = 0x70;
const NOTIFY: u64 = 0x50;
const ACKNOWLEDGE: u64 = 0x64;
/// Memory that nothing else lies in, a part for each queue: descriptors, available and used ring, data.
const QUEUES: u64 = 0x200_0000;
const QUEUE_BYTES: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;
const SIZE: u64 = 16;
/// Flags of a descriptor (2.7.5).
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
/// What the monitor says of a machine that its guest reset, and of one whose guest faulted.
const RESET: &str = "the guest reset the machine";
const BOOT_MS: u32 = 60_000;

/// An attack.
pub struct Attack {
    pub name: &'static str,
    pub program: Program,
    pub boot_ms: u32,
    /// One of which is in the sentence that the caller of the pod reads.
    pub ends: &'static [&'static str],
}

/// All of them.
pub fn all() -> Vec<Attack> {
    let attack = |name, ends, build: fn(&mut Program)| {
        let mut program = Program::default();
        build(&mut program);
        Attack { name, program, boot_ms: BOOT_MS, ends }
    };
    vec![
        attack("a fault", &[RESET], |program| {
            program.fault();
        }),
        Attack {
            boot_ms: 5000,
            ..attack("silence", &["the guest was not ready within 5000 ms"], |program| {
                program.halt();
            })
        },
        attack("every register", &[RESET], every_register),
        attack("every port", &[RESET], every_port),
        attack("queues outside of memory", &[RESET], queues_outside),
        attack("chains without end", &[RESET], |program| chains(program, VSOCK)),
        attack("chains of entropy", &[RESET], |program| chains(program, RNG)),
        attack("chains of files", &["virtio-fs server", "a request of the guest", "the guest's queue", RESET], |program| {
            chains(program, FS)
        }),
        attack("requests that are none", &["a request of the guest", "the virtio-fs server"], requests),
        attack("a flood of connections", &[RESET], connections),
        attack("a storm of notifications", &[RESET], storm),
        attack("queues that change while they run", &[RESET], changing_queues),
        attack("memory that there is not", &[RESET], beyond_memory),
    ]
}

const fn register(device: u64, offset: u64) -> u64 {
    REGISTERS + device * WINDOW + offset
}

const fn queue(number: u64) -> u64 {
    QUEUES + number * QUEUE_BYTES
}

/// What a driver does to bring a device up whose queues lie where `place` says.
fn bring_up(program: &mut Program, device: u64, queues: u64, size: u64, place: impl Fn(u64) -> [u64; 3]) {
    let mut set = |offset, value| {
        program.write32(register(device, offset), value);
    };
    [0, 1, 3].into_iter().for_each(|status| set(STATUS, status));
    // Indirect descriptors, and version 1.
    for (half, features) in [(0, 1 << 28), (1, 1)] {
        set(0x24, half);
        set(0x20, features);
    }
    set(STATUS, 11);
    for queue in 0..queues {
        let [descriptors, available, used] = place(queue);
        let addresses = [(0x80, descriptors), (0x90, available), (0xa0, used)];
        set(0x30, queue);
        set(0x38, size);
        for (offset, address) in addresses {
            set(offset, address & 0xffff_ffff);
            set(offset + 4, address >> 32);
        }
        set(0x44, 1);
    }
    set(STATUS, 15);
}

fn usual(number: u64) -> [u64; 3] {
    [queue(number), queue(number) + AVAILABLE, queue(number) + USED]
}

fn descriptor(program: &mut Program, table: u64, index: u64, address: u64, length: u64, flags: u64, next: u64) {
    program.write64(table + 16 * index, address);
    program.write64(table + 16 * index + 8, length | flags << 32 | next << 48);
}

/// Offers heads from the ring's beginning on, and says that there are `count` in all.
fn offer(program: &mut Program, number: u64, heads: &[u64], count: u64) {
    let ring = queue(number) + AVAILABLE;
    for (index, head) in (0..).zip(heads.chunks(2)) {
        program.write32(ring + 4 + 4 * index, head[0] | head.get(1).unwrap_or(&0) << 16);
    }
    program.write32(ring, count << 16);
}

fn every_register(program: &mut Program) {
    for value in [0, 1, 0xf, 0x8000_0000, 0xffff_ffff] {
        for device in 0..DEVICES {
            for offset in (0..0x140).step_by(4) {
                program.write32(register(device, offset), value);
            }
            program.read32(register(device, 0x60)).read32(register(device, 0x104)).write64(register(device, 0x70), u64::MAX);
        }
    }
    program.wait();
}

fn every_port(program: &mut Program) {
    for value in [0, 0xff] {
        let port = program.operand(true);
        // Each fifth: all of them take long under emulation.
        program.repeat(0x3334, |program| {
            program.out(0, value).add64(port, 5);
        });
    }
}

fn queues_outside(program: &mut Program) {
    for place in [u64::MAX - 15, u64::MAX - 0xfff, REGISTERS, 0xfff_fff0, 0x1_0000_0000, 0xffff_ffff_0000_0000, queue(0) + 1] {
        for size in [0, 3, SIZE, 0x8000, 0xffff] {
            for device in 0..3 {
                bring_up(program, device, 3, size, |_| [place, place, place]);
                program.write32(register(device, NOTIFY), 0).write32(register(device, NOTIFY), 0xffff_ffff);
            }
        }
    }
    program.wait();
}

fn chains(program: &mut Program, device: u64) {
    bring_up(program, device, 3, SIZE, usual);
    for number in 0..3 {
        let table = queue(number);
        let data = table + DATA;
        // One that is its own next; a circle of two; one that leads out of the table.
        descriptor(program, table, 0, data, 64, NEXT, 0);
        descriptor(program, table, 1, data, 64, NEXT | WRITE, 2);
        descriptor(program, table, 2, data, 64, NEXT, 1);
        descriptor(program, table, 3, data, 64, NEXT, 0xffff);
        // Indirect tables: too large, of half an entry, empty, outside of memory, within themselves, with a direct successor.
        descriptor(program, table, 4, data, 0xffff_fff0, INDIRECT, 0);
        descriptor(program, table, 5, data, 24, INDIRECT, 0);
        descriptor(program, table, 6, data, 0, INDIRECT, 0);
        descriptor(program, table, 7, u64::MAX - 0xf, 64, INDIRECT, 0);
        descriptor(program, table, 8, data + 0x100, 64, INDIRECT, 0);
        descriptor(program, data + 0x100, 0, data + 0x100, 64, INDIRECT | NEXT, 0);
        descriptor(program, table, 9, data, 64, INDIRECT | NEXT, 0);
        // Buffers: all of memory, over its end, at the end of all addresses, in registers, of no bytes.
        descriptor(program, table, 10, 0, 0xffff_ffff, WRITE, 0);
        descriptor(program, table, 11, 0xfff_f000, 0x2000, 0, 0);
        descriptor(program, table, 12, u64::MAX, 0xffff_ffff, WRITE, 0);
        descriptor(program, table, 13, REGISTERS, 0x1000, WRITE, 0);
        descriptor(program, table, 14, data, 0, 0, 0);
        let heads: Vec<u64> = (0..15).chain([0xffff, 16]).collect();
        // All that there are; then more than fit into the ring; then less than before.
        for count in [15, SIZE, 40_000, 3] {
            offer(program, number, &heads[..16], count);
            program.write32(register(device, NOTIFY), number).wait();
        }
        offer(program, number, &[0xffff, 16, 17, 3], 7);
        program.write32(register(device, NOTIFY), number).wait();
    }
}

/// Requests of FUSE (`struct fuse_in_header`: length, opcode, unique, node) that say what they are not.
fn requests(program: &mut Program) {
    bring_up(program, FS, 2, SIZE, usual);
    let (table, data) = (queue(1), queue(1) + DATA);
    // INIT and what comes after, with lengths of nothing and of everything; the last, a READ, has no room for an answer.
    let kinds = [(26, 0xffff_ffff), (26, 0), (1, 0xffff), (9999, 64), (0xffff_ffff, 64), (15, 80), (16, 4), (43, 0x7fff_ffff), (15, 80)];
    for (index, (opcode, length)) in (0..).zip(kinds) {
        let request = data + 0x1000 * index;
        program.write64(request, length | opcode << 32).write64(request + 8, index).write64(request + 16, u64::MAX);
        let last = index + 1 == kinds.len() as u64;
        descriptor(program, table, index, request, 80, if last { 0 } else { NEXT }, 15);
        descriptor(program, table, 15, request + 0x800, 0x800, WRITE, 0);
        let ring = table + AVAILABLE;
        program.write32(ring + 4 + 2 * index, index).write32(ring, (index + 1) << 16);
        program.write32(register(FS, NOTIFY), 1).wait();
    }
}

/// Connections to port after port (5.10.6, `struct virtio_vsock_hdr`), none of which is there.
fn connections(program: &mut Program) {
    bring_up(program, VSOCK, 3, SIZE, usual);
    let (receive, transmit) = (queue(0), queue(1));
    // Room for answers, and sixteen packets that are each sent again and again, from another port each time.
    for index in 0..SIZE {
        descriptor(program, receive, index, receive + DATA + 0x1000 * index, 0x1000, WRITE, 0);
        let packet = transmit + DATA + 0x1000 * index;
        // From 3 to 2; ports; no bytes, a stream, a request; room.
        program.write64(packet, 3).write64(packet + 8, 2).write64(packet + 16, 1000 + index).write64(packet + 24, 0x1_0001 << 32);
        program.write64(packet + 32, 0x1_0000 << 32);
        descriptor(program, transmit, index, packet, 44, 0, 0);
    }
    let heads: Vec<u64> = (0..SIZE).collect();
    offer(program, 0, &heads, SIZE);
    offer(program, 1, &heads, SIZE);
    program.write32(register(VSOCK, NOTIFY), 0).write32(register(VSOCK, NOTIFY), 1);
    program.repeat(3000, |program| {
        for packet in (0..SIZE).map(|index| transmit + DATA + 0x1000 * index) {
            program.add64(packet + 16, 1 << 32 | 16);
        }
        // Sixteen more of each.
        program.add64(receive + AVAILABLE, SIZE << 16).add64(transmit + AVAILABLE, SIZE << 16);
        program.write32(register(VSOCK, NOTIFY), 1).write32(register(VSOCK, NOTIFY), 0);
    });
    program.wait();
}

fn storm(program: &mut Program) {
    for device in [VSOCK, RNG] {
        bring_up(program, device, 3, SIZE, usual);
    }
    program.repeat(20_000, |program| {
        for queue in 0..3 {
            program.write32(register(VSOCK, NOTIFY), queue).write32(register(RNG, NOTIFY), queue);
        }
        program.write32(register(RNG, ACKNOWLEDGE), 1).write32(register(VSOCK, ACKNOWLEDGE), 3);
    });
}

/// What a driver says of its queues before it says that it is ready, said anew afterwards: sizes, places, and that there are none.
fn changing_queues(program: &mut Program) {
    for device in [VSOCK, RNG] {
        bring_up(program, device, 3, SIZE, usual);
        offer(program, 0, &[0, 1, 2, 3], 4);
        for (size, place) in [(0, 0), (0xffff, u64::MAX - 15), (0x8000, 0xfff_fff0), (3, REGISTERS)] {
            for queue in 0..3 {
                program.write32(register(device, 0x30), queue).write32(register(device, 0x38), size);
                for offset in [0x80, 0x90, 0xa0] {
                    program.write32(register(device, offset), place & 0xffff_ffff).write32(register(device, offset + 4), place >> 32);
                }
                program.write32(register(device, 0x44), 0).write32(register(device, 0x44), 1).write32(register(device, NOTIFY), queue);
            }
            // Features, too, and that it is ready once more.
            program.write32(register(device, 0x20), 0xffff_ffff).write32(register(device, STATUS), 15).wait();
        }
    }
}

fn beyond_memory(program: &mut Program) {
    // A step of 2 MiB over all that a page table of ours has, registers of the machine's own included.
    let (read, write) = (program.operand(true), program.operand(true) + 24);
    program.repeat(0x780, |program| {
        program.read32(0x1000_0000).write32(0x1000_0000, 0xffff_ffff).add64(read, 0x20_0000).add64(write, 0x20_0000);
    });
}
