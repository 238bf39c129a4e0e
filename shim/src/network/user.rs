//! A network for a pod that was given none: passt(1), an unprivileged program of the host, carries what the guest's
//! interface sends over sockets of the host's own.
//!
//! It is the other end of the interface's wire, so that neither a namespace nor a tap is needed. It runs
//! under the pod's own user id, in namespaces and behind a system call filter that it makes itself.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control::{self, CONTROL_FD};
use caisson_host::jail;
use caisson_protocol::agent::{ConfigureNetworkRequest, Interface};
use caisson_protocol::config::Config;
use caisson_protocol::publish::Publish;
use caisson_protocol::vmm::{Nic, NicWire};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{AddressMessageBuilder, RouteMessageBuilder};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr};

use super::entries::serialize;
use crate::sandbox::{LAST_WORDS, Sandbox};
use crate::store::Store;

/// The guest's interface. Nobody but the program is on its wire, so every pod has the same.
const INTERFACE: &str = "eth0";
const MAC: [u8; 6] = [0x02, 0xca, 0x15, 0x50, 0x00, 0x01];
/// Its index in the messages to the guest, which has another for it.
const INDEX: u32 = 2;
/// The largest that the program takes: the fewer frames the better.
const MTU: u16 = 65_520;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const PREFIX: u8 = 24;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Where the guest finds the host's resolver.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// From the program's start until it answers.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Room for frames on their way to the program, in bytes.
const ROOM: usize = 4 << 20;
/// Descriptors that the program may have, one for each connection: the ports that they take are the host's.
const DESCRIPTORS: u64 = 8192;
/// The largest frame that may come before the answer.
const LARGEST_FRAME: u32 = 65_535;
/// What an Ethernet frame of ARP over IPv4 has behind its addresses (RFC 826), and which of them it is.
const ARP: [u8; 8] = [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];
/// Bytes of what the program says that are passed on to the log.
const MOST_SAID: usize = 64 << 10;

