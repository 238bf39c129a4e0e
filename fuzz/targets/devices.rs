//! A guest that does as it likes with the registers and queues of vsock, rng, memory, balloon and the
//! serial port, and with its memory; and a host that goes on with its own.
#![no_main]
#![expect(unsafe_code, reason = "what a signal does is set without a handler")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use caisson_fuzz::Input;
use caisson_fuzz::driver::{ADDED_BYTES, DATA, Rings, SIZE, layout, memory, scribble};
use caisson_host::control::Control;
use caisson_protocol::guest::{GUEST_CID, HOST_CID};
use caisson_protocol::vmm::{Ends, Event, Offer};
use caisson_vmm::devices::io_thread::{Command, Commands, IoThread};
use caisson_vmm::devices::mmio::MmioTransport;
use caisson_vmm::devices::serial::Serial;
use caisson_vmm::devices::vsock::packet::{Header, TYPE_STREAM};
use caisson_vmm::devices::{Bus, MMIO_SIZE, balloon, mem, rng, vsock};
use caisson_vmm::memory::{GuestMemory, MMIO_START};
use libfuzzer_sys::fuzz_target;
use nix::sys::signal::{SigHandler, Signal, signal};
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// Devices on the bus, and queues that each of them has at the most.
const DEVICES: u64 = 4;
const QUEUES: u64 = 3;
const VSOCK: u64 = 0;
/// Ports that are on offer, and what each end is.
const PORTS: [(u32, Ends); 3] = [(1024, Ends::Duplex), (1025, Ends::Source), (1026, Ends::Sink)];

struct Machine {
    memory: GuestMemory,
    bus: Bus,
    io: IoThread,
    commands: Commands,
    added: Arc<mem::Shared>,
    shim: Control,
    control: Control,
    streams: Vec<UnixStream>,
    rings: Vec<Rings>,
}

impl Machine {
    fn new() -> Self {
        let memory = memory();
        let added = mem::Shared::new(layout().added_start(), ADDED_BYTES);
        let (io, commands) = IoThread::new(Arc::clone(&added)).expect("the device thread");
        let devices: [Box<dyn caisson_vmm::devices::VirtioDevice>; DEVICES as usize] = [
            Box::new(vsock::Vsock::new(commands.clone())),
            Box::new(rng::Rng::new(commands.clone())),
            Box::new(mem::Mem::new(Arc::clone(&added), commands.clone())),
            Box::new(balloon::Balloon::new(commands.clone(), true)),
        ];
        let transports = devices.into_iter().map(|device| MmioTransport::new(device, memory.clone()).expect("a transport")).collect();
        let null = std::fs::File::create("/dev/null").expect("/dev/null");
        let bus = Bus::new(transports, Some(Serial::new(null).expect("a serial port")), None);
        let (shim, control) = Control::pair().expect("a control socket");
        let streams = PORTS.map(|(port, ends)| {
            let (host, stream) = UnixStream::pair().expect("a socket");
            host.set_nonblocking(true).expect("a socket that does not block");
            commands.send(Command::Offer(Offer { port, ends }, vec![OwnedFd::from(stream)])).expect("the device thread");
            host
        });
        let rings = (0..DEVICES * QUEUES).map(Rings::new).collect();
        Self { memory, bus, io, commands, added, shim, control, streams: streams.into(), rings }
    }

    fn set(&self, device: u64, register: u64, value: u32) {
        self.bus.mmio_write(MMIO_START + device * MMIO_SIZE + register, &value.to_le_bytes());
    }

    /// What a driver does to take a device into service.
    fn bring_up(&self, device: u64, refused_features: u32) {
        for status in [0, 1, 3] {
            self.set(device, 0x70, status);
        }
        for (half, features) in [(0, !refused_features), (1, 1)] {
            self.set(device, 0x24, half);
            self.set(device, 0x20, features);
        }
        self.set(device, 0x70, 11);
        for queue in 0..QUEUES {
            let [descriptors, available, used] = self.rings[(device * QUEUES + queue) as usize].addresses();
            let values = [queue, u64::from(SIZE), descriptors, 0, available, 0, used, 0, 1];
            for (register, value) in [0x30, 0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44].into_iter().zip(values) {
                self.set(device, register, value as u32);
            }
        }
        self.set(device, 0x70, 15);
    }

