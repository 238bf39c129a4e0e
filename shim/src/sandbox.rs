//! The pod's machine: file server, monitor, agent; booted in one go, and undone when any step fails.
//!
//! ```text
//! Starting -> Booting (vCPUs run) -> Connected (the agent is there) -> Ready (versions agree)
//!     any  -> Ended (the monitor is gone, and with it all containers)
//! ```

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_protocol::config::Config;
use caisson_protocol::fs::FsConfig;
use caisson_protocol::guest::{CONTROL_PORT, FIRST_STREAM_PORT};
use caisson_protocol::vmm::{BootConfig, Ends, Offer};
use nix::mount::{MsFlags, mount};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::watch;

use crate::agent::Agent;
use crate::store::Store;
use crate::vmm::{Ended, Jailed, StreamState, Vmm, start_fs};
use crate::{cgroup, spec};

/// A machine that is ready for containers.
pub struct Sandbox {
    /// The monitor.
    pub vmm: Arc<Vmm>,
    /// The agent in the guest.
    pub agent: Agent,
    fs: Arc<Jailed>,
    next_port: AtomicU32,
}

/// The files that a machine boots from, opened with the shim's rights.
struct Files {
    kvm: File,
    kernel: File,
    initramfs: File,
    memory: File,
    console: Option<File>,
}

impl Sandbox {
    /// Boots the pod's machine.
    ///
    /// # Errors
    /// The step that failed and why, in one sentence. The caller undoes the pod's record.
    pub async fn boot(config: &Config, store: &Store, spec: &spec::Spec, bundle: &Path) -> Result<Arc<Self>> {
        let begin = Instant::now();
        let files = open_files(config, bundle)?;
        prepare_share(&store.share())?;
        let uid = store.reserve_uid(config.uid_base, config.uid_count)?;
        let (fs_listener, fs_client) = fs_socket(store.dir())?;

        let vmm = Vmm::start(&config.vmm_path, uid).await.context("start the virtual machine monitor")?;
        let booted = Self::boot_with(config, store, spec, &vmm, files, fs_listener, fs_client, begin).await;
        if booted.is_err() {
            vmm.kill("the pod could not be started");
        }
        booted
    }

    #[expect(clippy::too_many_arguments, reason = "the second half of boot, split off so that any error kills the monitor")]
    async fn boot_with(config: &Config, store: &Store, spec: &spec::Spec, vmm: &Arc<Vmm>, files: Files, fs_listener: OwnedFd, fs_client: OwnedFd, begin: Instant) -> Result<Arc<Self>> {
        store.add_process("vmm", vmm.pid())?;
        let watched = Arc::clone(vmm);
        let fs_config = FsConfig { cache: config.fs_cache, threads: config.fs_threads as usize };
        let fs = start_fs(&config.fs_path, &store.share(), &fs_config, fs_listener, move |reason| watched.kill(&reason)).await.context("start the virtio-fs server")?;
        let sandbox = Self::finish_boot(config, store, spec, vmm, files, fs_client, Arc::clone(&fs), begin).await;
        if sandbox.is_err() {
            fs.kill();
        }
        sandbox
    }

    #[expect(clippy::too_many_arguments, reason = "the last part of boot, split off so that any error kills the file server")]
    async fn finish_boot(config: &Config, store: &Store, spec: &spec::Spec, vmm: &Arc<Vmm>, files: Files, fs_client: OwnedFd, fs: Arc<Jailed>, begin: Instant) -> Result<Arc<Self>> {
        store.add_process("fs", fs.pid)?;
        join_cgroup(store, spec, &[vmm.pid(), fs.pid])?;
        let started = begin.elapsed();

        let (ours, theirs) = UnixStream::pair().context("make the agent's socket")?;
        let connected = vmm.boot_machine(config, &files, &fs_client, theirs.into()).await?;
        let agent = Agent::new(ours, vmm.ended(), Duration::from_millis(config.agent_timeout_ms.into()))?;
        let timeout = Duration::from_millis(config.boot_timeout_ms.into());
        let pod = store.pod();
        // Containers that ask for no name of their own have the pod's.
        let hostname = if spec.hostname().is_empty() { &pod } else { spec.hostname() };
        let hello = match tokio::time::timeout(timeout, agent.hello(hostname)).await {
            Ok(answer) => answer?,
            Err(_) => bail!("the guest was not ready within {} ms (timeouts.boot_ms); {}", config.boot_timeout_ms, stage(vmm, &connected)),
        };
        log::info!(
            "machine is ready: processes {} ms, guest kernel {} ms, agent {} ms; {} ms in all; guest kernel {}",
            started.as_millis(),
            hello.agent_start_us / 1000,
            hello.ready_us.saturating_sub(hello.agent_start_us) / 1000,
            begin.elapsed().as_millis(),
            hello.kernel,
        );
        let sandbox = Arc::new(Self { vmm: Arc::clone(vmm), agent, fs, next_port: AtomicU32::new(FIRST_STREAM_PORT) });
        tokio::spawn(watch_health(Arc::clone(&sandbox), Duration::from_millis(config.health_interval_ms.into())));
        Ok(sandbox)
    }

