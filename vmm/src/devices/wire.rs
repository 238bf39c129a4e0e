//! Where an interface's frames go on the host: a tap, or the stream socket of a program that is a network.
//!
//! Each frame begins with a virtio header of [`NIC_HEADER`] bytes on a tap. On a stream it has none, so there is nothing
//! that the guest can leave to the host; its length stands before it, as a number of 32 bits in network byte
//! order (QEMU's `-netdev stream`, passt(1)).

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use caisson_protocol::vmm::NIC_HEADER;

use super::net::{F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, MAX_FRAME};

/// Bytes before each frame of a stream.
const LENGTH: usize = 4;
/// Frames of a stream are read ahead as far as they fit into so many bytes.
const AHEAD: usize = 4 * MAX_FRAME;

nix::ioctl_write_int!(
    /// `TUNSETOFFLOAD` (linux/if_tun.h): what the reader of a tap can take.
    tun_set_offload, b'T', 208
);
/// Offloads of a tap (linux/if_tun.h).
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

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

    /// Sends a frame that has a header, which the wire may write on. What the host does not take is lost, as on any wire.
    pub fn send(&mut self, frame: &mut [u8]) {
        match self {
            Self::Tap(tap) => drop(tap.write(frame)),
            Self::Stream(stream) => stream.send(frame),
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
    /// Of a frame that the socket has only the beginning of, the rest.
    unsent: Vec<u8>,
}

impl Stream {
    /// With nothing read or sent yet.
    pub fn new(socket: File) -> Self {
        Self { socket, buffer: vec![0; AHEAD].into(), taken: 0, filled: 0, unsent: Vec::new() }
    }

    fn send(&mut self, frame: &mut [u8]) {
        if !self.unsent.is_empty() {
            let sent = self.socket.write(&self.unsent).unwrap_or(0);
            self.unsent.drain(..sent);
        }
        if !self.unsent.is_empty() {
            return;
        }
        // The end of the header makes way for the length.
        let Some(start) = NIC_HEADER.checked_sub(LENGTH) else { return };
        let length = (frame.len() - NIC_HEADER) as u32;
        frame[start..NIC_HEADER].copy_from_slice(&length.to_be_bytes());
        let bytes = &frame[start..];
        match self.socket.write(bytes) {
            Ok(sent) if sent < bytes.len() => self.unsent.extend_from_slice(&bytes[sent..]),
            // It is lost, or sent.
            _ => {}
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

/// Tells a tap what the driver can take, by the features that it accepted.
///
/// # Errors
/// When the tap cannot do without what the driver cannot take.
#[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
pub fn set_offloads(tap: &File, features: u64) -> io::Result<()> {
    let pairs = [(F_GUEST_CSUM, TUN_F_CSUM), (F_GUEST_TSO4, TUN_F_TSO4), (F_GUEST_TSO6, TUN_F_TSO6), (F_GUEST_ECN, TUN_F_TSO_ECN)];
    let offloads = pairs.iter().filter(|(feature, _)| features & (1 << feature) != 0).fold(0, |all, (_, offload)| all | offload);
    // SAFETY: the ioctl takes a number and touches no memory of ours.
    unsafe { tun_set_offload(tap.as_raw_fd(), offloads) }?;
    Ok(())
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
    fn a_slow_host_loses_whole_frames_alone() {
        let (mut wire, mut host) = stream();
        for number in 0..200 {
            wire.send(&mut frame(20_000, number));
        }
        // What is left of a frame that did not fit goes before the next.
        host.set_nonblocking(true).unwrap();
        let mut all = Vec::new();
        for _ in 0..3 {
            let _ = host.read_to_end(&mut all);
            wire.send(&mut frame(20_000, 200));
        }
        let _ = host.read_to_end(&mut all);
        let frames: Vec<&[u8]> = all.chunks(20_004).collect();
        assert!(frames.len() > 4 && frames.len() < 200, "{}", frames.len());
        for bytes in frames {
            assert!(bytes.len() == 20_004 && bytes[..4] == 20_000_u32.to_be_bytes() && bytes[4..].iter().all(|byte| *byte == bytes[4]));
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
