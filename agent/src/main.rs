//! `caisson-agent`: the guest's only program and its PID 1.
//!
//! ```text
//! main: boot (mounts, cgroup) -> connect to the host -> serve the Agent service
//! main container ...: a container's first process, or one added to it (see `init`)
//! ```

mod boot;
mod cgroup;
mod containers;
mod devices;
mod disks;
mod hugepages;
mod init;
mod kernel_log;
mod machine;
mod memory_volumes;
mod names;
mod network;
mod process;
mod processes;
mod reaper;
mod service;
mod share;
mod sockets;
mod streams;
mod sys;
mod volumes;

use std::sync::Arc;

use anyhow::{Context, Result};
use caisson_protocol::agent::create_agent;
use caisson_protocol::guest::CONTROL_PORT;
use futures::StreamExt as _;
use nix::sys::signal::SigSet;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::containers::Containers;
use crate::machine::Machine;
use crate::reaper::Reaper;
use crate::service::AgentService;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == init::WORD) {
        std::process::exit(init::main(&arguments[2..]));
    }
    let started = boot::uptime_us();
    // PID 1 must not end: the kernel panics and the VMM sees the reset. The line is on the debug console.
    if let Err(error) = run(started) {
        boot::log(&format!("agent: {error:#}"));
        std::process::exit(1);
    }
}

/// Leaves every signal to the main thread: SIGCHLD would break off a connect(2) that waits for the
/// host. What a thread starts inherits this.
fn block_signals() {
    // It fails only for arguments that do not exist.
    let _ = SigSet::all().thread_block();
}

fn run(started_us: u64) -> Result<()> {
    boot::mount_all()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().on_thread_start(block_signals).build().context("start the runtime")?;
    runtime.block_on(async {
        let reaper = Reaper::start().context("watch for exits")?;
        let socket = streams::connect(CONTROL_PORT).context("connect to the host")?;
        let socket = streams::into_async(socket).context("connect to the host")?;
        let containers = Arc::new(Containers::new(reaper));
        let machine = Machine::new()?;
        let service = create_agent(Arc::new(AgentService::new(containers, machine, started_us)));
        // One connection, which stays open as long as the pod lives.
        let listener = Listener::new(futures::stream::iter([Ok(socket)]).chain(futures::stream::pending()));
        let mut server = Server::new().add_listener(listener).register_service(service);
        server.start().await.context("serve the host")?;
        std::future::pending::<()>().await;
        Ok(())
    })
}
