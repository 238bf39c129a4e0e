//! The muxer seen from both sides: packets of a guest, descriptors of the host.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use caisson_protocol::guest::{GUEST_CID, HOST_CID};
use caisson_protocol::vmm::{Ends, Offer};
use proptest::prelude::*;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::muxer::Muxer;
use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::stream::BUFFER;

const GUEST_PORT: u32 = 4000;
const PORT: u32 = 2000;

/// A guest that speaks to a muxer without queues.
struct Guest {
    muxer: Muxer,
    epoll: Arc<Epoll>,
}

impl Guest {
    fn new() -> Self {
        let epoll = Arc::new(Epoll::new().unwrap());
        Self { muxer: Muxer::new(Arc::clone(&epoll)), epoll }
    }

    fn offer(&mut self, ends: Ends, fds: Vec<OwnedFd>) {
        self.muxer.offer(Offer { port: PORT, ends }, fds).unwrap();
    }

    fn send(&mut self, op: u16, data: &[u8]) {
        self.send_with(op, 0, data);
    }

    fn send_with(&mut self, op: u16, flags: u32, data: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: PORT,
            type_: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 1 << 20,
            len: data.len() as u32,
            ..Header::default()
        };
        self.muxer.receive(&header, data);
    }

    /// Lets the muxer see which descriptors are ready, and takes all that it sends.
    fn packets(&mut self) -> Vec<(u16, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            let mut events = [EpollEvent::default(); 16];
            let count = self.epoll.wait(0, &mut events).unwrap();
            for event in &events[..count] {
                self.muxer.ready(event.data());
            }
            let mut buffer = vec![0; 4096];
            let before = packets.len();
            while let Some(header) = self.muxer.next_packet(&mut buffer) {
                packets.push((header.op, buffer[..header.len as usize].to_vec()));
            }
            if count == 0 && packets.len() == before {
                return packets;
            }
        }
    }

    fn ops(&mut self) -> Vec<u16> {
        self.packets().into_iter().map(|(op, _)| op).collect()
    }

    fn connect(&mut self) {
        self.send(op::REQUEST, &[]);
        assert_eq!(self.ops(), [op::RESPONSE]);
    }
}

