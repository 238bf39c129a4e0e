//! A monitor that was taken over: this program itself, which the shim starts in the place of the real one, as `vmm.path` says.

#![expect(unsafe_code, reason = "the control socket is a descriptor of a known number")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};

/// Where the attack's name is.
pub const ATTACK: &str = "/tmp/hostile-attack";
/// The name under which this program is the monitor.
pub const MONITOR: &str = "hostile-monitor";

const LATE: &str = "the guest was not ready within 5000 ms";
const NONSENSE: &str = "the virtual machine monitor spoke nonsense";

/// Attacks by their names, and what the caller of the pod may read of each.
pub const MONITORS: &[(&str, &[&str])] = &[
    ("silence", &[LATE]),
    ("nonsense", &[NONSENSE]),
    ("a long message", &[NONSENSE]),
    ("many descriptors", &[NONSENSE]),
    ("lies", &[LATE]),
    ("long last words", &["one line [2J of many x"]),
    ("a server's peer", &["the virtio-fs server", LATE]),
];

/// Where the shim leaves the control socket.
const CONTROL: i32 = 3;
/// Longer than the shim waits.
const LONG: Duration = Duration::from_secs(600);

/// Acts as the monitor.
#[expect(clippy::zombie_processes, reason = "who starts it ends, and the shim adopts it")]
pub fn monitor() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.len() == 2 {
        // As the real one, whose first process ends when the jailed one is there.
        let mut command = Command::new("/proc/self/exe");
        command.args([&arguments[1], "inside"]).stdin(Stdio::null());
        std::os::unix::process::CommandExt::arg0(&mut command, MONITOR);
        command.spawn().unwrap();
        return;
    }
    // SAFETY: the shim has opened it, and nobody closes it.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL) };
    say(control, &format!("{{\"Jailed\":{{\"pid\":{}}}}}", std::process::id()));
    match std::fs::read_to_string(ATTACK).unwrap().as_str() {
        "nonsense" => say(control, "\u{1}{ no message"),
        "a long message" => say(control, &"x".repeat(70_000)),
        "many descriptors" => many_descriptors(control),
        "lies" => lies(control),
        "long last words" => {
            say(control, &format!("{{\"Stopped\":{{\"Failed\":\"one line\\u001b[2J\\nof many {}\"}}}}", "x".repeat(60_000)))
        }
        "a server's peer" => attack_server(&server(control)),
        _ => {}
    }
    std::thread::sleep(LONG);
}

fn say(control: BorrowedFd<'_>, text: &str) {
    // A shim that has had enough does not read any more.
    let _ = send(control, text.as_bytes(), SendFlags::NOSIGNAL);
}

fn many_descriptors(control: BorrowedFd<'_>) {
    let files = [control.as_fd(); 200];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(control, &[IoSlice::new(b"\"Running\"")], &mut rights, SendFlags::NOSIGNAL).unwrap();
}

/// Events that are well formed, and none of which is so.
fn lies(control: BorrowedFd<'_>) {
    for number in 0..20_000 {
        for lie in [
            "\"Running\"".to_owned(),
            format!("{{\"StreamOpened\":{{\"port\":{number}}}}}"),
            format!("{{\"StreamClosed\":{{\"port\":{number}}}}}"),
            "{\"AddedMemoryEnd\":{\"mib\":18446744073709551615}}".to_owned(),
            "{\"Vcpus\":{\"Ok\":4294967295}}".to_owned(),
            "{\"DiskDetached\":{\"place\":4294967295}}".to_owned(),
            "{\"Jailed\":{\"pid\":1}}".to_owned(),
        ] {
            say(control, &lie);
        }
    }
}

/// The monitor's end of its conversation with the file server: the sixth descriptor of the boot request.
fn server(control: BorrowedFd<'_>) -> OwnedFd {
    let mut text = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    recvmsg(control, &mut [IoSliceMut::new(&mut text)], &mut rights, RecvFlags::empty()).unwrap();
    let fds = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds.flatten().nth(5).unwrap()
}

/// Every request of vhost-user (QEMU, `docs/interop/vhost-user.rst`) with bodies of all kinds.
fn attack_server(server: &OwnedFd) {
    const VERSION: u32 = 1;
    for fill in [0_u8, 1, 0x7f, 0xff] {
        for request in (0_u32..48).chain([u32::MAX]) {
            for (said, bytes) in [(0_u32, 0_usize), (8, 8), (40, 40), (8, 3), (40, 400), (u32::MAX, 64)] {
                let header = [request, VERSION, said].map(u32::to_le_bytes).concat();
                let message = [header, vec![fill; bytes]].concat();
                // One that has hung up is what is wanted.
                if send(server, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_err() {
                    return;
                }
            }
        }
    }
}