/// Starts the program and gives the guest its interface. The pod ends when the program does.
///
/// # Errors
/// When the program is not there, or says why it cannot serve: a port is taken, say.
pub async fn connect(config: &Config, store: &Store, sandbox: &Arc<Sandbox>) -> Result<()> {
    let program = &config.network_passt;
    ensure!(program.exists(), "{} does not exist; install the package passt or set network.passt", program.display());
    let (wire, theirs) = UnixStream::pair().context("make a socket")?;
    wire.set_nonblocking(true).context("make a socket")?;
    for end in [&wire, &theirs] {
        // Where that is not allowed there is less of it.
        let _ = setsockopt(end, sockopt::SndBufForce, &ROOM);
    }
    let uid = store.read(|record| record.uid).context("the pod has no user id")?;
    let mut command = Command::new(program);
    command.args(["--foreground", "--quiet", "--fd", &CONTROL_FD.to_string()]).args(arguments(&config.network_publish));
    command.uid(uid).gid(uid).current_dir("/").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    control::pass(&mut command, theirs.as_fd());
    jail::limit_descriptors(&mut command, DESCRIPTORS);
    let child = tokio::process::Command::from(command).kill_on_drop(true).spawn();
    let mut child = child.with_context(|| format!("start {}", program.display()))?;
    drop(theirs);
    let (pid, stderr) = (child.id().context("it has ended")?, child.stderr.take().context("it says nothing")?);
    store.add_process("network", pid)?;
    sandbox.count(&[pid])?;
    let mut wire = tokio::net::UnixStream::from_std(wire).context("watch a socket")?;
    match tokio::time::timeout(TIMEOUT, answers(&mut wire)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => bail!("{} says: {}", program.display(), last_line(stderr).await),
        Err(_) => bail!("{} did not answer within {} s", program.display(), TIMEOUT.as_secs()),
    }
    let nic = Nic { place: 0, mac: MAC, wire: NicWire::Stream, limit: config.network_limit() };
    let wire = wire.into_std().context("hand a socket over")?;
    sandbox.vmm.attach_nic(nic, &[wire.as_fd()] as &[BorrowedFd<'_>]).await?;
    sandbox.agent.configure_network(guests_view()).await.context("configure the guest's network")?;
    tokio::spawn(watch(child, stderr, Arc::clone(sandbox)));
    Ok(())
}

/// What the program is told: addresses as the guest has them, and which ports lead where.
///
/// Nothing leads from the pod to addresses that the host keeps for itself.
fn arguments(publish: &[Publish]) -> Vec<String> {
    let (address, gateway, resolver) = (ADDRESS.to_string(), GATEWAY.to_string(), RESOLVER.to_string());
    let (prefix, mtu) = (PREFIX.to_string(), MTU.to_string());
    let fixed = ["--address", &address, "--netmask", &prefix, "--gateway", &gateway, "--dns-forward", &resolver, "--mtu", &mtu];
    let mut arguments: Vec<String> = fixed.into_iter().chain(["--no-map-gw"]).map(str::to_owned).collect();
    for (option, udp) in [("--tcp-ports", false), ("--udp-ports", true)] {
        let ports: Vec<String> = publish.iter().filter(|publish| publish.udp == udp).map(port).collect();
        let ports = if ports.is_empty() { vec!["none".to_owned()] } else { ports };
        arguments.extend(ports.into_iter().flat_map(|port| [option.to_owned(), port]));
    }
    arguments
}

/// A port as passt(1) has it.
fn port(publish: &Publish) -> String {
    let address = publish.address.map(|address| format!("{address}/")).unwrap_or_default();
    format!("{address}{}:{}", publish.host_port, publish.port)
}

/// Waits until the program answers for the gateway's address, which it does when all is set up.
async fn answers(wire: &mut tokio::net::UnixStream) -> std::io::Result<()> {
    let request = [&[0xff; 6][..], &MAC, &ARP, &REQUEST, &MAC, &ADDRESS.octets(), &[0; 6], &GATEWAY.octets()].concat();
    wire.write_u32(request.len() as u32).await?;
    wire.write_all(&request).await?;
    loop {
        let length = wire.read_u32().await?;
        if length > LARGEST_FRAME {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let mut frame = vec![0; length as usize];
        wire.read_exact(&mut frame).await?;
        // Something else may come first: it advertises itself as a router.
        let is = |from: usize, bytes: &[u8]| frame.get(from..from + bytes.len()) == Some(bytes);
        if is(12, &ARP) && is(20, &REPLY) && is(28, &GATEWAY.octets()) {
            return Ok(());
        }
    }
}

/// What a program that has hung up said last.
async fn last_line(stderr: impl AsyncRead + Unpin) -> String {
    let mut said = Vec::new();
    // Whoever else holds the other end is not waited for.
    let _ = tokio::time::timeout(LAST_WORDS, stderr.take(MOST_SAID as u64).read_to_end(&mut said)).await;
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().rev().find(|line| !line.trim().is_empty() && !is_noise(line));
    last.unwrap_or("nothing").trim().to_owned()
}

/// Whether the program speaks of the host's log, which is not there for everyone.
fn is_noise(line: &str) -> bool {
    line.starts_with("Failed to send ") && line.ends_with(" to syslog")
}

/// The interface, its address and its route, for the guest.
fn guests_view() -> ConfigureNetworkRequest {
    let mut address: AddressMessage = AddressMessageBuilder::<Ipv4Addr>::new().index(INDEX).address(ADDRESS, PREFIX).build();
    address.attributes.push(AddressAttribute::Local(ADDRESS.into()));
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(GATEWAY).output_interface(INDEX).build();
    let interface = Interface {
        place: 0,
        host_index: INDEX,
        name: INTERFACE.into(),
        mtu: MTU.into(),
        mac: MAC.into(),
        up: true,
        ..Interface::default()
    };
    let messages = [RouteNetlinkMessage::NewAddress(address), RouteNetlinkMessage::NewRoute(route)].map(serialize);
    ConfigureNetworkRequest { interfaces: vec![interface], messages: messages.into(), ..ConfigureNetworkRequest::default() }
}

/// Passes on what the program says, and ends the pod when it ends, as with the file server.
async fn watch(mut child: Child, stderr: ChildStderr, sandbox: Arc<Sandbox>) {
    pass_on(stderr).await;
    let status = child.wait().await;
    // It ends with a monitor that ends, and then it is the monitor that knows why.
    if tokio::time::timeout(LAST_WORDS, sandbox.ended().wait_for(Option::is_some)).await.is_err() {
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        sandbox.kill(&format!("the program of its network ended: {how}"));
    }
}

/// Reads all that the program says, so that it never waits, and has the first of it in the log.
async fn pass_on(mut stderr: impl AsyncRead + Unpin) {
    let mut buffer = [0; 4096];
    let mut rest = MOST_SAID;
    while let Ok(length @ 1..) = stderr.read(&mut buffer).await {
        let said = String::from_utf8_lossy(&buffer[..length.min(rest)]);
        said.lines().filter(|line| !is_noise(line)).for_each(|line| log::info!("the pod's network says: {line:?}"));
        rest = rest.saturating_sub(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_published_leads_into_the_pod() {
        let ports = |publish: &[Publish]| arguments(publish).into_iter().skip_while(|text| text != "--tcp-ports").collect::<Vec<_>>();
        assert_eq!(ports(&[]), ["--tcp-ports", "none", "--udp-ports", "none"]);
        let publish = ["8080:80", "127.0.0.1:8443:443", "[::1]:53:53/udp"].map(|text| text.parse().unwrap());
        assert_eq!(ports(&publish), ["--tcp-ports", "8080:80", "--tcp-ports", "127.0.0.1/8443:443", "--udp-ports", "::1/53:53"]);
    }

    #[test]
    fn the_last_line_is_what_a_program_failed_of() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let said = b"Port 1 is taken\nFailed to send 9 bytes to syslog\n\n\xff";
        assert_eq!(runtime.block_on(last_line(&said[..])), "\u{fffd}");
        assert_eq!(runtime.block_on(last_line(&said[..said.len() - 1])), "Port 1 is taken");
        assert_eq!(runtime.block_on(last_line(&b""[..])), "nothing");
    }

    #[test]
    fn whatever_a_program_says_is_read() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut said: &[u8] = &vec![0xff; 3 * MOST_SAID];
        runtime.block_on(pass_on(&mut said));
        assert!(said.is_empty());
    }

    #[test]
    fn an_answer_is_waited_for_whatever_comes_before() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
            let other = [&[0, 0, 0, 20][..], &[7; 20]].concat();
            theirs.write_all(&other).await.unwrap();
            let mut arp = async |kind: [u8; 2]| {
                let frame = [&[0, 0, 0, 42][..], &[1; 12], &ARP, &kind, &[9; 6], &GATEWAY.octets(), &[0; 10]].concat();
                theirs.write_all(&frame).await.unwrap();
            };
            // One that asks answers nothing.
            arp(REQUEST).await;
            arp(REPLY).await;
            answers(&mut ours).await.unwrap();
            let mut asked = [0; 46];
            theirs.read_exact(&mut asked).await.unwrap();
            assert_eq!((&asked[..4], &asked[16..18], &asked[42..]), (&[0, 0, 0, 42][..], &[8, 6][..], &[10, 0, 2, 2][..]));
            // One that ends does not answer, nor one whose frames are no frames.
            theirs.write_all(&[0, 1, 0, 0]).await.unwrap();
            assert_eq!(answers(&mut ours).await.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
            drop(theirs);
            assert!(answers(&mut ours).await.is_err());
        });
    }
}
