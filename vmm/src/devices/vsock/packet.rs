//! The header of a vsock packet (virtio 1.2, 5.10.6).

use vm_memory::ByteValued;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;
/// The most bytes of payload in a packet that the guest sends (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Operations (5.10.6).
pub mod op {
    /// Connect.
    pub const REQUEST: u16 = 1;
    /// Connected.
    pub const RESPONSE: u16 = 2;
    /// There is no such connection any more.
    pub const RST: u16 = 3;
    /// One side or both will not send or receive any more.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Room for more.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Is there room for more?
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`] (5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`, little endian, without padding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// [`TYPE_STREAM`].
    pub type_: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

#[expect(unsafe_code, reason = "the header is read from and written to guest memory as it is")]
// SAFETY: integers only, packed, so every bit pattern is a value and there is no padding.
unsafe impl ByteValued for Header {}

const _: () = assert!(size_of::<Header>() == 44);
