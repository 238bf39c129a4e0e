//! Messages with file descriptors between two of our processes.
//!
//! A control socket is one end of a `SOCK_SEQPACKET` pair (unix(7)): packets keep their borders,
//! descriptors arrive with the packet that they were sent with, and the peer's death reads as the
//! end of the stream. A message is JSON, at most [`MAX_MESSAGE`] bytes with [`MAX_FDS`] descriptors.
#![expect(unsafe_code, reason = "descriptors that arrive by SCM_RIGHTS are raw numbers that we take ownership of")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use caisson_protocol::vmm::{MAX_FDS, MAX_MESSAGE};
use nix::cmsg_space;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect,
    getsockopt, listen, recvmsg, sendmsg, socket, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The descriptor at which a program that the shim starts finds its control socket.
pub const CONTROL_FD: RawFd = 3;

/// One end of a control socket.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Two connected ends, both close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// The end that the shim left at [`CONTROL_FD`]; to be called once, first thing in `main`.
    ///
    /// # Errors
    /// When nothing, or something else than a socket, is open there.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: the descriptor is only borrowed, to see whether it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        // SAFETY: it is open (checked above), and main calls this once, before anything else can own it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
    }

    /// A socket at which others connect, that does not block. A socket's path is short (unix(7)), so its
    /// folder is given open.
    ///
    /// # Errors
    /// The kernel's, as when there is something of that name.
    pub fn listen(folder: impl AsFd, name: &str) -> io::Result<Self> {
        let listener = Self(seqpacket(SockFlag::SOCK_NONBLOCK)?);
        bind(listener.as_raw_fd(), &address(&folder, name)?)?;
        listen(&listener, Backlog::MAXCONN)?;
        Ok(listener)
    }

    /// The next connection to a listening socket.
    ///
    /// # Errors
    /// The kernel's, `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<Self> {
        let fd = accept4(self.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made the descriptor for us; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Connects to a listening socket.
    ///
    /// # Errors
    /// The kernel's, as when the file's permissions forbid it.
    pub fn connect(folder: impl AsFd, name: &str) -> io::Result<Self> {
        let socket = Self(seqpacket(SockFlag::empty())?);
        connect(socket.as_raw_fd(), &address(&folder, name)?)?;
        Ok(socket)
    }

    /// The user at the other end, and its process.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer(&self) -> io::Result<(u32, i32)> {
        let credentials = getsockopt(&self.0, PeerCredentials)?;
        Ok((credentials.uid(), credentials.pid()))
    }

    /// Sends one message; `wait` tells whether to wait when the peer's queue is full.
    ///
    /// # Errors
    /// `InvalidInput` for a message over the limits, `WouldBlock` without `wait`, else the socket's.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>], wait: bool) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "control message of {} bytes and {} descriptors is over the limit of {MAX_MESSAGE} and {MAX_FDS}",
                    bytes.len(),
                    fds.len()
                ),
            ));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let cmsgs = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], cmsgs, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives one message; `None` when the peer is gone.
    ///
    /// # Errors
    /// `InvalidData` for a message that is not what was expected, `WouldBlock` without `wait`.
    pub fn receive<T: DeserializeOwned>(&self, wait: bool) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let (length, truncated, fds) = loop {
            match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), flags) {
                Ok(message) => {
                    let mut fds = Vec::new();
                    for cmsg in message.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(raw) = cmsg {
                            // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    break (message.bytes, message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC), fds);
                }
                Err(nix::Error::EINTR) => {}
                // The peer went without having read all of ours. The kernel says so once, and before
                // it hands out what the peer had sent: its last words.
                Err(nix::Error::ECONNRESET) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        if truncated {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "control message is over the limit"));
        }
        let message = serde_json::from_slice(&buffer[..length]).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, fds)))
    }
}

fn seqpacket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, flags | SockFlag::SOCK_CLOEXEC, None)
}

fn address(folder: impl AsFd, name: &str) -> nix::Result<UnixAddr> {
    UnixAddr::new(format!("/proc/self/fd/{}/{name}", folder.as_fd().as_raw_fd()).as_str())
}

/// Lets a program that `command` starts find `fd` at [`CONTROL_FD`]. `fd` must stay open until
/// the program has been started.
pub fn pass(command: &mut Command, fd: BorrowedFd<'_>) {
    let fd = fd.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe, and touch no memory.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would keep the close-on-exec flag.
            let result = if fd == CONTROL_FD { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, CONTROL_FD) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<Control> for OwnedFd {
    fn from(control: Control) -> Self {
        control.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let (a, b) = Control::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        a.send(&"take this", &[writer.as_fd()], true).unwrap();
        drop(writer);
        let (text, mut fds): (String, _) = b.receive(true).unwrap().unwrap();
        assert_eq!(text, "take this");
        std::fs::File::from(fds.remove(0)).write_all(b"through").unwrap();
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "through");
    }

    #[test]
    fn who_connects_is_known_and_heard() {
        let folder = tempfile::tempdir().unwrap();
        let open = || std::fs::File::open(folder.path()).unwrap();
        let listener = Control::listen(open(), "socket").unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let caller = Control::connect(open(), "socket").unwrap();
        let callee = listener.accept().unwrap();
        assert_eq!(callee.peer().unwrap().1, std::process::id().cast_signed());
        caller.send(&"hello", &[], true).unwrap();
        assert_eq!(callee.receive::<String>(true).unwrap().unwrap().0, "hello");
        assert!(Control::listen(open(), "socket").is_err());
    }

    #[test]
    fn a_dead_peer_reads_as_the_end() {
        let (a, b) = Control::pair().unwrap();
        drop(a);
        assert!(b.receive::<String>(true).unwrap().is_none());
    }

    #[test]
    fn the_last_words_of_a_peer_that_left_ours_unread_are_heard() {
        let (a, b) = Control::pair().unwrap();
        b.send(&"unread", &[], true).unwrap();
        a.send(&"last words", &[], true).unwrap();
        drop(a);
        assert_eq!(b.receive::<String>(false).unwrap().unwrap().0, "last words");
        assert!(b.receive::<String>(false).unwrap().is_none());
    }

    #[test]
    fn what_is_over_the_limit_is_refused() {
        let (a, _b) = Control::pair().unwrap();
        assert_eq!(a.send(&"x".repeat(MAX_MESSAGE), &[], true).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        let (a, b) = Control::pair().unwrap();
        nix::sys::socket::send(a.as_raw_fd(), b"{\"no\":", MsgFlags::empty()).unwrap();
        assert_eq!(b.receive::<String>(true).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
