//! The pod's network: what CNI plugins made in its network namespace, for the guest.
//!
//! ```text
//! veth (or macvlan, ...) ──ingress──► redirect ──► tap ──► VMM ──► the guest's interface
//!                        ◄── redirect ◄──ingress── tap ◄──
//! ```
//!
//! Beside each interface of the namespace there is a tap, and traffic control hands every frame from
//! one to the other, so that any plugin works unchanged (`join.rs`, with another way). Addresses, routes, rules and fixed
//! neighbours are read by rtnetlink(7) and replayed in the guest as they are. [`Network::sync`]
//! brings the guest up to date; it is run at the start and whenever the namespace changes.

mod entries;
mod forward;
mod join;
mod netns;
mod steer;
pub mod user;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::agent::{ConfigureNetworkRequest, Interface};
use caisson_protocol::config::{Config, Join};
use caisson_protocol::record::NetworkRecord;
use caisson_protocol::vmm::{NIC_PAIRS, NICS, Nic, NicWire, RateLimit};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{IpVersion, MulticastGroup, RouteMessageBuilder};

use self::entries::{changes, depends_only_on, is_fixed_neighbour, is_kept_when_down, is_own_rule, replayed_address, replayed_route};
use self::forward::Forward;
use self::join::TAP;
use self::netns::Netns;
use crate::sandbox::Sandbox;
use crate::store::Store;

/// For changes that come together, as when a plugin works on an interface.
const SETTLE: Duration = Duration::from_millis(50);
/// From a change that could not be followed to the next try.
const RETRY: Duration = Duration::from_secs(5);
/// The most routes, addresses and such that are replayed; a message to the agent has its bounds.
const MAX_ENTRIES: usize = 4096;

/// The network of a pod that has one.
pub struct Network {
    netns: Netns,
    path: PathBuf,
    handle: rtnetlink::Handle,
    /// So many pairs of queues of each interface the host's kernel is to serve where it can; none with 0.
    pairs: u32,
    limit: RateLimit,
    join: Join,
    known: tokio::sync::Mutex<Known>,
}

/// What the guest has been given.
#[derive(Default)]
struct Known {
    /// What the guest has, by index in the namespace.
    attached: BTreeMap<u32, Attached>,
    /// How many taps there were: each has a name of its own, as an old one goes when the monitor lets go of it.
    taps_made: u32,
    /// Indexes of our taps.
    taps: Vec<u32>,
    /// What it may have of addresses, routes, rules and neighbours.
    entries: Vec<RouteNetlinkMessage>,
    /// Whether it may lack some of them: a request failed half way.
    in_doubt: bool,
}

/// An interface that the machine has.
struct Attached {
    /// As the guest was told of it last; `None` until then.
    told: Option<Link>,
    place: u32,
    /// Index of the tap beside it.
    tap: u32,
}

impl Network {
    /// The network in the namespace that `path` names. The host's kernel serves its interfaces where the configuration says so
    /// and sets no limit, of which that knows nothing.
    ///
    /// # Errors
    /// When it cannot be opened, or is the host's own.
    pub fn open(path: &Path, config: &Config) -> Result<Self> {
        let Some(netns) = Netns::open(path)? else {
            bail!("the network namespace {} is the host's own, which a virtual machine cannot share", path.display());
        };
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns.run(|| {
            let _inside = runtime.enter();
            rtnetlink::new_connection().context("open a netlink socket")
        })?;
        tokio::spawn(connection);
        let limit = config.network_limit();
        let pairs = if config.network_vhost && limit.is_none() { config.vcpus.min(NIC_PAIRS) } else { 0 };
        let (path, join) = (path.to_owned(), config.network_join);
        Ok(Self { netns, path, handle, pairs, limit, join, known: tokio::sync::Mutex::default() })
    }

