//! Network of the guest, and of containers with a network namespace of their own.
//!
//! The host attaches an interface to an empty place of the machine and says so; the kernel looked at
//! that place when it started and found nothing (virtio 1.2, 4.2.2), so it is made to look again.
//! Addresses, routes and the like come as the rtnetlink(7) messages that would make them on the
//! host; they are replayed as they are, but for the indexes of interfaces, which differ here
//! (docs/decisions/007 says why no netlink library does it).

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::agent::{ConfigureNetworkRequest, Interface};
use caisson_protocol::guest::FIRST_NIC_DEVICE;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use tokio::net::TcpStream;

use crate::{machine, streams, sys};

/// The loopback interface has this index everywhere.
const LOOPBACK: u32 = 1;
/// For a program of the guest to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of `struct nlmsghdr` (netlink(7)), and of an answer that is read.
const HEADER: usize = 16;
const ANSWER: usize = 4096;
/// Bytes of `struct rtmsg` and `struct rtnexthop` (rtnetlink(7)).
const ROUTE_HEADER: usize = 12;
const NEXT_HOP: usize = 8;

/// Brings the loopback interface of the calling thread's namespace up.
pub fn loopback_up() -> Result<()> {
    sys::set_interface_up(&socket_of_interfaces()?, "lo", true).context("bring the loopback interface up")
}

/// The guest's interfaces, by the indexes that they have on the host.
#[derive(Default)]
pub struct Network(HashMap<u32, Nic>);

/// An interface: its index and name here, the number of its device.
struct Nic {
    index: u32,
    name: String,
    device: u32,
}

impl Network {
    /// Removes interfaces, makes others what they are on the host, and applies messages, in order. What cannot be done keeps
    /// nothing else from being done.
    ///
    /// # Errors
    /// The first that could not be done, and why.
    pub fn configure(&mut self, request: ConfigureNetworkRequest) -> Result<()> {
        let mut outcome = Ok(());
        let mut note = |done: Result<()>| outcome = std::mem::replace(&mut outcome, Ok(())).and(done);
        for index in &request.removed {
            if let Some(nic) = self.0.get(index) {
                match machine::forget_device(nic.device).with_context(|| format!("remove interface {}", nic.name)) {
                    Ok(()) => drop(self.0.remove(index)),
                    error => note(error),
                }
            }
        }
        // Out of the way first: one may have the name that another had.
        for interface in &request.interfaces {
            if let Some(nic) = self.0.get_mut(&interface.host_index).filter(|nic| nic.name != interface.name) {
                let index = nic.index;
                note(nic.rename(&format!("caisson{index}")).with_context(|| format!("rename interface {}", nic.name)));
            }
        }
        let (known, new): (Vec<_>, Vec<_>) = request.interfaces.iter().partition(|interface| self.0.contains_key(&interface.host_index));
        for interface in known {
            if let Some(nic) = self.0.get_mut(&interface.host_index) {
                note(nic.shape(interface).with_context(|| format!("change interface {}", interface.name)));
            }
        }
        for interface in new {
            match bring_up(interface).with_context(|| format!("bring up interface {}", interface.name)) {
                Ok(nic) => drop(self.0.insert(interface.host_index, nic)),
                Err(error) => note(Err(error)),
            }
        }
        if !request.messages.is_empty() {
            note(self.replay(request.messages));
        }
        outcome
    }

    /// Applies messages of the host.
    fn replay(&self, messages: Vec<Vec<u8>>) -> Result<()> {
        let indexes: HashMap<u32, u32> = self.0.iter().map(|(host, nic)| (*host, nic.index)).chain([(LOOPBACK, LOOPBACK)]).collect();
        let kernel = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
            .context("open a netlink socket")?;
        messages.into_iter().map(|message| replay(&kernel, message, &indexes)).fold(Ok(()), Result::and)
    }
}

fn socket_of_interfaces() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

