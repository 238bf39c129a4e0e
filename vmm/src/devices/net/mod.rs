//! The network device (virtio 1.2, 5.1): Ethernet frames between the guest and a wire of the host.
//!
//! A pod's interfaces are known only when containerd's CNI plugins have made them, which may be
//! after the boot. So each machine has a few empty places for them: until an interface is attached
//! the device reads as id 0, the transport's placeholder (4.2.2), and the guest has nothing there.
//! Then the agent makes its kernel look again, and finds a device with the interface's own address.
//!
//! ```text
//! empty -> attached (id 1, a wire waits) -> in service (the driver is ready)
//!   ^------------- detached <---------------'- reset by the driver
//! ```

pub mod control;
pub mod kernel;
pub mod wire;

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use caisson_protocol::vmm::{NIC_HEADER, NIC_PAIRS, Nic, NicWire, RateLimit};
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::wire::{MAX_FRAME, Wire};
use super::io_thread::{Command, Commands, Server};
use super::mmio::QUEUE_FEATURES;
use super::queue::{ActiveQueue, Chain, writable_buffers};
use super::rate::Way;
use super::{ActivateError, Activation, Interrupt, VirtioDevice, lock, read_config_bytes};
use crate::memory::GuestMemory;

const DEVICE_ID: u32 = 1;
/// Receive and transmit for each pair, and after those of all pairs that there are the control queue.
const QUEUE_SIZES: [u16; 2 * NIC_PAIRS as usize + 1] = [256; 2 * NIC_PAIRS as usize + 1];
/// Feature bits (5.1.3).
const F_CSUM: u32 = 0;
const F_GUEST_CSUM: u32 = 1;
const F_MAC: u32 = 5;
const F_GUEST_TSO4: u32 = 7;
const F_GUEST_TSO6: u32 = 8;
const F_GUEST_ECN: u32 = 9;
const F_HOST_TSO4: u32 = 11;
const F_HOST_TSO6: u32 = 12;
const F_HOST_ECN: u32 = 13;
const F_MRG_RXBUF: u32 = 15;
const F_CTRL_VQ: u32 = 17;
const F_MQ: u32 = 22;
/// What each wire can do, and what one can whose frames have a header.
const FEATURES: u64 = QUEUE_FEATURES | 1 << F_MAC | 1 << F_MRG_RXBUF;
const OFFLOADS: u64 = 1 << F_CSUM
    | 1 << F_GUEST_CSUM
    | 1 << F_GUEST_TSO4
    | 1 << F_GUEST_TSO6
    | 1 << F_GUEST_ECN
    | 1 << F_HOST_TSO4
    | 1 << F_HOST_TSO6
    | 1 << F_HOST_ECN;

/// With several pairs of queues.
const SEVERAL: u64 = 1 << F_CTRL_VQ | 1 << F_MQ;
/// Where the configuration space holds the number of pairs (5.1.4).
const MAX_PAIRS: std::ops::Range<usize> = 8..10;

/// Where the header holds the number of buffers.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Frames each way before the thread looks after its other work.
const BUDGET: usize = 64;

nix::ioctl_write_int!(
    /// `TUNSETOFFLOAD` (linux/if_tun.h): what the reader of a tap can take.
    tun_set_offload, b'T', 208
);
/// Offloads of a tap (linux/if_tun.h).
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

/// A place for an interface, shared by the device's front and the thread that attaches.
#[derive(Clone, Default)]
pub struct Place(Arc<Mutex<Option<Nic>>>);

impl Place {
    /// Makes the device appear; false when one is there already.
    pub fn attach(&self, nic: Nic) -> bool {
        let mut place = lock(&self.0);
        let empty = place.is_none();
        if empty {
            *place = Some(nic);
        }
        empty
    }

    /// Makes the device disappear.
    pub fn detach(&self) {
        lock(&self.0).take();
    }
}

/// The device's front; the device thread serves its queues.
pub struct Net {
    index: usize,
    place: Place,
    thread: Commands,
}

impl Net {
    /// The device of a place, by its number.
    pub fn new(index: usize, place: Place, thread: Commands) -> Self {
        Self { index, place, thread }
    }
}