    /// Attaches interfaces that are new and up, takes those away that are gone, and tells the guest of every change of one,
    /// and of every address, route, rule and neighbour that is new or gone.
    ///
    /// # Errors
    /// What could not be set up or was refused, by name.
    pub async fn sync(&self, sandbox: &Sandbox, store: &Store) -> Result<()> {
        let mut known = self.known.lock().await;
        let links: Vec<LinkMessage> = collect(self.handle.link().get().execute(), "interfaces").await?;
        remove_gone(&links, &mut known, sandbox, &self.handle).await?;
        known.taps.retain(|tap| links.iter().any(|link| link.header.index == *tap));
        let mut request = ConfigureNetworkRequest::default();
        let (mut told, mut brought_down) = (Vec::new(), Vec::new());
        for link in links.iter().filter(|link| link.header.link_layer_type == LinkLayerType::Ether) {
            if known.taps.contains(&link.header.index) {
                continue;
            }
            // One that has never been up is not ready.
            if !link.header.flags.contains(LinkFlags::Up) && !known.attached.contains_key(&link.header.index) {
                continue;
            }
            let link = Link::read(link)?;
            if !known.attached.contains_key(&link.index) {
                self.attach(&link, &mut known, sandbox, store).await.with_context(|| format!("attach interface {}", link.name))?;
            }
            let Some(attached) = known.attached.get(&link.index) else { continue };
            if attached.told.as_ref() == Some(&link) {
                continue;
            }
            self.bring_up(attached.tap, link.mtu).await?;
            // It may be brought down to be renamed.
            if attached.told.as_ref().is_some_and(|told| told.name != link.name || (told.up && !link.up)) {
                brought_down.push(link.index);
            }
            request.interfaces.push(link.describe(attached.place));
            told.push(link);
        }
        let entries = self.entries(&known).await?;
        let is_kept = |entry: &RouteNetlinkMessage| {
            !known.in_doubt && (is_kept_when_down(entry) || depends_only_on(entry, |index| !brought_down.contains(&index)))
        };
        request.messages = changes(&known.entries, &entries, is_kept);
        if request != ConfigureNetworkRequest::default()
            && let Err(error) = sandbox.agent.configure_network(request).await
        {
            // It is told everything again: some of it was done.
            for link in &told {
                known.attached.entry(link.index).and_modify(|attached| attached.told = None);
            }
            let new: Vec<_> = entries.into_iter().filter(|entry| !known.entries.contains(entry)).collect();
            known.entries.extend(new);
            known.in_doubt = true;
            return Err(error).context("configure the guest's network");
        }
        for link in told {
            if let Some(attached) = known.attached.get_mut(&link.index) {
                attached.told = Some(link);
            }
        }
        (known.entries, known.in_doubt) = (entries, false);
        Ok(())
    }

    async fn attach(&self, link: &Link, known: &mut Known, sandbox: &Sandbox, store: &Store) -> Result<()> {
        let is_free = |place: &u32| !known.attached.values().any(|other| other.place == *place);
        let place = (0..NICS).find(is_free).with_context(|| format!("a pod can have {NICS} of them"))?;
        let name = format!("{TAP}{}", known.taps_made);
        known.taps_made += 1;
        let servers = vhost_net(self.pairs);
        // On record first: the namespace may outlive the pod.
        let inode = self.netns.inode()?;
        let mut interfaces: Vec<u32> = known.attached.keys().copied().collect();
        interfaces.push(link.index);
        store.change(|record| record.network = Some(NetworkRecord { path: self.path.clone(), inode, interfaces }))?;
        let (taps, index) = self.join_tap(link, name, (servers.len() as u32).max(1), &mut known.taps).await?;
        let wire = if servers.is_empty() { NicWire::Tap } else { NicWire::Kernel { pairs: servers.len() as u32 } };
        let nic = Nic { place, mac: link.mac, wire, limit: self.limit };
        let fds: Vec<BorrowedFd<'_>> = taps.iter().chain(&servers).map(File::as_fd).collect();
        sandbox.vmm.attach_nic(nic, &fds).await?;
        known.attached.insert(link.index, Attached { told: None, place, tap: index });
        log::debug!("interface {} is the guest's interface {place}", link.name);
        Ok(())
    }