    /// A port that no stream of this pod has had.
    pub fn next_port(&self) -> u32 {
        self.next_port.fetch_add(1, Ordering::Relaxed)
    }

    /// Follows the end of the machine.
    pub fn ended(&self) -> Ended {
        self.vmm.ended()
    }

    /// Kills the machine and its file server.
    pub fn kill(&self, reason: &str) {
        self.vmm.kill(reason);
        self.fs.kill();
    }
}

impl Vmm {
    /// Offers the control port and starts the vCPUs; the returned state tells when the guest connects.
    async fn boot_machine(&self, config: &Config, files: &Files, fs_client: &OwnedFd, agent: OwnedFd) -> Result<watch::Receiver<StreamState>> {
        let boot = BootConfig { vcpus: config.vcpus, memory_mib: config.memory_mib, kernel_args: config.kernel_args.clone(), console: files.console.is_some() };
        let mut fds: Vec<BorrowedFd<'_>> = vec![files.kvm.as_fd(), files.kernel.as_fd(), files.initramfs.as_fd(), files.memory.as_fd(), fs_client.as_fd()];
        fds.extend(files.console.as_ref().map(AsFd::as_fd));
        self.boot(&boot, &fds).await?;
        self.offer(Offer { port: CONTROL_PORT, ends: Ends::Duplex }, &[agent]).await
    }
}

/// How far a machine came that did not become ready.
fn stage(vmm: &Vmm, connected: &watch::Receiver<StreamState>) -> &'static str {
    match (vmm.is_running(), *connected.borrow()) {
        (false, _) => "it got as far as setting up the virtual machine",
        (true, StreamState::Offered) => "it got as far as booting the guest kernel: the agent has not connected",
        (true, _) => "the agent connected but did not answer",
    }
}

/// Opens what the machine boots from, naming what is missing and what to do.
fn open_files(config: &Config, bundle: &Path) -> Result<Files> {
    let artefact = |what: &str, key: &str, path: &Path| {
        File::open(path).with_context(|| format!("{what} {} cannot be opened; run `cargo xtask install` or set {key}", path.display()))
    };
    let kernel = artefact("guest kernel", "kernel.path", &config.kernel_path)?;
    let initramfs = artefact("initramfs", "image.initramfs", &config.initramfs_path)?;
    for (what, key, path) in [("virtual machine monitor", "vmm.path", &config.vmm_path), ("virtio-fs server", "fs.path", &config.fs_path)] {
        artefact(what, key, path)?;
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("open /dev/kvm: this host offers no hardware virtualization; run `caisson check`")?;
    let memory = File::from(memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).context("make the guest memory file")?);
    memory.set_len(config.memory_mib << 20).with_context(|| format!("size the guest memory file to {} MiB", config.memory_mib))?;
    nix::fcntl::fcntl(&memory, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_SEAL)).context("seal the size of the guest memory file")?;
    let console = if config.kernel_console {
        let log = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("log")).context("open the log for the guest's console")?;
        Some(log)
    } else {
        None
    };
    Ok(Files { kvm, kernel, initramfs, memory, console })
}

/// Makes the share a mount of its own that passes later mounts on to the file server.
fn prepare_share(share: &Path) -> Result<()> {
    mount(Some(share), share, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("bind the share")?;
    mount(None::<&str>, share, None::<&str>, MsFlags::MS_SHARED, None::<&str>).context("make the share's mounts propagate")
}

/// A connected pair for the vhost-user conversation: the server's listening end, the monitor's end.
///
/// The server's library accepts connections and takes no connected socket, so there is a path for
/// a moment, in the pod's own folder.
fn fs_socket(dir: &Path) -> Result<(OwnedFd, OwnedFd)> {
    // Socket paths are short (108 bytes); the folder's need not be.
    let folder = File::open(dir).context("open the pod's folder")?;
    let path = format!("/proc/self/fd/{}/fs.sock", std::os::fd::AsRawFd::as_raw_fd(&folder));
    let listener = UnixListener::bind(&path).context("make the virtio-fs socket")?;
    let client = UnixStream::connect(&path).context("connect to the virtio-fs socket")?;
    std::fs::remove_file(&path).context("remove the virtio-fs socket's name")?;
    Ok((listener.into(), client.into()))
}

/// Puts the pod's processes into the cgroup that containerd asks for.
fn join_cgroup(store: &Store, spec: &spec::Spec, pids: &[u32]) -> Result<()> {
    let Some(path) = spec.cgroups_path().and_then(cgroup::path) else { return Ok(()) };
    if !cgroup::is_unified() {
        return Ok(());
    }
    store.change(|record| record.cgroup = Some(path.clone()))?;
    cgroup::create(&path)?;
    pids.iter().try_for_each(|pid| cgroup::add(&path, *pid))
}

/// Kills a machine whose agent does not answer any more.
async fn watch_health(sandbox: Arc<Sandbox>, interval: Duration) {
    let mut ended = sandbox.ended();
    loop {
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => return,
            () = tokio::time::sleep(interval) => {}
        }
        if let Err(error) = sandbox.agent.ping().await {
            sandbox.kill(&error.to_string());
            return;
        }
    }
}
