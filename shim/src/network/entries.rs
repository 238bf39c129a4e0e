//! What the guest replays of the namespace: addresses, routes, rules and fixed neighbours, as rtnetlink(7) has them.

use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::neighbour::{NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

/// The loopback interface has this index in every namespace.
const LOOPBACK: u32 = 1;
/// The routing table of a host's own addresses (`RT_TABLE_LOCAL`), which the guest's kernel fills by itself.
const TABLE_LOCAL: u8 = 255;
/// Rules that every namespace has: local, main, default (ip-rule(8)).
const USUAL_RULES: [u32; 3] = [0, 32_766, 32_767];

/// Whether all interfaces that an entry names are there.
pub fn depends_only_on(entry: &RouteNetlinkMessage, has: impl Fn(u32) -> bool) -> bool {
    match entry {
        RouteNetlinkMessage::NewAddress(address) => has(address.header.index),
        RouteNetlinkMessage::NewNeighbour(neighbour) => has(neighbour.header.ifindex),
        RouteNetlinkMessage::NewRoute(route) => replayed_route(route.clone(), has).is_some(),
        _ => true,
    }
}

/// Whether the kernel leaves an entry alone when an interface of it is brought down, as it does with addresses of IPv4 and routes
/// that have another way.
pub fn is_kept_when_down(entry: &RouteNetlinkMessage) -> bool {
    match entry {
        RouteNetlinkMessage::NewAddress(address) => address.header.family == AddressFamily::Inet,
        RouteNetlinkMessage::NewRoute(route) => route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::MultiPath(_))),
        _ => false,
    }
}

/// An address as the guest is to have it; `None` for one that its kernel makes by itself.
pub fn replayed_address(mut message: AddressMessage, has: impl Fn(u32) -> bool) -> Option<AddressMessage> {
    let v6 = message.header.family == AddressFamily::Inet6;
    if !has(message.header.index) || (v6 && message.header.scope == AddressScope::Link) {
        return None;
    }
    // Ages differ each time that they are read; and a label is the interface's name, unless somebody has given it another.
    message.attributes.retain(|attribute| match attribute {
        AddressAttribute::CacheInfo(_) => false,
        AddressAttribute::Label(label) => label.contains(':'),
        _ => true,
    });
    if v6 {
        // It is ours already: looking for another owner would only delay it.
        message.header.flags |= AddressHeaderFlags::Nodad;
        message.header.flags.remove(AddressHeaderFlags::Tentative);
        for attribute in &mut message.attributes {
            if let AddressAttribute::Flags(flags) = attribute {
                flags.insert(AddressFlags::Nodad);
                flags.remove(AddressFlags::Tentative);
            }
        }
    }
    Some(message)
}

/// A route as the guest is to have it; `None` for one that its kernel makes by itself, or that
/// leads through an interface that it does not have.
pub fn replayed_route(mut message: RouteMessage, has: impl Fn(u32) -> bool) -> Option<RouteMessage> {
    let header = &message.header;
    let kind =
        matches!(header.kind, RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw);
    let made = matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    if !kind || made || header.table == TABLE_LOCAL || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    // What the kernel says of an interface's state is refused when it is told so.
    message.header.flags &= RouteFlags::Onlink;
    for attribute in &mut message.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            hops.iter_mut().for_each(|hop| hop.flags &= RouteNextHopFlags::Onlink);
        }
    }
    let through = |index: u32| index == LOOPBACK || has(index);
    let reachable = message.attributes.iter().all(|attribute| match attribute {
        RouteAttribute::Oif(index) => through(*index),
        RouteAttribute::MultiPath(hops) => hops.iter().all(|hop| through(hop.interface_index)),
        _ => true,
    });
    reachable.then_some(message)
}

/// Whether a rule is one that not every namespace has.
pub fn is_own_rule(message: &RuleMessage) -> bool {
    let priority = message.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    !USUAL_RULES.contains(&priority.unwrap_or(0))
}

/// Whether a neighbour is one that somebody has set, of an interface that is there.
pub fn is_fixed_neighbour(message: &NeighbourMessage, has: impl Fn(u32) -> bool) -> bool {
    message.header.state == NeighbourState::Permanent && has(message.header.ifindex)
}

/// The messages that make `old` into `new`: what is gone first, the last one first. What is in both is made again if the guest
/// may not have kept it.
pub fn changes(old: &[RouteNetlinkMessage], new: &[RouteNetlinkMessage], is_kept: impl Fn(&RouteNetlinkMessage) -> bool) -> Vec<Vec<u8>> {
    let gone = old.iter().rev().filter(|entry| !new.contains(entry)).cloned().map(reverse);
    let come = new.iter().filter(|entry| !old.contains(entry) || !is_kept(entry)).cloned();
    gone.chain(come).map(serialize).collect()
}

/// The message that takes away what another one made.
fn reverse(message: RouteNetlinkMessage) -> RouteNetlinkMessage {
    match message {
        RouteNetlinkMessage::NewAddress(message) => RouteNetlinkMessage::DelAddress(message),
        RouteNetlinkMessage::NewRoute(message) => RouteNetlinkMessage::DelRoute(message),
        RouteNetlinkMessage::NewRule(message) => RouteNetlinkMessage::DelRule(message),
        RouteNetlinkMessage::NewNeighbour(message) => RouteNetlinkMessage::DelNeighbour(message),
        other => other,
    }
}

/// A message as it goes over a socket.
pub fn serialize(message: RouteNetlinkMessage) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;

    fn neighbour(index: u32) -> RouteNetlinkMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = index;
        RouteNetlinkMessage::NewNeighbour(message)
    }

    #[test]
    fn what_is_gone_goes_first_and_what_may_be_missing_comes_again() {
        let told = |is_kept| changes(&[neighbour(1), neighbour(2)], &[neighbour(2), neighbour(3)], |_| is_kept);
        let gone = serialize(reverse(neighbour(1)));
        assert_eq!(told(true), [gone.clone(), serialize(neighbour(3))]);
        assert_eq!(told(false), [gone, serialize(neighbour(2)), serialize(neighbour(3))]);
    }

    #[test]
    fn a_route_with_two_ways_is_the_same_when_one_is_down() {
        let route = |flags| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.flags) = (7, flags);
            let mut route = RouteMessage::default();
            route.header.kind = RouteType::Unicast;
            route.attributes.push(RouteAttribute::MultiPath(vec![hop]));
            replayed_route(route, |index| index == 7).unwrap()
        };
        let up = route(RouteNextHopFlags::Onlink);
        assert_eq!(route(RouteNextHopFlags::Onlink | RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown), up);
        assert!(is_kept_when_down(&RouteNetlinkMessage::NewRoute(up)));
    }

    #[test]
    fn the_name_of_an_interface_is_no_label() {
        let labels = |label: &str| {
            let mut address = AddressMessage::default();
            address.attributes.push(AddressAttribute::Label(label.into()));
            replayed_address(address, |_| true).unwrap().attributes.len()
        };
        assert_eq!([labels("eth0"), labels("eth0:1")], [0, 1]);
    }
}
