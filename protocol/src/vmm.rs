//! Shim to VMM: one JSON message a packet over a `SOCK_SEQPACKET` control socket.
//!
//! The shim sends [`Request::Boot`] once, then any number of the others; the VMM answers with
//! [`Event`]s. File descriptors travel beside the message (`SCM_RIGHTS`), in the order that each
//! message states. The VMM ends when the socket closes: a killed shim takes its VMM along.

use serde::{Deserialize, Serialize};

/// The largest message, in bytes. A larger one is refused by sender and receiver.
pub const MAX_MESSAGE: usize = 64 << 10;
/// The most file descriptors beside one message.
pub const MAX_FDS: usize = 128;

/// Fewest and most vCPUs of a VM.
pub const VCPUS: std::ops::RangeInclusive<u32> = 1..=32;
/// Least and most guest memory in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 64..=1 << 20;

/// Least and most MiB of a window for files, where there is one.
pub const FILES_MIB: std::ops::RangeInclusive<u64> = 16..=8192;

/// MiB that the memory for later comes in: a memory block of Linux.
pub const ADDED_MIB_STEP: u64 = 128;

/// What the shim asks of the VMM.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Boot the VM. File descriptors: KVM, kernel, initramfs, guest memory, added memory,
    /// vhost-user-fs socket, and the console's output when [`BootConfig::console`] is set.
    Boot(BootConfig),
    /// Give the guest one connection to a host port.
    Offer(Offer),
    /// End the host's side of a stream once what the descriptor holds has been sent.
    CloseSource {
        /// The stream's port.
        port: u32,
    },
    /// Take an offer back, or break the stream that came of it, whatever it still holds.
    Withdraw {
        /// The stream's port.
        port: u32,
    },
    /// Take a network interface away: its descriptors are closed.
    DetachNic {
        /// Its place, which is empty afterwards.
        place: u32,
    },
    /// Put a network interface into an empty place. File descriptors: those that its [`NicWire`] states.
    AttachNic(Nic),
    /// Put a disk into an empty place. File descriptors: a block device or file for each of its parts, readable, and
    /// writable unless it is [`Disk::read_only`].
    AttachDisk(Disk),
    /// Tell the guest that a disk of one part has another size.
    ResizeDisk {
        /// Its place.
        place: u32,
        /// In bytes.
        bytes: u64,
    },
    /// Take a disk away. Answered by [`Event::DiskDetached`].
    DetachDisk {
        /// Its place.
        place: u32,
    },
    /// Let the guest have so much added memory; the file for it must be large enough for the next
    /// multiple of [`ADDED_MIB_STEP`]. Answered by [`Event::AddedMemoryEnd`]s as the guest takes memory or gives it back.
    AddMemory {
        /// In MiB, from 0 to [`BootConfig::max_added_mib`].
        mib: u64,
    },
    /// Have at least so many vCPUs. Answered by [`Event::Vcpus`] for each one made, which its kernel
    /// may then wake.
    AddVcpus {
        /// At most [`BootConfig::max_vcpus`].
        vcpus: u32,
    },
}

/// Network interfaces that a VM has place for.
pub const NICS: u32 = 8;

/// Bytes before each frame of a tap: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const NIC_HEADER: usize = 12;

/// A network interface of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Which of the [`NICS`] places.
    pub place: u32,
    /// Its address.
    pub mac: [u8; 6],
    /// Where its frames go.
    pub wire: NicWire,
    /// What may pass each way; the host's kernel knows no limits.
    pub limit: RateLimit,
}

/// The most pairs of queues of a network interface: a message carries two descriptors for each.
pub const NIC_PAIRS: u32 = 4;
const _: () = assert!(2 * NIC_PAIRS as usize <= MAX_FDS);

/// Where the frames of a network interface go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NicWire {
    /// Through a tap, not blocking, whose frames begin with a virtio header of [`NIC_HEADER`] bytes.
    Tap,
    /// Over a stream socket, not blocking, each frame behind its length.
    Stream,
    /// Through taps by the host's kernel: a tap for each pair of queues, of which there are 1 to [`NIC_PAIRS`], and then
    /// `/dev/vhost-net` for each.
    Kernel {
        /// How many.
        pairs: u32,
    },
}

/// The most that a device carries in a second; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Bytes.
    pub bytes: u64,
    /// Frames, or requests.
    pub operations: u64,
}

