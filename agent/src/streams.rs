//! Streams to the host: each a vsock connection to a port that the host offered, carried to and
//! from a container's pipe or terminal by a thread of its own.
//!
//! A thread blocks where the data is slow, so back-pressure reaches from reader to container. A
//! stream ends when its pipe has ended and everything was sent: nothing is lost at exit.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use caisson_protocol::guest::HOST_CID;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect as connect_socket, socket};

/// Bytes moved at a time: the largest packet of virtio-vsock.
const CHUNK: usize = 64 << 10;
/// A pump needs a buffer on the heap and little else.
const STACK: usize = 64 << 10;

/// Connects to a port of the host.
///
/// The result is a vsock stream in the type of a Unix one: both are read, written and shut down
/// by the same system calls, and only the latter has a type in the standard library.
pub fn connect(port: u32) -> io::Result<UnixStream> {
    let cid = u32::try_from(HOST_CID).map_err(io::Error::other)?;
    let socket: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect_socket(socket.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(socket.into())
}

/// The connection for the asynchronous runtime.
pub fn into_async(socket: UnixStream) -> io::Result<tokio::net::UnixStream> {
    socket.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(socket)
}

/// Carries what the host sends to `target` until either ends.
pub fn pump_in(port: u32, target: File) -> io::Result<()> {
    let socket = connect(port)?;
    spawn("stdin", move || {
        // A container that closed its standard input ends the stream; dropping tells the host.
        let _ = copy(&socket, &target);
    })
}

/// Carries what comes out of `source`, a pipe, to the host until it ends.
pub fn pump_out(port: u32, source: File) -> io::Result<()> {
    let socket = connect(port)?;
    spawn("output", move || {
        let _ = copy_gathered(&source, &socket);
    })
}

/// Carries a terminal's data both ways over one connection.
pub fn pump_terminal(port: u32, terminal: File) -> io::Result<()> {
    let socket = connect(port)?;
    let (input, keyboard) = (socket.try_clone()?, terminal.try_clone()?);
    spawn("terminal-in", move || {
        let _ = copy(&input, &keyboard);
    })?;
    spawn("terminal-out", move || {
        // Reading a terminal fails with EIO when its last user is gone: that is its end.
        let _ = copy(&terminal, &socket);
        // The other thread may still wait for the host: both sides are over.
        let _ = socket.shutdown(Shutdown::Both);
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(work).map(drop)
}

/// Copies a pipe in pieces as large as can be had without waiting: a packet costs the machine
/// several exits, whatever its size, and programs often write a few kilobytes at a time.
fn copy_gathered(mut from: &File, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut filled = read_some(&mut from, &mut buffer)?;
        if filled == 0 {
            return Ok(());
        }
        while filled < CHUNK {
            // Lets the program write more, when it is ready to.
            std::thread::yield_now();
            if !is_readable(from) {
                break;
            }
            match read_some(&mut from, &mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        to.write_all(&buffer[..filled])?;
    }
}

fn read_some(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Whether there is something to read right now.
fn is_readable(file: &File) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read_some(&mut from, &mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_loses_and_doubles_nothing() {
        let (reader, mut writer) = io::pipe().unwrap();
        let data: Vec<u8> = (0..300_000u32).map(|number| number as u8).collect();
        let expected = data.clone();
        let feeder = std::thread::spawn(move || data.chunks(1000).for_each(|piece| writer.write_all(piece).unwrap()));
        let mut got = Vec::new();
        copy_gathered(&File::from(OwnedFd::from(reader)), &mut got).unwrap();
        feeder.join().unwrap();
        assert_eq!(got, expected);
    }
}
