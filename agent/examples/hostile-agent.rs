//! An agent that attacks the shim, in the place of the real one: a guest that was taken over. Which attack, the kernel's command line
//! says (`hostile=NAME`, which the kernel hands on as a variable). A node test boots it; nothing installs this program.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use caisson_protocol::agent::{CreateContainerResponse, HelloRequest, HelloResponse, StartResponse, WaitResponse};
use caisson_protocol::guest::{CONTROL_PORT, HOST_CID};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use protobuf::Message;
use ttrpc::proto::{Code, Request, Response};

/// ttrpc's protocol: a header of length, stream, kind and flags, then the message (containerd/ttrpc, PROTOCOL.md).
const HEADER: usize = 10;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
/// More than the shim may ever hold.
const FLOOD: usize = 2000;

fn main() {
    let attack = std::env::var("hostile").unwrap_or_default();
    // Whatever comes of it, process 1 must not end.
    let _ = run(&attack);
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn run(attack: &str) -> io::Result<()> {
    let mut shim = dial()?;
    match attack {
        "silence" => loop {
            next(&mut shim)?;
        },
        "garbage" => loop {
            shim.write_all(&[0xa5; 4096])?;
        },
        "data" => {
            // To the first call, and then to any, as often as can be.
            let (stream, _) = next(&mut shim)?;
            let frame = [&[0; 4][..], &stream.to_be_bytes(), &[DATA, 0]].concat();
            loop {
                shim.write_all(&frame.repeat(400))?;
            }
        }
        "a long frame" => return shim.write_all(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, RESPONSE, 0]),
        _ => {}
    }
    loop {
        let (stream, request) = next(&mut shim)?;
        answer(attack, &mut shim, stream, &request)?;
    }
}

fn dial() -> io::Result<UnixStream> {
    let cid = u32::try_from(HOST_CID).map_err(io::Error::other)?;
    let socket: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(cid, CONTROL_PORT))?;
    Ok(socket.into())
}

/// The next request and the number of its stream.
fn next(shim: &mut UnixStream) -> io::Result<(u32, Request)> {
    let mut header = [0; HEADER];
    shim.read_exact(&mut header)?;
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let mut body = vec![0; word(0) as usize];
    shim.read_exact(&mut body)?;
    Ok((word(4), Request::parse_from_bytes(&body)?))
}

fn send(shim: &mut UnixStream, stream: u32, body: &[u8]) -> io::Result<()> {
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([RESPONSE, 0]);
    frame.extend(body);
    shim.write_all(&frame)
}

fn respond(shim: &mut UnixStream, stream: u32, message: &impl Message) -> io::Result<()> {
    let mut response = Response::new();
    response.payload = message.write_to_bytes()?;
    send(shim, stream, &response.write_to_bytes()?)
}

fn refuse(shim: &mut UnixStream, stream: u32, words: String) -> io::Result<()> {
    let mut response = Response::new();
    response.set_status(ttrpc::get_status(Code::UNKNOWN, words));
    send(shim, stream, &response.write_to_bytes()?)
}

fn answer(attack: &str, shim: &mut UnixStream, stream: u32, request: &Request) -> io::Result<()> {
    match (request.method.as_str(), attack) {
        (_, "answers that are none") => send(shim, stream, &[0xff; 100]),
        ("Hello", "another version") => {
            let version = format!("9\u{1b}[2J\n{}", "x".repeat(3 << 20));
            respond(shim, stream, &HelloResponse { version, ..HelloResponse::default() })
        }
        ("Hello", _) => {
            let HelloRequest { version, .. } = HelloRequest::parse_from_bytes(&request.payload)?;
            let kernel = "k".repeat(1 << 20);
            respond(shim, stream, &HelloResponse { version, kernel, ready_us: u64::MAX, ..HelloResponse::default() })
        }
        (_, "long words") => refuse(shim, stream, format!("one line\u{1b}[2J\nof many {}", "x".repeat(3 << 20))),
        (_, "a flood") => {
            // Answers to what was never asked, each as large as can be.
            let mut response = Response::new();
            response.payload = vec![0; 4_000_000];
            let body = response.write_to_bytes()?;
            (0..FLOOD).try_for_each(|number| send(shim, number as u32 * 2 + 1_000_001, &body))
        }
        ("CreateContainer", _) => respond(shim, stream, &CreateContainerResponse { pid: u32::MAX, ..CreateContainerResponse::default() }),
        ("Start", _) => respond(shim, stream, &StartResponse { pid: u32::MAX, ..StartResponse::default() }),
        ("Wait", _) => {
            let lies = WaitResponse { exit_status: u32::MAX, exited_at_ns: u64::MAX, oom_kills: u64::MAX, ..WaitResponse::default() };
            respond(shim, stream, &lies)
        }
        _ => send(shim, stream, &[]),
    }
}
