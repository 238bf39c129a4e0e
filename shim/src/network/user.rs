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
use caisson_protocol::agent::{ConfigureNetworkRequest, Interface};
use caisson_protocol::config::Config;
use caisson_protocol::publish::Publish;
use caisson_protocol::vmm::Nic;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{AddressMessageBuilder, RouteMessageBuilder};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr};

use super::serialize;
use crate::sandbox::{Sandbox, count_for_pod};
use crate::spec::Spec;
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
/// Ethernet frames of ARP over IPv4 (RFC 826), after the length that comes before each on the wire.
const ARP: [u8; 10] = [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1];

/// Starts the program and gives the guest its interface. The pod ends when the program does.
///
/// # Errors
/// When the program is not there, or says why it cannot serve: a port is taken, say.
pub async fn connect(config: &Config, store: &Store, spec: &Spec, sandbox: &Arc<Sandbox>) -> Result<()> {
    let program = &config.network_passt;
    ensure!(program.exists(), "{} does not exist; install the package passt or set network.passt", program.display());
    let (wire, theirs) = UnixStream::pair().context("make a socket")?;
    wire.set_nonblocking(true).context("make a socket")?;
    for end in [&wire, &theirs] {
        // Where that is not allowed there is less of it.
        let _ = setsockopt(end, sockopt::SndBufForce, &ROOM);
    }
    let mut uid = None;
    store.read(|record| uid = record.uid);
    let uid = uid.context("the pod has no user id")?;
    let mut command = Command::new(program);
    command.args(["--foreground", "--quiet", "--fd", &CONTROL_FD.to_string()]).args(arguments(&config.network_publish));
    command.uid(uid).gid(uid).current_dir("/").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    control::pass(&mut command, theirs.as_fd());
    let child = tokio::process::Command::from(command).kill_on_drop(true).spawn();
    let mut child = child.with_context(|| format!("start {}", program.display()))?;
    drop(theirs);
    let (pid, stderr) = (child.id().context("it has ended")?, child.stderr.take().context("it says nothing")?);
    store.add_process("network", pid)?;
    count_for_pod(store, spec, &[pid]).await?;
    let stderr = BufReader::new(stderr);
    let mut wire = tokio::net::UnixStream::from_std(wire).context("watch a socket")?;
    let answered = tokio::select! {
        answered = tokio::time::timeout(TIMEOUT, answers(&mut wire)) => answered.is_ok_and(|answer| answer.is_ok()),
        _ = child.wait() => false,
    };
    if !answered {
        bail!("{} {}", program.display(), why(&mut child, stderr).await);
    }
    let nic = Nic { place: 0, mac: MAC, stream: true, vhost: false, limit: config.network_limit() };
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
    let request = [&[0xff; 6][..], &MAC, &ARP, &MAC, &ADDRESS.octets(), &[0; 6], &GATEWAY.octets()].concat();
    wire.write_u32(request.len() as u32).await?;
    wire.write_all(&request).await?;
    loop {
        let length = wire.read_u32().await?;
        let mut frame = Vec::new();
        wire.take(length.into()).read_to_end(&mut frame).await?;
        // Something else may come first: it advertises itself as a router.
        if frame.get(12..14) == Some(&ARP[..2]) {
            return Ok(());
        }
    }
}

/// Why the program does not serve.
async fn why(child: &mut Child, mut stderr: BufReader<ChildStderr>) -> String {
    if !matches!(child.try_wait(), Ok(Some(_))) {
        let _ = child.kill().await;
        return format!("did not answer within {} s", TIMEOUT.as_secs());
    }
    let mut said = Vec::new();
    // It has ended, so what it said is all there.
    let _ = (&mut stderr).take(64 << 10).read_to_end(&mut said).await;
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().rev().find(|line| !line.trim().is_empty() && !is_noise(line));
    format!("says: {}", last.unwrap_or("nothing").trim())
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
    let interface =
        Interface { place: 0, host_index: INDEX, name: INTERFACE.into(), mtu: MTU.into(), mac: MAC.into(), ..Interface::default() };
    let messages = [RouteNetlinkMessage::NewAddress(address), RouteNetlinkMessage::NewRoute(route)].map(serialize);
    ConfigureNetworkRequest { interfaces: vec![interface], messages: messages.into(), ..ConfigureNetworkRequest::default() }
}

/// Passes on what the program says, and ends the pod when it ends, as with any other of its processes.
async fn watch(mut child: Child, stderr: BufReader<ChildStderr>, sandbox: Arc<Sandbox>) {
    let mut lines = stderr.lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if !is_noise(&line) {
            log::info!("the pod's network says: {line}");
        }
    }
    let status = child.wait().await;
    if sandbox.ended().borrow().is_none() {
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        sandbox.kill(&format!("the program of its network ended: {how}"));
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
    fn an_answer_is_waited_for_whatever_comes_before() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
            let other = [&[0, 0, 0, 20][..], &[7; 20]].concat();
            theirs.write_all(&other).await.unwrap();
            theirs.write_all(&[&[0, 0, 0, 42][..], &[1; 12], &ARP, &[0; 20]].concat()).await.unwrap();
            answers(&mut ours).await.unwrap();
            let mut asked = [0; 46];
            theirs.read_exact(&mut asked).await.unwrap();
            assert_eq!((&asked[..4], &asked[16..18], &asked[42..]), (&[0, 0, 0, 42][..], &[8, 6][..], &[10, 0, 2, 2][..]));
            // One that ends does not answer.
            drop(theirs);
            assert!(answers(&mut ours).await.is_err());
        });
    }
}