    /// What the guest is to replay, in an order in which each can be applied after those before it.
    async fn entries(&self, known: &Known) -> Result<Vec<RouteNetlinkMessage>> {
        let addresses: Vec<AddressMessage> = collect(self.handle.address().get().execute(), "addresses").await?;
        let neighbours: Vec<NeighbourMessage> = collect(self.handle.neighbours().get().execute(), "neighbours").await?;
        let (mut routes, mut rules): (Vec<RouteMessage>, Vec<RuleMessage>) = Default::default();
        for (version, route) in [
            (IpVersion::V4, RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()),
            (IpVersion::V6, RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()),
        ] {
            routes.extend(collect(self.handle.route().get(route).execute(), "routes").await?);
            rules.extend(collect(self.handle.rule().get(version).execute(), "rules").await?);
        }
        let has = |index: u32| known.attached.contains_key(&index);
        let mut routes: Vec<RouteMessage> = routes.into_iter().filter_map(|route| replayed_route(route, has)).collect();
        // A gateway must be reachable before a route through it is accepted.
        routes.sort_by_key(|route| route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_))));
        let entries: Vec<RouteNetlinkMessage> = (addresses.into_iter().filter_map(|address| replayed_address(address, has)))
            .map(RouteNetlinkMessage::NewAddress)
            .chain(routes.into_iter().map(RouteNetlinkMessage::NewRoute))
            .chain(rules.into_iter().filter(is_own_rule).map(RouteNetlinkMessage::NewRule))
            .chain(neighbours.into_iter().filter(|entry| is_fixed_neighbour(entry, has)).map(RouteNetlinkMessage::NewNeighbour))
            .collect();
        ensure!(
            entries.len() <= MAX_ENTRIES,
            "the network has {} addresses, routes and rules; at most {MAX_ENTRIES} are allowed",
            entries.len()
        );
        Ok(entries)
    }

    /// Carries connections that are made within the namespace into the guest, until the machine is
    /// gone. A host that cannot do without it says so in the log.
    pub fn forward(&self, sandbox: Arc<Sandbox>) {
        match Forward::open(&self.netns) {
            Ok(forward) => drop(tokio::spawn(forward.serve(sandbox))),
            Err(error) => log::warn!("connections within the pod's network namespace, as of port-forward, will be refused: {error:#}"),
        }
    }

    /// Follows changes of the namespace until the machine is gone.
    ///
    /// # Errors
    /// When the namespace cannot be listened to.
    pub fn follow(self: &Arc<Self>, sandbox: Arc<Sandbox>, store: Arc<Store>) -> Result<()> {
        const GROUPS: [MulticastGroup; 8] = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        let runtime = tokio::runtime::Handle::current();
        let (connection, _, mut changes) = self.netns.run(|| {
            let _inside = runtime.enter();
            rtnetlink::new_multicast_connection(&GROUPS).context("listen for changes of the network")
        })?;
        tokio::spawn(connection);
        let network = Arc::clone(self);
        tokio::spawn(async move {
            let mut ended = sandbox.ended();
            let mut failed = false;
            loop {
                tokio::select! {
                    _ = ended.wait_for(Option::is_some) => return,
                    change = changes.next() => if change.is_none() { return },
                    () = tokio::time::sleep(RETRY), if failed => {}
                }
                tokio::time::sleep(SETTLE).await;
                while changes.next().now_or_never().flatten().is_some() {}
                let outcome = network.sync(&sandbox, &store).await;
                if let (Err(error), false) = (&outcome, failed) {
                    log::warn!("follow a change of the pod's network: {error:#}");
                }
                failed = outcome.is_err();
            }
        });
        Ok(())
    }
}

/// The kernel's servers for the pairs of an interface's queues; none where the host has none.
fn vhost_net(pairs: u32) -> Vec<File> {
    let opened = (0..pairs).map(|_| File::options().read(true).write(true).open("/dev/vhost-net")).collect::<io::Result<_>>();
    opened.inspect_err(|error| log::debug!("/dev/vhost-net: {error}; the monitor serves the interface itself")).unwrap_or_default()
}