impl Nic {
    /// Makes it what the host's is.
    fn shape(&mut self, interface: &Interface) -> Result<()> {
        if self.name != interface.name {
            self.rename(&interface.name).context("name it")?;
        }
        let (socket, name) = (socket_of_interfaces()?, &self.name);
        let mtu = i32::try_from(interface.mtu).with_context(|| format!("an MTU of {} is too large", interface.mtu))?;
        sys::set_mtu(&socket, name, mtu).with_context(|| format!("set its MTU to {mtu}"))?;
        let mac = <[u8; 6]>::try_from(interface.mac.as_slice()).context("its address is not one of 6 bytes")?;
        sys::set_mac(&socket, name, mac).context("set its address")?;
        sys::set_interface_up(&socket, name, interface.up).context("bring it up or down")
    }

    /// Gives it another name; kernels before 6.2 rename only what is down, and it stays so.
    fn rename(&mut self, name: &str) -> Result<()> {
        let socket = socket_of_interfaces()?;
        let is_up = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
        match sys::rename_interface(&socket, &self.name, name) {
            Err(error) if is_up(&error) => {
                sys::set_interface_up(&socket, &self.name, false)?;
                sys::rename_interface(&socket, &self.name, name)?;
            }
            outcome => outcome?,
        }
        self.name = name.to_owned();
        Ok(())
    }
}

/// Connects to a TCP address here, and that with a port of the host, both ways until both have ended.
///
/// Of the two loopback addresses either will do: the caller cannot know which one a server listens on.
///
/// # Errors
/// When nobody listens at the address.
pub async fn forward(target: &str, port: u32) -> Result<()> {
    let address: SocketAddr = target.parse().with_context(|| format!("read the address {target:?}"))?;
    let mut addresses = vec![address];
    if address.ip() == Ipv4Addr::LOCALHOST {
        addresses.push((Ipv6Addr::LOCALHOST, address.port()).into());
    }
    let connect = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(addresses.as_slice())).await;
    let mut inside =
        connect.context("it did not answer").and_then(|stream| Ok(stream?)).with_context(|| format!("connect to {address}"))?;
    let mut outside = streams::connect(port).and_then(streams::into_async).context("connect to the host")?;
    tokio::spawn(async move {
        // Either side may break off; the other hears of it by its connection's end.
        let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
    });
    Ok(())
}

/// Makes the kernel find an interface, and brings it up under its name.
fn bring_up(interface: &Interface) -> Result<Nic> {
    let device = FIRST_NIC_DEVICE.saturating_add(interface.place);
    machine::find_device(device)?;
    // Its place can be tried again, then.
    name(device, interface).inspect_err(|_| drop(machine::forget_device(device)))
}

/// Finds an interface by its device, and makes it what the host's is.
fn name(device: u32, interface: &Interface) -> Result<Nic> {
    let found = machine::class_dir(device, "net").context("find it")?;
    let name = found.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let index = std::fs::read_to_string(found.join("ifindex")).context("read its index")?.trim().parse().context("read its index")?;
    let mut nic = Nic { index, name, device };
    nic.shape(interface)?;
    Ok(nic)
}

/// What a message of the host does: its type, its words for an error, and whether it adds.
const KINDS: [(u16, &str, bool); 8] = [
    (libc::RTM_NEWADDR, "add an address", true),
    (libc::RTM_DELADDR, "remove an address", false),
    (libc::RTM_NEWROUTE, "add a route", true),
    (libc::RTM_DELROUTE, "remove a route", false),
    (libc::RTM_NEWRULE, "add a routing rule", true),
    (libc::RTM_DELRULE, "remove a routing rule", false),
    (libc::RTM_NEWNEIGH, "add a neighbour", true),
    (libc::RTM_DELNEIGH, "remove a neighbour", false),
];

/// Applies one message of the host and waits for the kernel's answer.
fn replay(kernel: &OwnedFd, mut message: Vec<u8>, indexes: &HashMap<u32, u32>) -> Result<()> {
    ensure!(message.len() >= HEADER, "a netlink message is shorter than its header");
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    let (_, what, adds) =
        KINDS.iter().find(|(number, ..)| *number == kind).with_context(|| format!("netlink messages of type {kind} are not replayed"))?;
    translate(kind, &mut message[HEADER..], indexes).context(*what)?;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | if *adds { libc::NLM_F_CREATE | libc::NLM_F_EXCL } else { 0 };
    message[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
    send(kernel.as_raw_fd(), &message, MsgFlags::empty()).context(*what)?;
    let mut answer = [0; ANSWER];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty()).context(*what)?;
    // `struct nlmsgerr`: a negative error number, 0 for none.
    let error = answer[..length].get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    match Errno::from_raw(error.saturating_neg()) {
        _ if error == 0 => Ok(()),
        // It is so already.
        Errno::EEXIST if *adds => Ok(()),
        Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL if !*adds => Ok(()),
        errno => Err(errno).with_context(|| format!("{what} of the host")),
    }
}

