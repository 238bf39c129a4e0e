//! A guest that does as it likes with the queues of a network interface, while frames come in.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use caisson_fuzz::Input;
use caisson_fuzz::driver::{Rings, memory, scribble};
use caisson_protocol::vmm::RateLimit;
use caisson_vmm::devices::net::NetServer;
use caisson_vmm::devices::net::wire::Wire;
use caisson_vmm::devices::{Activation, Interrupt};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let memory = memory();
    let mut rings = [Rings::new(0), Rings::new(1)];
    let (host, tap) = UnixDatagram::pair().expect("a socket");
    host.set_nonblocking(true).expect("a socket that does not block");
    tap.set_nonblocking(true).expect("a socket that does not block");
    let activation = Activation {
        features: 0,
        queues: rings.iter().map(|rings| rings.queue(&memory)).collect(),
        memory: memory.clone(),
        interrupt: Arc::new(Interrupt::new().expect("an interrupt")),
    };
    let mut server = NetServer::new(activation, Wire::Tap(File::from(OwnedFd::from(tap))), RateLimit::default()).expect("two queues");
    let mut input = Input(data);
    while !input.is_empty() {
        match input.u8() % 6 {
            0 => scribble(&memory, &mut input),
            1 => rings[0].offer_any(&memory, &mut input),
            2 => rings[1].offer_any(&memory, &mut input),
            3 => {
                let count = usize::from(input.u16() % 0x1000);
                let _ = host.send(input.bytes(count));
            }
            4 => {
                server.transmit();
                while host.recv(&mut [0; 64]).is_ok() {}
            }
            _ => {
                server.room();
                server.receive();
            }
        }
    }
});
