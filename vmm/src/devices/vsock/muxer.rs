//! All streams of a guest: which it may open, which are open, which have something to send.
//!
//! The guest connects, the host never does: the shim offers a port with descriptors, the guest
//! connects to it once, and any other port is refused. So the guest reaches exactly what it was
//! given.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use caisson_protocol::guest::{GUEST_CID, HOST_CID};
use caisson_protocol::vmm::{Ends, Offer};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::packet::{Header, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::stream::{Next, Stream};

/// Tokens of streams in the thread's epoll start here.
pub const FIRST_TOKEN: u64 = 64;
/// Streams that one guest may have, offered or open.
const MAX_STREAMS: usize = 4096;
/// Answers to packets of no stream that are held for a guest that does not read.
const MAX_REFUSALS: usize = 256;

/// What the guest finds when it connects to a port.
struct Offered {
    source: Option<OwnedFd>,
    sink: Option<OwnedFd>,
    /// The source was closed before the guest came.
    closing: bool,
}

/// The streams of one guest.
pub struct Muxer {
    epoll: Arc<Epoll>,
    offers: HashMap<u32, Offered>,
    streams: BTreeMap<u64, Stream>,
    /// Guest port and host port to the stream's number.
    numbers: HashMap<(u32, u32), u64>,
    next_number: u64,
    /// Streams that may have something to send, each once.
    outgoing: VecDeque<u64>,
    refusals: VecDeque<Header>,
    opened: Vec<u32>,
    closed: Vec<u32>,
}

impl Muxer {
    /// No streams; their descriptors are watched by `epoll`.
    pub fn new(epoll: Arc<Epoll>) -> Self {
        Self {
            epoll,
            offers: HashMap::new(),
            streams: BTreeMap::new(),
            numbers: HashMap::new(),
            next_number: 0,
            outgoing: VecDeque::new(),
            refusals: VecDeque::new(),
            opened: Vec::new(),
            closed: Vec::new(),
        }
    }

    /// Lets the guest connect to a port, once.
    ///
    /// # Errors
    /// When there are too many streams, the port is on offer already, or a descriptor is unusable.
    pub fn offer(&mut self, offer: Offer, fds: Vec<OwnedFd>) -> io::Result<()> {
        if self.offers.len() + self.streams.len() >= MAX_STREAMS {
            return Err(io::Error::other(format!("offer port {}: there are {MAX_STREAMS} streams already", offer.port)));
        }
        for fd in &fds {
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(io::ErrorKind::InvalidInput);
        let (source, sink) = match offer.ends {
            Ends::Source => (Some(next()?), None),
            Ends::Sink => (None, Some(next()?)),
            Ends::SourceAndSink => (Some(next()?), Some(next()?)),
            Ends::Duplex => {
                let source = next()?;
                let sink = source.try_clone()?;
                (Some(source), Some(sink))
            }
        };
        match self.offers.insert(offer.port, Offered { source, sink, closing: false }) {
            None => Ok(()),
            Some(_) => Err(io::Error::other(format!("port {} was offered twice", offer.port))),
        }
    }

    /// Ends the host's side of a stream once its descriptor is drained.
    pub fn close_source(&mut self, port: u32) {
        let Some((&number, stream)) = self.streams.iter_mut().find(|(_, stream)| stream.host_port() == port) else {
            if let Some(offered) = self.offers.get_mut(&port) {
                offered.closing = true;
            }
            return;
        };
        if let Some(source) = &mut stream.source {
            source.closing = true;
            source.ready = true;
        }
        self.settle(number);
    }

    /// Takes an offer back, or breaks the stream that came of it.
    pub fn withdraw(&mut self, port: u32) {
        if self.offers.remove(&port).is_some() {
            self.closed.push(port);
        } else if let Some((&number, stream)) = self.streams.iter_mut().find(|(_, stream)| stream.host_port() == port) {
            stream.break_off();
            self.settle(number);
        }
    }

    /// The ports that the guest connected to since the last call.
    pub fn take_opened(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.opened)
    }

    /// The ports of streams that ended since the last call.
    pub fn take_closed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.closed)
    }

    /// Takes a packet from the guest.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID || header.type_ != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let key = (header.src_port, header.dst_port);
        let Some(&number) = self.numbers.get(&key) else {
            match header.op {
                op::REQUEST => self.connect(header),
                op::RST => {}
                _ => self.refuse(header),
            }
            return;
        };
        let Some(stream) = self.streams.get_mut(&number) else { return };
        stream.update_credit(header);
        match header.op {
            op::RW => stream.receive(data),
            op::SHUTDOWN => stream.guest_shutdown(header.flags),
            op::CREDIT_REQUEST => stream.want_credit(),
            op::CREDIT_UPDATE => {}
            // A reset, or something that does not belong into a connection.
            _ => stream.guest_reset(),
        }
        self.settle(number);
    }

    fn connect(&mut self, request: &Header) {
        let port = request.dst_port;
        let Some(Offered { source, sink, closing }) = self.offers.remove(&port) else {
            self.refuse(request);
            return;
        };
        let number = self.next_number;
        self.next_number += 1;
        self.numbers.insert((request.src_port, request.dst_port), number);
        let mut stream = Stream::new(request.dst_port, request, source, sink);
        for (fd, token) in descriptors(&stream, number) {
            // Armed when the stream waits for it. A regular file cannot be watched and is always ready.
            let _ = self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::ONE_SHOT, token));
        }
        if let Some(source) = &mut stream.source {
            // A FIFO that no writer has opened yet reads as ended, so it is read only when epoll
            // says that there is something, or when it is to end anyway.
            (source.closing, source.ready) = (closing, closing);
        }
        self.streams.insert(number, stream);
        self.opened.push(port);
        self.settle(number);
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.refusals.len() < MAX_REFUSALS {
            let reset = Header { op: op::RST, ..addressed(header.src_port, header.dst_port) };
            self.refusals.push_back(reset);
        }
    }

    /// A descriptor of a stream is ready.
    pub fn ready(&mut self, token: u64) {
        let number = (token - FIRST_TOKEN) / 2;
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if token == source_token(number) {
            if let Some(source) = &mut stream.source {
                source.ready = true;
            }
        } else {
            stream.flush();
        }
        self.settle(number);
    }

    /// After anything happened to a stream: waits for its descriptors, queues what it has to send.
    fn settle(&mut self, number: u64) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.awaits_source()
            && let Some(source) = &stream.source
        {
            arm(&self.epoll, source.fd.as_raw_fd(), source_token(number), EventSet::IN);
        }
        if stream.awaits_sink()
            && let Some(sink) = stream.sink()
        {
            arm(&self.epoll, sink.as_raw_fd(), sink_token(number), EventSet::OUT);
        }
        if stream.is_over() && !stream.owes_reset() {
            self.remove(number);
        } else if stream.has_output() && !self.outgoing.contains(&number) {
            self.outgoing.push_back(number);
        }
    }

    fn remove(&mut self, number: u64) {
        let Some(stream) = self.streams.remove(&number) else { return };
        self.numbers.remove(&(stream.guest_port(), stream.host_port()));
        self.outgoing.retain(|other| *other != number);
        for (fd, token) in descriptors(&stream, number) {
            // The shim may hold the same open file, so closing ours would not end the watch.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::new(EventSet::empty(), token));
        }
        self.closed.push(stream.host_port());
    }

    /// Whether there may be a packet for the guest.
    pub fn has_output(&self) -> bool {
        !self.outgoing.is_empty() || !self.refusals.is_empty()
    }

    /// The next packet for the guest: its header, with payload in `buffer`.
    pub fn next_packet(&mut self, buffer: &mut [u8]) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(number) = self.outgoing.pop_front() {
            let Some(stream) = self.streams.get_mut(&number) else { continue };
            let next = stream.next(buffer);
            let mut header = addressed(stream.guest_port(), stream.host_port());
            match next {
                Next::Idle => {
                    self.settle(number);
                    continue;
                }
                Next::Response => header.op = op::RESPONSE,
                Next::Data(count) => (header.op, header.len) = (op::RW, count as u32),
                Next::EndOfData => (header.op, header.flags) = (op::SHUTDOWN, SHUTDOWN_SEND),
                Next::Credit => header.op = op::CREDIT_UPDATE,
                Next::Reset => header.op = op::RST,
            }
            (header.buf_alloc, header.fwd_cnt) = stream.announce();
            if next == Next::Reset {
                self.remove(number);
            } else {
                self.settle(number);
            }
            return Some(header);
        }
        None
    }
}

/// A header from the host to the guest.
fn addressed(guest_port: u32, host_port: u32) -> Header {
    Header { src_cid: HOST_CID, dst_cid: GUEST_CID, src_port: host_port, dst_port: guest_port, type_: TYPE_STREAM, ..Header::default() }
}

const fn source_token(number: u64) -> u64 {
    FIRST_TOKEN + number * 2
}

const fn sink_token(number: u64) -> u64 {
    source_token(number) + 1
}

/// The descriptors of a stream with their tokens.
fn descriptors(stream: &Stream, number: u64) -> impl Iterator<Item = (RawFd, u64)> {
    let source = stream.source.as_ref().map(|source| (source.fd.as_raw_fd(), source_token(number)));
    let sink = stream.sink().map(|sink| (sink.as_raw_fd(), sink_token(number)));
    source.into_iter().chain(sink)
}

/// Waits for a descriptor, once.
fn arm(epoll: &Epoll, fd: RawFd, token: u64, events: EventSet) {
    // It fails only for a regular file, which was never added: a file is always ready, and never waited for.
    let _ = epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events | EventSet::ONE_SHOT, token));
}
