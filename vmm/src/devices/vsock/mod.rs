//! The socket device (virtio 1.2, 5.10): streams between the guest and descriptors of the host.
//!
//! * [`packet`]: the header of a packet;
//! * [`stream`]: one connection, its flow control and its descriptors;
//! * [`muxer`]: all connections of a guest;
//! * here: the device's front, and its queues: packets in and out of guest memory.
//!
//! ```text
//! guest ──tx queue──► VsockServer::transmit ──► Muxer::receive ──► Stream ──► sink descriptor
//! guest ◄──rx queue── VsockServer::fill ◄── Muxer::next_packet ◄── Stream ◄── source descriptor
//! ```

pub mod muxer;
pub mod packet;
mod stream;

use std::io::{self, Read, Write};
use std::sync::Arc;

use caisson_protocol::guest::GUEST_CID;
use vmm_sys_util::eventfd::EventFd;

use self::muxer::Muxer;
use self::packet::{Header, MAX_PAYLOAD};
use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, BUDGET, Chain};
use super::{ActivateError, Activation, Interrupt, VirtioDevice, read_config_bytes};
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 19;
/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const HEADER_BYTES: usize = size_of::<Header>();

/// The device's front; the device thread serves its queues.
pub struct Vsock {
    thread: Commands,
}

impl Vsock {
    /// A device whose queues the thread behind `thread` serves.
    pub fn new(thread: Commands) -> Self {
        Self { thread }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        QUEUE_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.thread.send(Command::Activate(Server::Vsock, activation)).map_err(|source| ActivateError { device: "vsock", source })
    }
}

/// The queues of a device that is in service.
pub struct VsockServer {
    rx: ActiveQueue,
    tx: ActiveQueue,
    // Transport resets are not something that a pod goes through, so no event is ever sent.
    _events: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    payload: Vec<u8>,
}

impl VsockServer {
    /// Takes the queues over.
    ///
    /// # Errors
    /// When the activation does not hold three of them.
    pub fn new(activation: Activation) -> io::Result<Self> {
        let Ok([rx, tx, events]) = <[ActiveQueue; 3]>::try_from(activation.queues) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(Self { rx, tx, _events: events, memory: activation.memory, interrupt: activation.interrupt, payload: vec![0; MAX_PAYLOAD] })
    }

    /// Readable when the guest has room for packets.
    pub fn rx_kick(&self) -> &EventFd {
        self.rx.kick()
    }

    /// Readable when the guest has sent packets.
    pub fn tx_kick(&self) -> &EventFd {
        self.tx.kick()
    }

    /// Takes back the notification that there is room.
    pub fn clear_rx_kick(&self) {
        self.rx.clear_kick();
    }

    /// Takes the packets that the guest has sent, at most [`BUDGET`] at a time.
    pub fn transmit(&mut self, muxer: &mut Muxer) {
        self.tx.clear_kick();
        for served in 1.. {
            let Some(chain) = self.tx.next(&self.memory) else { break };
            let head = chain.head_index();
            if let Some((header, length)) = read_packet(&self.memory, chain, &mut self.payload) {
                muxer.receive(&header, &self.payload[..length]);
            }
            self.tx.give_back(&self.memory, head, 0);
            if served == BUDGET {
                self.tx.come_back();
                break;
            }
        }
        self.tx.signal(&self.memory, &self.interrupt);
    }

    /// Gives the guest the packets that there are and it has room for, at most [`BUDGET`] at a time.
    pub fn fill(&mut self, muxer: &mut Muxer) {
        for filled in 0.. {
            if !muxer.has_output() {
                break;
            }
            if filled == BUDGET {
                self.rx.come_back();
                break;
            }
            // Full: the guest notifies when it has made room.
            let Some(chain) = self.rx.next(&self.memory) else { break };
            let head = chain.head_index();
            let Some(written) = write_packet(&self.memory, chain, muxer, &mut self.payload) else {
                self.rx.put_back();
                break;
            };
            self.rx.give_back(&self.memory, head, written);
        }
        self.rx.signal(&self.memory, &self.interrupt);
    }
}

/// Copies one packet out of guest memory; `None` when the chain is too short for what it claims.
fn read_packet(memory: &GuestMemory, chain: Chain<'_>, payload: &mut [u8]) -> Option<(Header, usize)> {
    let mut reader = chain.reader(memory).ok()?;
    let header: Header = reader.read_obj().ok()?;
    let length = usize::try_from(header.len).ok().filter(|length| *length <= payload.len())?;
    reader.read_exact(&mut payload[..length]).ok()?;
    Some((header, length))
}

/// Writes the next packet into a guest buffer; `None` when there is none after all.
///
/// A buffer without room for a header is given back empty: it is the driver's own loss.
fn write_packet(memory: &GuestMemory, chain: Chain<'_>, muxer: &mut Muxer, payload: &mut [u8]) -> Option<u32> {
    let Ok(mut writer) = chain.writer(memory) else { return Some(0) };
    let Some(room) = writer.available_bytes().checked_sub(HEADER_BYTES) else { return Some(0) };
    let room = room.min(payload.len());
    let header = muxer.next_packet(&mut payload[..room])?;
    let length = header.len as usize;
    let written = writer.write_obj(header).and_then(|()| writer.write_all(&payload[..length]));
    written.map_or(Some(0), |()| Some((HEADER_BYTES + length) as u32))
}

#[cfg(test)]
mod tests;
