//! A guest that does as it likes with the queues of a network interface and that of its commands, while frames come in by a tap, or anything by a stream.
#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use caisson_fuzz::Input;
use caisson_fuzz::driver::{Rings, memory, scribble};
use caisson_protocol::vmm::RateLimit;
use caisson_vmm::devices::net::NetServer;
use caisson_vmm::devices::net::control::ControlQueue;
use caisson_vmm::devices::net::wire::{Stream, Wire};
use caisson_vmm::devices::{Activation, Interrupt};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

fuzz_target!(|data: &[u8]| {
    let memory = memory();
    let mut rings = [Rings::new(0), Rings::new(1), Rings::new(2)];
    let stream = data.first().is_some_and(|first| first & 0x80 != 0);
    let kind = if stream { SockType::Stream } else { SockType::Datagram };
    let (host, wire) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).expect("a socket");
    let (mut host, wire) = (File::from(host), File::from(wire));
    let wire = if stream { Wire::Stream(Stream::new(wire)) } else { Wire::Tap(wire) };
    let activation = Activation {
        features: 0,
        queues: rings[..2].iter().map(|rings| rings.queue(&memory)).collect(),
        memory: memory.clone(),
        reach: None,
        interrupt: Arc::new(Interrupt::new().expect("an interrupt")),
    };
    let mut server = NetServer::new(activation, wire, RateLimit::default()).expect("two queues");
    let mut control = ControlQueue::new(rings[2].queue(&memory), memory.clone(), Arc::new(Interrupt::new().expect("an interrupt")));
    let mut input = Input(data);
    while !input.is_empty() {
        match input.u8() % 8 {
            0 => scribble(&memory, &mut input),
            1 => rings[0].offer_any(&memory, &mut input),
            2 => rings[1].offer_any(&memory, &mut input),
            3 => {
                let count = usize::from(input.u16() % 0x1000);
                let _ = host.write(input.bytes(count));
            }
            4 => {
                server.transmit();
                while host.read(&mut [0; 64]).is_ok_and(|length| length > 0) {}
            }
            5 => rings[2].offer_any(&memory, &mut input),
            6 => {
                control.obey(|pairs| pairs == 1);
            }
            _ => {
                server.room();
                server.receive();
            }
        }
    }
});