#[test]
fn a_port_that_was_not_offered_is_refused() {
    let mut guest = Guest::new();
    guest.send(op::REQUEST, &[]);
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn a_port_can_be_opened_once() {
    let mut guest = Guest::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    guest.send_with(op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    assert_eq!(guest.ops(), [op::RST]);
    guest.send(op::REQUEST, &[]);
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn a_duplex_stream_carries_both_ways() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.offer(Ends::Duplex, vec![theirs.into()]);
    guest.connect();
    guest.send(op::RW, b"from the guest");
    let mut buffer = [0; 14];
    ours.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"from the guest");
    ours.write_all(b"from the host").unwrap();
    assert_eq!(guest.packets(), [(op::RW, b"from the host".to_vec())]);
    drop(ours);
    assert_eq!(guest.ops(), [op::SHUTDOWN]);
}

#[test]
fn what_a_slow_reader_has_not_taken_is_kept_when_the_guest_closes() {
    let mut guest = Guest::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    // More than the pipe holds (64 KiB), so that some of it waits in the buffer.
    let chunk: Vec<u8> = (0..60_000u32).map(|n| n as u8).collect();
    for _ in 0..4 {
        guest.send(op::RW, &chunk);
    }
    guest.send_with(op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    assert!(guest.muxer.take_closed().is_empty(), "closed before it was drained");
    let mut got = Vec::new();
    let mut buffer = vec![0; 10_000];
    while got.len() < 240_000 {
        let count = reader.read(&mut buffer).unwrap();
        got.extend_from_slice(&buffer[..count]);
        guest.packets();
    }
    assert_eq!(got, chunk.repeat(4));
    assert_eq!(reader.read(&mut buffer).unwrap(), 0);
    assert_eq!(guest.muxer.take_closed(), [PORT]);
}

#[test]
fn a_guest_that_forgot_a_stream_hears_nothing_more_of_it() {
    let mut guest = Guest::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    let data = vec![7; 64 << 10];
    for _ in 0..4 {
        guest.send(op::RW, &data);
    }
    guest.ops();
    guest.send_with(op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    guest.send(op::RST, &[]);
    assert!(guest.ops().is_empty());
    let mut taken = vec![0; 64 << 10];
    for _ in 0..4 {
        reader.read_exact(&mut taken).unwrap();
        assert!(guest.ops().is_empty());
    }
    assert_eq!(guest.muxer.take_closed(), [PORT]);
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_the_stream() {
    let mut guest = Guest::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    for _ in 0..=(BUFFER + (64 << 10)) / 60_000 {
        guest.send(op::RW, &[1; 60_000]);
    }
    assert!(guest.ops().contains(&op::RST));
    assert_eq!(guest.muxer.take_closed(), [PORT]);
}

#[test]
fn a_reader_that_goes_away_ends_the_stream() {
    let mut guest = Guest::new();
    let (reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    drop(reader);
    guest.send(op::RW, b"nobody reads this");
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(guest.muxer.take_closed(), [PORT]);
}

#[test]
fn a_fifo_without_a_writer_has_not_ended() {
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = dir.as_path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let source =
        nix::fcntl::open(&path, nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK, nix::sys::stat::Mode::empty()).unwrap();
    let mut guest = Guest::new();
    guest.offer(Ends::Source, vec![source]);
    guest.connect();
    assert!(guest.ops().is_empty());
    let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all(b"input").unwrap();
    assert_eq!(guest.packets(), [(op::RW, b"input".to_vec())]);
    drop(writer);
    assert_eq!(guest.ops(), [op::SHUTDOWN]);
}

#[test]
fn a_closed_source_is_drained_first_also_before_the_guest_comes() {
    for connect_first in [true, false] {
        let mut guest = Guest::new();
        let (reader, mut writer) = std::io::pipe().unwrap();
        guest.offer(Ends::Source, vec![reader.into()]);
        if connect_first {
            guest.connect();
        }
        writer.write_all(b"last words").unwrap();
        guest.muxer.close_source(PORT);
        if !connect_first {
            guest.send(op::REQUEST, &[]);
        }
        let packets: Vec<_> = guest.packets().into_iter().filter(|(op, _)| *op != op::RESPONSE).collect();
        assert_eq!(packets, [(op::RW, b"last words".to_vec()), (op::SHUTDOWN, vec![])]);
    }
}

#[test]
fn a_withdrawn_stream_ends_whatever_it_holds() {
    let mut guest = Guest::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.muxer.withdraw(PORT);
    assert_eq!(guest.muxer.take_closed(), [PORT]);
    guest.send(op::REQUEST, &[]);
    assert_eq!(guest.ops(), [op::RST]);
    let (_reader, writer) = std::io::pipe().unwrap();
    guest.offer(Ends::Sink, vec![writer.into()]);
    guest.connect();
    guest.send(op::RW, &[0; 60_000]);
    guest.send(op::RW, &[0; 60_000]);
    guest.muxer.withdraw(PORT);
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(guest.muxer.take_closed(), [PORT]);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.offer(Ends::Duplex, vec![theirs.into()]);
    let request = |op, fwd_cnt| Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: PORT,
        type_: TYPE_STREAM,
        op,
        buf_alloc: 100,
        fwd_cnt,
        ..Header::default()
    };
    guest.muxer.receive(&request(op::REQUEST, 0), &[]);
    ours.write_all(&[9; 250]).unwrap();
    let sizes = |packets: Vec<(u16, Vec<u8>)>| packets.iter().map(|(_, data)| data.len()).sum::<usize>();
    assert_eq!(sizes(guest.packets()), 100);
    guest.muxer.receive(&request(op::CREDIT_UPDATE, 100), &[]);
    assert_eq!(sizes(guest.packets()), 100);
    guest.muxer.receive(&request(op::CREDIT_UPDATE, 200), &[]);
    assert_eq!(sizes(guest.packets()), 50);
}

proptest! {
    #[test]
    fn no_packets_of_a_hostile_guest_panic(packets in proptest::collection::vec((any::<u16>(), any::<u32>(), any::<u32>(), any::<u32>(), 0usize..3, 0u16..9), 0..100)) {
        let mut guest = Guest::new();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        guest.offer(Ends::Duplex, vec![theirs.into()]);
        for (_, flags, buf_alloc, fwd_cnt, length, op) in packets {
            let header = Header { src_cid: GUEST_CID, dst_cid: HOST_CID, src_port: GUEST_PORT, dst_port: PORT, type_: TYPE_STREAM, op, flags, buf_alloc, fwd_cnt, len: length as u32 };
            guest.muxer.receive(&header, &[0; 3][..length]);
            guest.packets();
        }
    }
}
