//! Where an interface's frames go on the host: a tap, or the stream socket of a program that is a network.
//!
//! Each frame begins with a virtio header of [`NIC_HEADER`] bytes on a tap. On a stream it has none, so there is nothing
//! that the guest can leave to the host; its length stands before it, as a number of 32 bits in network byte
//! order (QEMU's `-netdev stream`, passt(1)).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::RangeInclusive;

use caisson_protocol::vmm::NIC_HEADER;

/// The largest frame with its header: an IP packet of 64 KiB behind an Ethernet header with two VLAN tags.
pub const MAX_FRAME: usize = NIC_HEADER + 14 + 2 * 4 + (64 << 10);
/// Bytes before each frame of a stream, which take the place of the end of its header.
const LENGTH: usize = 4;
const START: usize = NIC_HEADER - LENGTH;
/// Frames that the other end of a stream takes: passt(1) hangs up on others.
const STREAM_FRAMES: RangeInclusive<usize> = 14..=65_535;
/// Frames of a stream are read ahead as far as they fit into so many bytes.
const AHEAD: usize = 4 * MAX_FRAME;

/// One of both.
pub enum Wire {
    /// A tap.
    Tap(File),
    /// A stream.
    Stream(Stream),
}

impl Wire {
    /// What becomes readable when the host has sent frames, and stays so when it has nothing to send any more.
    pub fn file(&self) -> &File {
        match self {
            Self::Tap(tap) => tap,
            Self::Stream(stream) => &stream.socket,
        }
    }

    /// Sends a frame that has a header, which the wire may write on. A tap that has no room for it loses it, as any wire
    /// would; a stream is to be sent nothing while it [is full](Self::is_full).
    pub fn send(&mut self, frame: &mut [u8]) {
        match self {
            Self::Tap(tap) => drop(tap.write(frame)),
            Self::Stream(stream) => stream.send(frame),
        }
    }

    /// Whether what was sent before still waits for room, as far as there is none now.
    pub fn is_full(&mut self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => {
                stream.flush();
                !stream.unsent.is_empty()
            }
        }
    }

    /// The next frame, with a header; its length.
    ///
    /// # Errors
    /// `WouldBlock` when none is there. After any other there will be none.
    pub fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tap(tap) => loop {
                match tap.read(frame) {
                    Ok(length) if length >= NIC_HEADER => return Ok(length),
                    Ok(_) => return Err(ErrorKind::UnexpectedEof.into()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            },
            Self::Stream(stream) => stream.receive(frame),
        }
    }

    /// Whether a frame was read ahead, of which [`Self::file`] does not tell.
    pub fn has_frame(&self) -> bool {
        matches!(self, Self::Stream(stream) if stream.next_length().is_some_and(|length| stream.ahead().len() >= LENGTH + length))
    }
}

/// A stream socket, not blocking.
pub struct Stream {
    socket: File,
    /// What was read, from `taken` to `filled`.
    buffer: Box<[u8]>,
    taken: usize,
    filled: usize,
    /// What the socket has not taken, whole frames but for the first.
    unsent: Vec<u8>,
}

impl Stream {
    /// With nothing read or sent yet.
    pub fn new(socket: File) -> Self {
        Self { socket, buffer: vec![0; AHEAD].into(), taken: 0, filled: 0, unsent: Vec::new() }
    }

