//! Network of the guest and of containers with a network namespace of their own.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::sys;

/// Brings the loopback interface of the calling thread's namespace up.
pub fn loopback_up() -> Result<()> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::interface_up(&socket, "lo").context("bring the loopback interface up")
}
