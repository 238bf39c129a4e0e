//! Connections made within the pod's network namespace, as `kubectl port-forward` makes them through
//! containerd: they are taken by two listeners and carried to the same address in the guest.
//!
//! The accepted socket itself goes to the VMM as one end of a vsock stream, so not a byte passes
//! through the shim.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Linger;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::netns::Netns;
use super::steer::{Steering, steer};
use crate::sandbox::Sandbox;

/// Connections at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 256;
/// After a connection that could not be accepted.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The listeners of a namespace.
pub struct Forward {
    v4: TcpListener,
    v6: Option<TcpListener>,
    _steering: Steering,
}

impl Forward {
    /// Takes every TCP connection that is made within the namespace from now on.
    ///
    /// # Errors
    /// When the kernel cannot steer them (Linux 5.9).
    pub fn open(netns: &Netns) -> Result<Self> {
        let (v4, v6) = netns.run(|| {
            let v4 = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
            // A namespace may be without IPv6.
            Ok((v4, std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok()))
        })?;
        let steering = steer(netns.as_fd(), &v4, v6.as_ref())?;
        let watch = |listener: std::net::TcpListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        Ok(Self { v4: watch(v4)?, v6: v6.map(watch).transpose()?, _steering: steering })
    }

    /// Carries connections until the machine is gone.
    pub async fn serve(self, sandbox: Arc<Sandbox>) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut ended = sandbox.ended();
        loop {
            // The semaphore is never closed.
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let accepted = tokio::select! {
                _ = ended.wait_for(Option::is_some) => return,
                accepted = self.v4.accept() => accepted,
                accepted = accept(self.v6.as_ref()) => accepted,
            };
            let Ok((connection, _)) = accepted else {
                // A caller that has gone again, or no descriptor left, which lasts a while.
                tokio::time::sleep(RETRY_DELAY).await;
                continue;
            };
            let sandbox = Arc::clone(&sandbox);
            tokio::spawn(async move {
                if let Err(error) = carry(&sandbox, connection).await {
                    log::debug!("carry a connection into the guest: {error:#}");
                }
                drop(permit);
            });
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> std::io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// Hands a connection to the guest and waits for its end.
async fn carry(sandbox: &Sandbox, connection: TcpStream) -> Result<()> {
    let target = connection.local_addr().context("ask where it goes to")?;
    let connection = OwnedFd::from(connection.into_std().context("hand it over")?);
    let ours = connection.try_clone().context("keep it")?;
    // What is ours of it is gone once the guest has it.
    let take = |port| async move {
        let taken = sandbox.agent.forward(target, port).await;
        if taken.is_err() {
            // Nobody listens: the caller is to see a reset, not an answer that happens to be empty.
            let _ = setsockopt(&ours, Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
        }
        taken
    };
    Ok(sandbox.carry(connection, take).await?)
}