/// Puts the guest's indexes in the place of the host's.
fn translate(kind: u16, body: &mut [u8], indexes: &HashMap<u32, u32>) -> Result<()> {
    let guest = |place: Option<&mut [u8]>| -> Result<()> {
        let place = place.context("it is too short")?;
        let host = u32::from_ne_bytes(<[u8; 4]>::try_from(&*place).context("it is too short")?);
        let index = indexes.get(&host).with_context(|| format!("interface {host} of the host is not here"))?;
        place.copy_from_slice(&index.to_ne_bytes());
        Ok(())
    };
    match kind {
        // `ifa_index` and `ndm_ifindex` are at the same place.
        libc::RTM_NEWADDR | libc::RTM_DELADDR | libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => guest(body.get_mut(4..8)),
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => for_each(body.get_mut(ROUTE_HEADER..).context("it is too short")?, 4, |attribute| {
            let (header, value) = attribute.split_at_mut(4);
            match u16::from_ne_bytes([header[2], header[3]]) {
                libc::RTA_OIF | libc::RTA_IIF => guest(value.get_mut(..4)),
                libc::RTA_MULTIPATH => for_each(value, NEXT_HOP, |hop| guest(hop.get_mut(4..8))),
                _ => Ok(()),
            }
        }),
        // Rules name interfaces.
        _ => Ok(()),
    }
}

/// Visits the parts of a list, each of which begins with its length in two bytes and is aligned to
/// four (`struct rtattr`, `struct rtnexthop`).
fn for_each(mut list: &mut [u8], least: usize, mut visit: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
    while list.len() >= least {
        let length = usize::from(u16::from_ne_bytes([list[0], list[1]]));
        if length < least || length > list.len() {
            bail!("an attribute says that it has {length} bytes");
        }
        let (part, rest) = std::mem::take(&mut list).split_at_mut(length);
        visit(part)?;
        let padding = length.next_multiple_of(4) - length;
        list = rest.get_mut(padding..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indexes() -> HashMap<u32, u32> {
        HashMap::from([(1, 1), (20, 3)])
    }

    /// An attribute with its padding.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn indexes_of_the_host_become_those_of_the_guest() {
        let mut address = [2, 24, 0, 0, 20, 0, 0, 0];
        translate(libc::RTM_NEWADDR, &mut address, &indexes()).unwrap();
        assert_eq!(address, [2, 24, 0, 0, 3, 0, 0, 0]);

        let hop = |index: u8| vec![8, 0, 0, 0, index, 0, 0, 0];
        let route = |index: u8| {
            let parts = [vec![0; ROUTE_HEADER], attribute(1, &[9; 5]), attribute(libc::RTA_OIF, &[index, 0, 0, 0])];
            [parts.concat(), attribute(libc::RTA_MULTIPATH, &[hop(index), hop(1)].concat())].concat()
        };
        let mut message = route(20);
        translate(libc::RTM_NEWROUTE, &mut message, &indexes()).unwrap();
        assert_eq!(message, route(3));
    }

    #[test]
    fn an_interface_that_is_not_here_and_a_broken_message_are_errors() {
        let error = translate(libc::RTM_NEWADDR, &mut [2, 24, 0, 0, 21, 0, 0, 0], &indexes()).unwrap_err();
        assert!(error.to_string().contains("interface 21"), "{error}");
        let mut broken = [vec![0; ROUTE_HEADER], vec![200, 0, 4, 0]].concat();
        assert!(translate(libc::RTM_NEWROUTE, &mut broken, &indexes()).is_err());
        assert!(translate(libc::RTM_NEWADDR, &mut [0; 3], &indexes()).is_err());
    }
}
