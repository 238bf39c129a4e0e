//! One stream: a vsock connection on the guest's side, file descriptors on ours.
//!
//! ```text
//! Offered -> Connected -> (guest has closed: draining) -> gone
//! ```
//!
//! Flow control is that of virtio 1.2, 5.10.6.3: each side says how large its buffer is and how
//! much it has taken out of it, and never sends more than fits. What the guest sends goes to the
//! sink at once, and into a bounded buffer when the sink is not ready.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{read, write};
use serde::{Deserialize, Serialize};

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that we hold for a sink that is not ready.
pub const BUFFER: u32 = 256 << 10;

/// A descriptor that the guest reads from.
#[derive(Debug)]
pub struct Source {
    /// The descriptor.
    pub fd: OwnedFd,
    /// There may be something to read.
    pub ready: bool,
    /// End at the first moment that there is nothing to read.
    pub closing: bool,
}

/// What the stream does next when the guest has room.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing to send.
    Idle,
    /// Accept the connection.
    Response,
    /// So many bytes of data are in the buffer.
    Data(usize),
    /// The host sends no more.
    EndOfData,
    /// Say how much room there is.
    Credit,
    /// The connection is over; nothing follows.
    Reset,
}

/// What the two sides have agreed on and what is under way: all of a stream but its descriptors,
/// ready to be saved.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    host_port: u32,
    guest_port: u32,
    /// What the sink has not taken yet.
    buffer: VecDeque<u8>,
    /// Bytes from the guest, and those of them that the sink took.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// Bytes to the guest, and the guest's own account.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    accepted: bool,
    credit_wanted: bool,
    ended: bool,
    /// The guest sends no more; the sink closes when the buffer is empty.
    guest_done: bool,
    /// The guest forgot the connection by itself: no reset is owed.
    guest_gone: bool,
    broken: bool,
}

/// A stream.
#[derive(Debug)]
pub struct Stream {
    /// Where the guest reads from.
    pub source: Option<Source>,
    sink: Option<OwnedFd>,
    state: State,
}

impl Stream {
    /// A stream that the guest has just asked for.
    pub fn new(host_port: u32, request: &Header, source: Option<OwnedFd>, sink: Option<OwnedFd>) -> Self {
        let state = State {
            host_port,
            guest_port: request.src_port,
            peer_buffer: request.buf_alloc,
            peer_forwarded: request.fwd_cnt,
            ..State::default()
        };
        Self { source: source.map(|fd| Source { fd, ready: false, closing: false }), sink, state }
    }

    /// The host port that was offered.
    pub const fn host_port(&self) -> u32 {
        self.state.host_port
    }

    /// The guest's port.
    pub const fn guest_port(&self) -> u32 {
        self.state.guest_port
    }

    /// The descriptor that the guest writes to.
    pub fn sink(&self) -> Option<&OwnedFd> {
        self.sink.as_ref()
    }

    /// Whether the sink must become writable before anything goes on.
    pub fn awaits_sink(&self) -> bool {
        !self.state.buffer.is_empty()
    }

    /// Whether nothing is left to do but to say so.
    pub fn is_over(&self) -> bool {
        self.state.broken || (self.state.guest_done && self.state.buffer.is_empty())
    }

    /// Whether the guest is owed a reset when the stream is over.
    pub fn owes_reset(&self) -> bool {
        !self.state.guest_gone
    }

    /// Takes the guest's account of its buffer.
    pub fn update_credit(&mut self, header: &Header) {
        self.state.peer_buffer = header.buf_alloc;
        self.state.peer_forwarded = header.fwd_cnt;
    }

    /// The guest asks how much room there is.
    pub fn want_credit(&mut self) {
        self.state.credit_wanted = true;
    }

    /// Takes data from the guest.
    pub fn receive(&mut self, data: &[u8]) {
        let room = BUFFER - self.state.received.wrapping_sub(self.state.forwarded);
        if self.state.guest_done || data.len() > room as usize {
            // Against the protocol: the guest knew that there was no room.
            self.state.broken = true;
            return;
        }
        self.state.received = self.state.received.wrapping_add(data.len() as u32);
        let taken = if self.state.buffer.is_empty() { self.push(data) } else { 0 };
        if self.sink.is_some() && !self.state.broken {
            self.state.buffer.extend(&data[taken..]);
        }
    }

    /// Writes what is buffered to the sink, as far as it takes it.
    pub fn flush(&mut self) {
        while !self.state.buffer.is_empty() && !self.state.broken {
            let (front, _) = self.state.buffer.as_slices();
            let front = front.to_vec();
            let taken = self.push(&front);
            self.state.buffer.drain(..taken);
            if taken < front.len() {
                break;
            }
        }
        if self.state.broken {
            self.state.buffer.clear();
        }
        if self.state.guest_done && self.state.buffer.is_empty() {
            self.close_sink();
        }
    }