/// The network namespace of a process, when something was put into it beside the loopback interface.
pub fn filled_namespace(pid: u32) -> Option<PathBuf> {
    let process = Path::new("/proc").join(pid.to_string());
    let devices = std::fs::read_to_string(process.join("net/dev")).ok()?;
    // Two lines of headings, and the loopback interface.
    (devices.lines().count() > 3).then(|| process.join("ns/net"))
}

/// Takes off a namespace what a pod's network put there; what is gone already is no error.
///
/// # Errors
/// When the namespace is there and cannot be worked in.
pub fn undo(record: &NetworkRecord) -> Result<()> {
    // It is gone with its pod, as a rule.
    let Ok(Some(netns)) = Netns::open(&record.path) else { return Ok(()) };
    if netns.inode()? != record.inode {
        return Ok(());
    }
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
            tokio::spawn(connection);
            join::remove_macvtaps(&handle).await;
            for index in &record.interfaces {
                let mut request = handle.qdisc().del(index.cast_signed());
                request.message_mut().header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
                // The interface may be gone, or never have got that far.
                let _ = request.execute().await;
            }
            Ok(())
        })
    })
}

/// Takes interfaces away that are gone.
async fn remove_gone(links: &[LinkMessage], known: &mut Known, sandbox: &Sandbox, handle: &rtnetlink::Handle) -> Result<()> {
    let Known { attached, entries, .. } = known;
    let gone: BTreeMap<u32, u32> = attached
        .iter()
        .filter(|(index, _)| !links.iter().any(|link| link.header.index == **index))
        .map(|(index, interface)| (*index, interface.place))
        .collect();
    if gone.is_empty() {
        return Ok(());
    }
    // Other taps go with their last descriptor; this one stays on an interface that was moved to another namespace.
    let macvtaps = links.iter().filter(|link| join::is_our_macvtap(link)).map(|link| link.header.index);
    for tap in macvtaps.filter(|tap| attached.iter().any(|(index, interface)| gone.contains_key(index) && interface.tap == *tap)) {
        handle.link().del(tap).execute().await.context("take a macvtap away")?;
    }
    // What the guest does not let go of it is asked again.
    let request = ConfigureNetworkRequest { removed: gone.keys().copied().collect(), ..ConfigureNetworkRequest::default() };
    sandbox.agent.configure_network(request).await.context("take interfaces out of the guest")?;
    attached.retain(|index, _| !gone.contains_key(index));
    // With an interface goes what depends on it.
    entries.retain(|entry| depends_only_on(entry, |index| attached.contains_key(&index)));
    for place in gone.into_values() {
        sandbox.vmm.detach_nic(place).await?;
    }
    Ok(())
}

/// An interface of the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: [u8; 6],
    mtu: u16,
    up: bool,
}

impl Link {
    fn read(message: &LinkMessage) -> Result<Self> {
        let (mut name, mut mac, mut mtu) = (None, None, None);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text.clone()),
                LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
                _ => {}
            }
        }
        let name = name.with_context(|| format!("interface {}: it has no name", message.header.index))?;
        let mac = mac.with_context(|| format!("interface {name}: it has no Ethernet address"))?;
        let mtu = u16::try_from(mtu.unwrap_or(1500)).with_context(|| format!("interface {name}: its MTU is over 65535"))?;
        Ok(Self { index: message.header.index, name, mac, mtu, up: message.header.flags.contains(LinkFlags::Up) })
    }

    /// As the guest is told of it.
    fn describe(&self, place: u32) -> Interface {
        let (mtu, mac) = (u32::from(self.mtu), self.mac.to_vec());
        Interface { place, host_index: self.index, name: self.name.clone(), mtu, mac, up: self.up, ..Interface::default() }
    }
}

async fn collect<T>(stream: impl Stream<Item = Result<T, rtnetlink::Error>>, what: &str) -> Result<Vec<T>> {
    stream.try_collect().await.with_context(|| format!("read the {what} of the pod's network namespace"))
}