/// Whether a driver that has accepted these features has a control queue.
fn has_control(features: u64) -> bool {
    features & 1 << F_CTRL_VQ != 0
}

/// How many pairs of queues an interface has.
fn pairs(nic: Option<Nic>) -> usize {
    match nic.map(|nic| nic.wire) {
        Some(NicWire::Kernel { pairs }) => pairs as usize,
        _ => 1,
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        if lock(&self.place.0).is_some() { DEVICE_ID } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        match pairs(*lock(&self.place.0)) {
            1 => &QUEUE_SIZES[..2],
            several => &QUEUE_SIZES[..2 * several + 1],
        }
    }

    fn most_queues(&self) -> usize {
        QUEUE_SIZES.len()
    }

    fn used_queues(&self, features: u64) -> usize {
        // The control queue comes after the pairs that a driver knows of (5.1.2).
        let pairs = if features & 1 << F_MQ != 0 { pairs(*lock(&self.place.0)) } else { 1 };
        2 * pairs + usize::from(has_control(features))
    }

    fn features(&self) -> u64 {
        let nic = *lock(&self.place.0);
        let stream = nic.is_some_and(|nic| nic.wire == NicWire::Stream);
        FEATURES | if stream { 0 } else { OFFLOADS } | if pairs(nic) > 1 { SEVERAL } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The address comes first.
        let nic = *lock(&self.place.0);
        let mut config = [0; MAX_PAIRS.end];
        config[..6].copy_from_slice(&nic.map_or([0; 6], |nic| nic.mac));
        config[MAX_PAIRS].copy_from_slice(&(pairs(nic) as u16).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let command = Command::Activate(Server::Net(self.index), activation);
        self.thread.send(command).map_err(|source| ActivateError { device: "net", source })
    }

    /// The interface is gone then, with its wire.
    fn reset(&mut self) -> bool {
        self.place.detach();
        let (done, gone) = mpsc::channel();
        // A thread that is gone serves nothing any more.
        let _ = self.thread.send(Command::DetachNic(self.index, Some(done)));
        let _ = gone.recv();
        true
    }
}

/// The queues of an interface in service, and its wire.
pub struct NetServer {
    rx: ActiveQueue,
    tx: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    wire: Wire,
    outgoing: Box<[u8]>,
    incoming: Box<[u8]>,
    /// Bytes in `incoming` that the guest had no room for.
    waiting: usize,
    /// The wire was taken away.
    gone: bool,
    sending: Way,
    receiving: Way,
    /// Heads of the chains of one frame, with the bytes in each; kept for its allocation.
    used: Vec<(u16, u32)>,
}

impl NetServer {
    /// Takes the queues over.
    ///
    /// # Errors
    /// When the activation does not hold two of them.
    pub fn new(activation: Activation, wire: Wire, limit: RateLimit) -> io::Result<Self> {
        let Ok([rx, tx]) = <[ActiveQueue; 2]>::try_from(activation.queues) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        Ok(Self {
            rx,
            tx,
            memory: activation.memory,
            interrupt: activation.interrupt,
            wire,
            outgoing: vec![0; MAX_FRAME].into(),
            incoming: vec![0; MAX_FRAME].into(),
            waiting: 0,
            gone: false,
            sending: Way::new(limit),
            receiving: Way::new(limit),
            used: Vec::new(),
        })
    }

    /// Readable when the guest has room for frames.
    pub fn rx_kick(&self) -> &EventFd {
        self.rx.kick()
    }

    /// Readable when the guest has sent frames.
    pub fn tx_kick(&self) -> &EventFd {
        self.tx.kick()
    }

    /// Readable when the host has sent frames.
    pub fn wire(&self) -> &File {
        self.wire.file()
    }

    /// What the wire is to be watched for: frames, when the guest has room, no limit holds them back, and the interface is
    /// still there, as a wire that is gone is ready for ever; and room for what was sent.
    pub fn awaits(&mut self) -> EventSet {
        let frames = if self.wants_frames() { EventSet::IN } else { EventSet::empty() };
        if self.wire.is_full() { frames | EventSet::OUT } else { frames }
    }

    fn wants_frames(&self) -> bool {
        self.waiting == 0 && !self.gone && self.receiving.held().is_none()
    }

    /// When frames that a limit holds back may pass: those of the guest, those of the host.
    pub fn held(&self) -> [Option<Instant>; 2] {
        [self.sending.held(), self.receiving.held()]
    }

    /// Sends what the guest has made available, at most [`BUDGET`] frames; true when there is more that may pass.
    pub fn transmit(&mut self) -> bool {
        self.tx.clear_kick();
        let mut more = true;
        let now = Instant::now();
        for _ in 0..BUDGET {
            if self.wire.is_full() || !self.sending.is_open(now) {
                more = false;
                break;
            }
            let Some(chain) = self.tx.next(&self.memory) else {
                more = false;
                break;
            };
            let head = chain.head_index();
            if let Some(length) = copy_out(&self.memory, chain, &mut self.outgoing) {
                self.wire.send(&mut self.outgoing[..length]);
                self.sending.pay(length - NIC_HEADER);
            }
            self.tx.give_back(&self.memory, head, 0);
        }
        self.tx.signal(&self.memory, &self.interrupt);
        more
    }

    /// The guest has made room.
    pub fn room(&mut self) {
        self.rx.clear_kick();
    }

    /// Gives the guest what the host has sent, at most [`BUDGET`] frames; true when there is more of which the wire does not
    /// tell.
    pub fn receive(&mut self) -> bool {
        let now = Instant::now();
        for _ in 0..BUDGET {
            if self.waiting == 0 {
                if !self.receiving.is_open(now) {
                    break;
                }
                match self.wire.receive(&mut self.incoming) {
                    Ok(length) => self.waiting = length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.gone = true;
                        break;
                    }
                }
            }
            if !self.deliver() {
                break;
            }
            self.receiving.pay(self.waiting - NIC_HEADER);
            self.waiting = 0;
        }
        self.rx.signal(&self.memory, &self.interrupt);
        self.wants_frames() && self.wire.has_frame()
    }

    /// Puts the waiting frame into as many chains as it needs; false when there are too few.
    fn deliver(&mut self) -> bool {
        let mut buffers = Vec::new();
        let mut room = 0;
        // First all that it takes, so that its header can say in how many buffers it is. What does not fit into
        // a whole queue of them is cut off: a driver could go on with such buffers for ever.
        while room < self.waiting && buffers.len() < usize::from(self.rx.layout().size()) {
            let Some(chain) = self.rx.next(&self.memory) else {
                buffers.iter().for_each(|_| self.rx.put_back());
                return false;
            };
            // A chain that cannot be written to is used with nothing in it.
            let (head, parts) = (chain.head_index(), writable_buffers(chain).unwrap_or_default());
            room = parts.iter().fold(room, |room: usize, (_, length)| room.saturating_add(*length as usize));
            buffers.push((head, parts));
        }
        let count = u16::try_from(buffers.len()).unwrap_or(u16::MAX);
        self.incoming[NUM_BUFFERS].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.incoming[..self.waiting];
        self.used.clear();
        for (head, parts) in buffers {
            let before = rest.len();
            for (address, length) in parts {
                let (part, after) = rest.split_at(rest.len().min(length as usize));
                // What lies outside of the guest's memory takes nothing.
                if self.memory.write_slice(part, address).is_err() {
                    break;
                }
                rest = after;
            }
            self.used.push((head, (before - rest.len()) as u32));
        }
        self.rx.give_back_together(&self.memory, &self.used);
        true
    }
}

/// Copies a frame out of guest memory, its header first; `None` when it is too short or too long.
fn copy_out(memory: &GuestMemory, chain: Chain<'_>, frame: &mut [u8]) -> Option<usize> {
    let mut reader = chain.reader(memory).ok()?;
    let length = reader.available_bytes();
    if !(NIC_HEADER..=frame.len()).contains(&length) {
        return None;
    }
    reader.read_exact(&mut frame[..length]).ok()?;
    Some(length)
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
mod tests;
