//! What a monitor or file server that a guest has taken over may tell the shim.
#![no_main]

use std::os::fd::{AsFd, AsRawFd};

use caisson_host::control::Control;
use caisson_protocol::{fs, vmm};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (shim, other) = Control::pair().expect("a control socket");
    for _ in 0..2 {
        // A descriptor that nobody asked for comes with it.
        let rights = [other.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
        let bytes = [std::io::IoSlice::new(data)];
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let _ = nix::sys::socket::sendmsg::<()>(other.as_fd().as_raw_fd(), &bytes, &rights, flags, None);
    }
    let _ = shim.receive::<vmm::Event>(false);
    let _ = shim.receive::<fs::Event>(false);
});
