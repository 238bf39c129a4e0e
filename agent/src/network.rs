//! Network of the guest and of containers with a network namespace of their own.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::Pid;

use crate::sys;

/// Brings the loopback interface of the calling thread's namespace up.
pub fn loopback_up() -> Result<()> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::interface_up(&socket, "lo").context("bring the loopback interface up")
}

/// Brings the loopback interface of a process's namespace up.
pub fn loopback_up_in(pid: Pid) -> Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).context("open the container's network namespace")?;
    // A thread of its own: it does not come back out of the namespace.
    let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the container's network namespace")?;
        loopback_up()
    })?;
    thread.join().map_err(|_| anyhow::anyhow!("the thread in the container's network namespace ended"))?
}