    fn kick(&self, device: u64, queue: u64) {
        if let Some(transport) = self.bus.transport(device as usize)
            && let Some(kick) = transport.kicks().get(queue as usize)
        {
            let _ = kick.write(1);
        }
    }

    /// A packet as vsock's driver sends it, with anything in its fields.
    fn send_packet(&mut self, input: &mut Input<'_>) {
        let (kind, length) = (input.u8(), usize::from(input.u8()));
        let payload = input.bytes(length);
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: u32::from(input.u8() % 4),
            dst_port: PORTS[usize::from(kind >> 4) % PORTS.len()].0,
            len: payload.len() as u32,
            type_: TYPE_STREAM,
            op: u16::from(kind % 9),
            flags: u32::from(input.u8()),
            buf_alloc: input.u32(),
            fwd_cnt: input.u32(),
        };
        let slot = DATA + 0x1000 * u64::from(input.u8() % 16);
        let _ = self.memory.write_slice(header.as_slice(), GuestAddress(slot));
        let _ = self.memory.write_slice(payload, GuestAddress(slot + size_of::<Header>() as u64));
        self.rings[(VSOCK * QUEUES + 1) as usize].offer(&self.memory, &[(slot, (size_of::<Header>() + payload.len()) as u32, false)]);
        self.kick(VSOCK, 1);
    }

    /// What the host's side of the streams and of memory does.
    fn host(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        let index = usize::from(kind >> 4) % PORTS.len();
        let (port, _) = PORTS[index];
        let command = match kind % 8 {
            0 => {
                let count = usize::from(input.u16() % 0x1000);
                let _ = self.streams[index].write(input.bytes(count));
                return;
            }
            1 => {
                let _ = self.streams[index].read(&mut [0; 0x1000]);
                return;
            }
            2 => {
                let _ = self.streams[index].shutdown(std::net::Shutdown::Both);
                return;
            }
            3 => Command::CloseSource(port),
            4 => Command::Withdraw(port),
            _ => {
                self.added.request(u64::from(input.u16()) << 21);
                Command::MemoryRequested
            }
        };
        self.commands.send(command).expect("the device thread");
    }

    /// One step; false when the monitor would have ended.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let (kind, place) = (input.u8(), input.u8());
        let (device, queue) = (u64::from(place) % DEVICES, u64::from(place >> 4) % QUEUES);
        let address = MMIO_START + device * MMIO_SIZE;
        match kind % 12 {
            0 => {
                let offset = u64::from(input.u16() % 0x200);
                self.bus.mmio_write(address + offset, input.bytes(usize::from(place >> 5) + 1));
            }
            1 => self.bus.mmio_read(address + u64::from(input.u16() % 0x200), &mut [0; 8][..usize::from(place >> 5) + 1]),
            2 => self.set(device, u64::from(input.u8() & !3), input.u32()),
            3 => scribble(&self.memory, input),
            4 => self.bring_up(device, input.u32()),
            5 => self.kick(device, queue),
            6 => self.rings[(device * QUEUES + queue) as usize].offer_any(&self.memory, input),
            7 => self.send_packet(input),
            8 => self.rings[(device * QUEUES + queue) as usize].offer(&self.memory, &[(DATA + 0x4_0000, 0x1000, true)]),
            9 => self.host(input),
            10 => {
                self.bus.port_write(input.u16(), input.bytes(1));
                self.bus.port_read(input.u16(), &mut [0]);
            }
            _ => return self.turn(),
        }
        true
    }

    fn turn(&mut self) -> bool {
        let lives = self.io.turn(&self.control, 0).is_ok();
        while self.shim.receive::<Event>(false).is_ok_and(|event| event.is_some()) {}
        lives
    }
}

/// As Rust's own start of a program does, which libFuzzer's takes the place of.
fn ignore_broken_pipes() {
    // SAFETY: no handler is set.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal that can be ignored");
}

fuzz_target!(init: ignore_broken_pipes(), |data: &[u8]| {
    let (mut machine, mut input) = (Machine::new(), Input(data));
    while !input.is_empty() && machine.step(&mut input) {}
    machine.turn();
});
