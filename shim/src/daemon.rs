//! The daemon: serves the task service of one pod until containerd shuts it down.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use caisson_host::control::Control;
use caisson_host::rights;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use futures::stream::unfold;
use log::LevelFilter;
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;
use tokio::sync::watch;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::bootstrap::socket_path;
use crate::events::Events;
use crate::flags::Flags;
use crate::machine::Name;
use crate::pod::Pod;
use crate::sandboxer::SandboxService;
use crate::service::TaskService;

/// containerd calls the first of a shim that answers `start` with an address alone, as every version understands, and the
/// second of one that says that it speaks version 3; the messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// How long the answer to the last request may take to leave.
const GOODBYE: Duration = Duration::from_millis(50);

/// Serves until the pod is shut down.
///
/// # Errors
/// When the listening socket is not where `start` leaves it, or cannot be served.
pub fn serve(flags: Flags) -> Result<()> {
    let begin = Instant::now();
    let listener = OwnedFd::from(Control::inherited().context("find the listening socket; this program is started by containerd")?);
    // What our jailed processes leave behind is ours to collect.
    nix::sys::prctl::set_child_subreaper(true).context("become the reaper of the pod's processes")?;
    let level = if flags.debug { LevelFilter::Debug } else { LevelFilter::Info };
    crate::logger::init(Path::new("."), &flags.namespace, &flags.id, level);
    rights::keep_only(rights::SHIM).context("give up capabilities")?;
    crate::filter::install()?;
    // A file server that is not root finds its way through the folders of the share.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(run(&flags, listener.into(), begin))
}

async fn run(flags: &Flags, listener: std::os::unix::net::UnixListener, begin: Instant) -> Result<()> {
    let socket = socket_path(&flags.address, &flags.namespace, &flags.id);
    let name = Name { namespace: flags.namespace.clone(), id: flags.id.clone(), socket: socket.to_string_lossy().into_owned() };
    let config = Some(flags.config.as_str()).filter(|path| !path.is_empty()).map(PathBuf::from);
    let pod = Arc::new(Pod::new(name, config, Events::start(&flags.namespace)));
    let (ended, mut wait) = watch::channel(false);
    let mut services = create_sandbox(Arc::new(SandboxService::new(Arc::clone(&pod), ended.clone())));
    let task = Arc::new(TaskService::new(pod, ended));
    for name in SERVICES {
        let generated = create_task(Arc::clone(&task) as Arc<_>);
        services.extend(generated.into_values().map(|service| (name.to_owned(), service)));
    }
    listener.set_nonblocking(true).context("prepare the listening socket")?;
    let listener = UnixListener::from_std(listener).context("watch the listening socket")?;
    let connections = unfold(listener, |listener| async { Some((listener.accept().await.map(|(stream, _)| stream), listener)) });
    let mut server = Server::new().add_listener(Listener::new(connections)).register_service(services);
    server.start().await.context("serve containerd")?;
    log::info!("shim is ready: {} ms", begin.elapsed().as_millis());
    // The sender lives in the service, which lives as long as the server.
    let _ = wait.wait_for(|ended| *ended).await;
    let _ = std::fs::remove_file(&socket);
    tokio::time::sleep(GOODBYE).await;
    // Threads that carry logs or wait for a reader must not hold the process.
    std::process::exit(0);
}