    fn send(&mut self, frame: &mut [u8]) {
        let length = frame.len() - NIC_HEADER;
        if !STREAM_FRAMES.contains(&length) {
            return;
        }
        frame[START..NIC_HEADER].copy_from_slice(&(length as u32).to_be_bytes());
        self.unsent.extend_from_slice(&frame[START..]);
        self.flush();
    }

    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(sent @ 1..) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Nobody is there to take it.
                _ => self.unsent.clear(),
            }
        }
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(length) = self.next_length() {
                if length > frame.len() - NIC_HEADER {
                    return Err(ErrorKind::InvalidData.into());
                }
                if let Some(bytes) = self.ahead().get(LENGTH..LENGTH + length) {
                    frame[..NIC_HEADER].fill(0);
                    frame[NIC_HEADER..NIC_HEADER + length].copy_from_slice(bytes);
                    self.taken += LENGTH + length;
                    return Ok(NIC_HEADER + length);
                }
            }
            self.buffer.copy_within(self.taken..self.filled, 0);
            (self.taken, self.filled) = (0, self.filled - self.taken);
            match self.socket.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What was read and not taken.
    fn ahead(&self) -> &[u8] {
        &self.buffer[self.taken..self.filled]
    }

    /// The length of the next frame, when that much is known.
    fn next_length(&self) -> Option<usize> {
        self.ahead().first_chunk::<LENGTH>().map(|bytes| u32::from_be_bytes(*bytes) as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn stream() -> (Wire, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Wire::Stream(Stream::new(File::from(OwnedFd::from(ours)))), theirs)
    }

    fn frame(length: usize, byte: u8) -> Vec<u8> {
        [vec![0xff; NIC_HEADER], vec![byte; length]].concat()
    }

    #[test]
    fn frames_are_sent_behind_their_lengths() {
        let (mut wire, mut host) = stream();
        wire.send(&mut frame(60, 1));
        wire.send(&mut frame(300, 2));
        let mut got = [0; 368];
        host.read_exact(&mut got).unwrap();
        assert_eq!((&got[..4], &got[4..64]), (&[0, 0, 0, 60][..], &[1; 60][..]));
        assert_eq!((&got[64..68], &got[68..]), (&[0, 0, 1, 44][..], &[2; 300][..]));
    }

    #[test]
    fn frames_come_whole_however_they_were_cut() {
        let (mut wire, mut host) = stream();
        let bytes = [&[0, 0, 0, 60][..], &[1; 60], &[0, 0, 0, 70], &[2; 70]].concat();
        let mut got = vec![9; MAX_FRAME];
        let mut lengths = Vec::new();
        for byte in bytes {
            host.write_all(&[byte]).unwrap();
            match wire.receive(&mut got) {
                Ok(length) => {
                    assert!(got[..NIC_HEADER].iter().all(|byte| *byte == 0));
                    lengths.push((length - NIC_HEADER, got[length - 1]));
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        assert_eq!(lengths, [(60, 1), (70, 2)]);
    }

    #[test]
    fn frames_that_come_together_are_told_of() {
        let (mut wire, mut host) = stream();
        host.write_all(&[&[0, 0, 0, 60][..], &[1; 60], &[0, 0, 0, 70], &[2; 70], &[0, 0]].concat()).unwrap();
        let mut got = vec![0; MAX_FRAME];
        assert!(!wire.has_frame());
        assert_eq!(wire.receive(&mut got).unwrap(), NIC_HEADER + 60);
        assert!(wire.has_frame());
        assert_eq!(wire.receive(&mut got).unwrap(), NIC_HEADER + 70);
        assert!(!wire.has_frame());
    }

    #[test]
    fn a_slow_host_gets_every_frame() {
        let (mut wire, mut host) = stream();
        let mut sent = 0;
        while !wire.is_full() {
            wire.send(&mut frame(20_000, sent));
            sent += 1;
        }
        assert!((3..200).contains(&sent), "{sent}");
        let mut got = vec![0; 20_004 * usize::from(sent)];
        let (first, rest) = got.split_at_mut(20_004);
        host.read_exact(first).unwrap();
        while wire.is_full() {}
        host.read_exact(rest).unwrap();
        for (number, bytes) in got.chunks(20_004).enumerate() {
            assert!(bytes[..4] == 20_000_u32.to_be_bytes() && bytes[4..].iter().all(|byte| usize::from(*byte) == number));
        }
        // With nobody there it is as full as a wire that leads nowhere.
        drop(host);
        wire.send(&mut frame(20_000, 0));
        assert!(!wire.is_full());
    }

    #[test]
    fn what_the_host_would_hang_up_on_is_not_sent() {
        let (mut wire, mut host) = stream();
        for length in [0, 13, 65_536, MAX_FRAME - NIC_HEADER] {
            wire.send(&mut frame(length, 1));
        }
        host.set_nonblocking(true).unwrap();
        assert_eq!(host.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
        for length in [14, 65_535] {
            wire.send(&mut frame(length, 1));
            let mut got = vec![0; LENGTH + length];
            host.read_exact(&mut got).unwrap();
        }
    }

    #[test]
    fn what_is_no_frame_ends_the_wire() {
        let (mut wire, mut host) = stream();
        let mut got = vec![0; MAX_FRAME];
        host.write_all(&[0, 1, 2, 3]).unwrap();
        assert_eq!(wire.receive(&mut got).unwrap_err().kind(), ErrorKind::InvalidData, "66051 bytes");
        let (mut wire, host) = stream();
        drop(host);
        assert_eq!(wire.receive(&mut got).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
