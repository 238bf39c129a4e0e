//! How frames get from an interface of the namespace to the guest and back.
//!
//! Traffic control redirects them between the interface and a tap beside it, which works with interfaces of any kind. Or a
//! macvtap lies on the interface and takes all that arrives there: a hop less, where the kernel has it for that kind.

use std::fs::File;

use anyhow::{Context, Result};
use caisson_protocol::config::Join;
use futures::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage, MacVtapMode};
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

use super::{Link, Network};

/// Parent of filters on what an interface receives (`TC_H_INGRESS`, tc(8)), and all protocols (`ETH_P_ALL`).
const INGRESS: u32 = 0xffff_0000;
const ALL_PROTOCOLS: u16 = 3u16.to_be();
/// What the names of taps begin with.
pub const TAP: &str = "caisson";

impl Network {
    /// Joins an interface to a new tap of so many queues, each a descriptor; returns the tap's index besides, which is among
    /// `taps` as soon as there is one.
    pub(super) async fn join_tap(&self, link: &Link, name: String, queues: u32, taps: &mut Vec<u32>) -> Result<(Vec<File>, u32)> {
        if self.join == Join::Macvtap {
            match self.add_macvtap(link, &name, queues, taps).await {
                Ok(joined) => return Ok(joined),
                Err(error) => log::warn!("interface {}: no macvtap on it, so it is joined by traffic control: {error:#}", link.name),
            }
        }
        let files = self.netns.make_tap(&name, queues)?;
        let index = self.index_of(name).await?;
        taps.push(index);
        self.bring_up(index, link.mtu).await?;
        self.redirect(link.index, index).await.with_context(|| format!("redirect what arrives at {}", link.name))?;
        self.redirect(index, link.index).await.context("redirect what the guest sends")?;
        Ok((files, index))
    }

    async fn add_macvtap(&self, link: &Link, name: &str, queues: u32, taps: &mut Vec<u32>) -> Result<(Vec<File>, u32)> {
        let made = LinkMacVtap::new(name, link.index, MacVtapMode::Passthrough).build();
        self.handle.link().add(made).execute().await.context("add it")?;
        let index = self.index_of(name.to_owned()).await?;
        taps.push(index);
        let joined = async {
            // Which groups the guest joins nobody hears of.
            let all_groups = LinkUnspec::new_with_index(index).allmulticast(true).build();
            self.handle.link().set(all_groups).execute().await.context("have it take all multicast frames")?;
            self.bring_up(index, link.mtu).await?;
            self.netns.open_macvtap(name, index, queues)
        };
        match joined.await {
            Ok(files) => Ok((files, index)),
            Err(error) => {
                // Two taps cannot have what arrives.
                self.handle.link().del(index).execute().await.context("take it away again")?;
                taps.retain(|tap| *tap != index);
                Err(error)
            }
        }
    }

    async fn index_of(&self, name: String) -> Result<u32> {
        let message = self.handle.link().get().match_name(name).execute().try_next().await.context("find the tap")?;
        Ok(message.context("find the tap")?.header.index)
    }

    /// Brings a tap up, with the MTU of the interface that it is beside.
    pub(super) async fn bring_up(&self, tap: u32, mtu: u16) -> Result<()> {
        let up = LinkUnspec::new_with_index(tap).mtu(u32::from(mtu)).up().build();
        self.handle.link().set(up).execute().await.context("bring the tap up")
    }

    /// Hands every frame that arrives at one interface to another.
    async fn redirect(&self, from: u32, to: u32) -> Result<()> {
        let index = from.cast_signed();
        self.handle.qdisc().add(index).ingress().execute().await.context("add the ingress qdisc")?;
        let filter = self.handle.traffic_filter(index).add().parent(INGRESS).protocol(ALL_PROTOCOLS);
        filter.redirect(to).context("make the filter")?.execute().await.context("add the filter")
    }
}

/// Takes away the macvtaps that a pod has put into the namespace of a netlink socket; unlike other taps they stay when nobody
/// has them open.
pub async fn remove_macvtaps(handle: &Handle) {
    // The namespace may be about to go.
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.unwrap_or_default();
    for link in links.iter().filter(|link| is_our_macvtap(link)) {
        let _ = handle.link().del(link.header.index).execute().await;
    }
}

/// Whether a link is a macvtap that a pod has made.
pub fn is_our_macvtap(link: &LinkMessage) -> bool {
    let has = |wanted: fn(&LinkAttribute) -> bool| link.attributes.iter().any(wanted);
    let is_macvtap = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::MacVtap))),
        _ => false,
    };
    let is_ours = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::IfName(name) => name.strip_prefix(TAP).is_some_and(|number| number.parse::<u32>().is_ok()),
        _ => false,
    };
    has(is_macvtap) && has(is_ours)
}