    /// Writes to the sink; returns how much it took.
    fn push(&mut self, data: &[u8]) -> usize {
        let Some(sink) = &self.sink else {
            // Nobody listens: taken and forgotten.
            self.state.forwarded = self.state.forwarded.wrapping_add(data.len() as u32);
            return data.len();
        };
        let mut taken = 0;
        while taken < data.len() {
            match write(sink, &data[taken..]) {
                Ok(count) => taken += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                // The reader is gone.
                Err(_) => {
                    self.state.broken = true;
                    break;
                }
            }
        }
        self.state.forwarded = self.state.forwarded.wrapping_add(taken as u32);
        // The guest was told of too little room to go on at full speed. One that sends no more need
        // not be told: having forgotten the connection it would answer each time, without end.
        if !self.state.guest_done && self.state.received.wrapping_sub(self.state.announced) > BUFFER / 2 {
            self.state.credit_wanted = true;
        }
        taken
    }

    /// The guest will not send (and, with both flags, not receive) any more.
    pub fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.source = None;
            self.state.ended = true;
        }
        if flags & SHUTDOWN_SEND != 0 {
            // A stream without a source has nothing left to live for.
            self.state.guest_done = self.state.guest_done || self.source.is_none() || flags & SHUTDOWN_RECEIVE != 0;
            if !self.state.guest_done && self.state.buffer.is_empty() {
                self.close_sink();
            }
        }
        self.flush();
    }

    /// The guest has forgotten the connection; what it sent is still delivered.
    pub fn guest_reset(&mut self) {
        self.state.guest_gone = true;
        self.state.guest_done = true;
        self.state.credit_wanted = false;
        self.source = None;
        self.flush();
    }

    /// Ends the stream at once, with what it holds.
    pub fn break_off(&mut self) {
        self.state.broken = true;
        self.state.buffer.clear();
    }

    fn close_sink(&mut self) {
        if let Some(sink) = self.sink.take() {
            // A pipe ends with its descriptor; a socket that is also the source must be told.
            let _ = nix::sys::socket::shutdown(sink.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        }
    }

    /// Bytes that the guest has room for.
    fn peer_room(&self) -> usize {
        self.state.peer_buffer.saturating_sub(self.state.sent.wrapping_sub(self.state.peer_forwarded)) as usize
    }

    /// Whether [`Stream::next`] may have something.
    pub fn has_output(&self) -> bool {
        self.is_over()
            || !self.state.accepted
            || self.state.credit_wanted
            || (!self.state.ended && self.source.as_ref().is_some_and(|source| source.ready) && self.peer_room() > 0)
    }

    /// Whether the source must become readable before there is more to send.
    pub fn awaits_source(&self) -> bool {
        !self.state.ended && self.state.accepted && self.source.as_ref().is_some_and(|source| !source.ready) && self.peer_room() > 0
    }

    /// What to send next, with data in `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Next {
        if !self.state.accepted && !self.state.broken {
            self.state.accepted = true;
            return Next::Response;
        }
        if self.is_over() {
            return Next::Reset;
        }
        let room = self.peer_room().min(buffer.len());
        if let Some(source) = self.source.as_mut().filter(|source| source.ready && !self.state.ended && room > 0) {
            match pull(source, &mut buffer[..room]) {
                Ok(Some(0)) => {
                    self.state.ended = true;
                    self.source = None;
                    return Next::EndOfData;
                }
                Ok(Some(count)) => {
                    self.state.sent = self.state.sent.wrapping_add(count as u32);
                    return Next::Data(count);
                }
                Ok(None) => source.ready = false,
                Err(_) => {
                    self.state.broken = true;
                    return Next::Reset;
                }
            }
        }
        if self.state.credit_wanted { Next::Credit } else { Next::Idle }
    }

    /// The account of our buffer that goes with every packet; being told, the guest needs no update.
    pub fn announce(&mut self) -> (u32, u32) {
        self.state.announced = self.state.forwarded;
        self.state.credit_wanted = false;
        (BUFFER, self.state.forwarded)
    }
}

/// Reads from a source: `None` when there is nothing yet.
fn pull(source: &Source, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match read(source.fd.as_fd(), buffer) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if source.closing => return Ok(Some(0)),
            Err(Errno::EAGAIN) => return Ok(None),
            // The peer of a socket closed it with something unread: that is its end.
            Err(Errno::ECONNRESET) => return Ok(Some(0)),
            Err(error) => return Err(error.into()),
        }
    }
}