impl RateLimit {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// How many disks a VM may have place for: each place is one more device that the guest looks at when it starts.
pub const DISKS: std::ops::RangeInclusive<u32> = 0..=16;

/// Devices or files that a disk may be made of.
pub const DISK_PARTS: usize = MAX_FDS;

/// Bytes of a disk's own blocks: what Linux can have.
pub const BLOCK_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Which of the VM's places; one can be used again once its disk was detached.
    pub place: u32,
    /// Bytes of each device or file that it is made of, one behind the other: 1 to [`DISK_PARTS`] of them, and one unless
    /// it is read-only. What does not fill a sector of 512 bytes is not reached.
    pub parts: Vec<u64>,
    /// One of [`BLOCK_SIZES`].
    pub block_size: u32,
    /// Whether the guest cannot write it.
    pub read_only: bool,
    /// By which the guest knows it; of 20 bytes at most (virtio 1.2, 5.2.6).
    pub serial: String,
    /// What may be read and written, together.
    pub limit: RateLimit,
}

/// The shape of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// Number of vCPUs, in [`VCPUS`].
    pub vcpus: u32,
    /// The most vCPUs that it may have later, in [`VCPUS`].
    pub max_vcpus: u32,
    /// Guest memory in MiB, in [`MEMORY_MIB`].
    pub memory_mib: u64,
    /// The most MiB of memory that may be added later: 0, or a multiple of [`ADDED_MIB_STEP`].
    pub max_added_mib: u64,
    /// MiB of the window into which the virtio-fs server maps files: 0 for none, or an even number in [`FILES_MIB`].
    pub files_mib: u64,
    /// Whether the guest may run virtual machines itself, where the host lets it.
    pub nested: bool,
    /// Whether the guest tells which of its memory is free, so that the host has it back.
    pub report_free_memory: bool,
    /// Places for disks, in [`DISKS`].
    pub disks: u32,
    /// Whether requests of disks go to the host's kernel by rings, where it has them.
    pub disk_rings: bool,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// Whether the guest has a serial console.
    pub console: bool,
}

/// One stream that the guest may open, once, by connecting to `port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Host port.
    pub port: u32,
    /// What the file descriptors beside the message are.
    pub ends: Ends,
}

/// The host's end of a stream, as file descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ends {
    /// One descriptor, read and written (a socket).
    Duplex,
    /// One descriptor that the guest reads from.
    Source,
    /// One descriptor that the guest writes to.
    Sink,
    /// Two descriptors: one that the guest reads from, one that it writes to.
    SourceAndSink,
}

impl Ends {
    /// How many file descriptors go with it.
    pub const fn fd_count(self) -> usize {
        match self {
            Self::Duplex | Self::Source | Self::Sink => 1,
            Self::SourceAndSink => 2,
        }
    }
}

/// What the VMM tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The process is in its jail; its id in the namespace of the shim.
    Jailed {
        /// Process id.
        pid: u32,
    },
    /// The vCPUs run.
    Running,
    /// The host has no rings for disks, which do without.
    NoRings {
        /// Why.
        reason: String,
    },
    /// The guest has connected to the port.
    StreamOpened {
        /// The stream's port.
        port: u32,
    },
    /// The stream is over: everything that the guest sent has been written, or the reader is gone.
    StreamClosed {
        /// The stream's port.
        port: u32,
    },
    /// Where what the guest holds of added memory ends now: it takes nothing behind that and what is
    /// requested. At most ten times a second.
    AddedMemoryEnd {
        /// MiB of the memory file, a multiple of [`ADDED_MIB_STEP`].
        mib: u64,
    },
    /// A disk could not be attached.
    DiskRefused {
        /// Its place, which is as it was.
        place: u32,
        /// Why.
        reason: String,
    },
    /// A disk was taken away and its descriptor is closed.
    DiskDetached {
        /// Its place, which is empty.
        place: u32,
    },
    /// How many vCPUs there are now, or why there is no further one.
    Vcpus(Result<u32, String>),
    /// The VM is gone; the last message.
    Stopped(Stopped),
}

/// Why a VM stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stopped {
    /// The guest reset the machine: an orderly end.
    Reset,
    /// The guest kernel panicked.
    Panic {
        /// The line that says why.
        reason: String,
        /// The end of its log.
        log: String,
    },
    /// Something failed in the VMM: one sentence.
    Failed(String),
}
