//! Ports of the host that lead into a pod, as `network.publish` lists them.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// So many lead into a pod at most.
pub const MOST_PUBLISHED: usize = 64;

/// One port of the host and where in the pod it leads: `[ADDRESS:]HOST-PORT:PORT[/tcp|/udp]`, an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The host's address that listens; all of them without one.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port in the pod.
    pub port: u16,
    /// Datagrams instead of connections.
    pub udp: bool,
}

/// Not of that form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected [ADDRESS:]HOST-PORT:PORT[/tcp|/udp]")]
pub struct BadPublish;

impl FromStr for Publish {
    type Err = BadPublish;

    fn from_str(text: &str) -> Result<Self, BadPublish> {
        let (ports, udp) = match text.split_once('/') {
            None => (text, false),
            Some((ports, "tcp")) => (ports, false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(BadPublish),
        };
        let (rest, port) = ports.rsplit_once(':').ok_or(BadPublish)?;
        let (address, host_port) = match rest.rsplit_once(':') {
            Some((address, host_port)) => (Some(address), host_port),
            None => (None, rest),
        };
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok())?;
        let number = |text: &str| digits(text).filter(|port| *port > 0).ok_or(BadPublish);
        Ok(Self { address: address.map(parse_address).transpose()?, host_port: number(host_port)?, port: number(port)?, udp })
    }
}

fn parse_address(text: &str) -> Result<IpAddr, BadPublish> {
    match text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(inside) => inside.parse::<Ipv6Addr>().map(IpAddr::V6).map_err(|_| BadPublish),
        None => text.parse().ok().filter(IpAddr::is_ipv4).ok_or(BadPublish),
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(out, "[{address}]:")?,
            Some(address) => write!(out, "{address}:")?,
            None => {}
        }
        write!(out, "{}:{}{}", self.host_port, self.port, if self.udp { "/udp" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["8080:80", "127.0.0.1:8080:80", "[::1]:53:53/udp", "1:65535/udp"] {
            assert_eq!(text.parse::<Publish>().unwrap().to_string(), text);
        }
        assert_eq!("8080:80/tcp".parse::<Publish>(), "8080:80".parse());
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in [
            "",
            "80",
            "0:80",
            "80:0",
            "80:65536",
            "a:80:80",
            "::1:80:80",
            "[1.2.3.4]:80:80",
            "80:80/sctp",
            "80:80/udp/tcp",
            "-80:80",
            "80:+80",
        ] {
            assert_eq!(text.parse::<Publish>(), Err(BadPublish), "{text}");
        }
    }
}
