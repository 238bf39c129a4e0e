//! The pod's machine: file server, monitor, agent; booted in one go, and undone when any step fails.
//!
//! ```text
//! Starting -> Booting (vCPUs run) -> Connected (the agent is there) -> Ready (versions agree)
//!     any  -> Ended (the monitor is gone, and with it all containers)
//! ```

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_host::jail::raise_descriptor_limit;
use caisson_host::users::{self, Users};
use caisson_protocol::config::Config;
use caisson_protocol::fs::FsConfig;
use caisson_protocol::guest::CONTROL_PORT;
use caisson_protocol::vmm::{BootConfig, Ends, Offer};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::{Notify, watch};

use crate::agent::Agent;
use crate::cgroup::{self, Leaf, Place};
use crate::console;
use crate::cores;
use crate::cri::PodFile;
use crate::errors;
use crate::file_server::{FsEnd, start_fs};
use crate::share::{Share, Unserved};
use crate::size::{Bounds, Growth};
use crate::spec;
use crate::stdio::stream_port;
use crate::store::Store;
use crate::vmm::{Ended, Jailed, StreamState, Vmm};

/// Open files that the pod's processes may have: streams take up to two each.
const DESCRIPTOR_LIMIT: u64 = 8192;
/// With fewer a pod of one container cannot be served.
const LEAST_DESCRIPTORS: u64 = 256;

/// From the end of another process to that of the monitor, when it was the monitor that ended.
pub const LAST_WORDS: Duration = Duration::from_millis(500);

/// A machine that is ready for containers.
pub struct Sandbox {
    /// The monitor.
    pub vmm: Arc<Vmm>,
    /// The agent in the guest.
    pub agent: Agent,
    /// How it becomes larger.
    pub growth: Growth,
    /// The files that the guest sees.
    pub share: Share,
    /// The cgroup of the pod's processes on the host.
    place: Option<Place>,
    fs: Arc<Jailed>,
    /// Told when the guest had better forget files.
    crowded: Arc<Notify>,
}

/// The files that a machine boots from, opened with the shim's rights.
struct Files {
    kvm: File,
    kernel: File,
    initramfs: File,
    memory: File,
    added: File,
    console: Option<OwnedFd>,
}

impl Sandbox {
    /// Boots the pod's machine within the configured time.
    ///
    /// # Errors
    /// The step that failed and why, in one sentence. What was started is killed; the caller
    /// undoes the pod's record.
    pub async fn boot(config: &Config, store: &Arc<Store>, spec: &spec::Spec, files: &[PodFile]) -> Result<Arc<Self>> {
        let boot = Boot { config, store, spec, files, begin: Instant::now(), stage: Mutex::new("preparing") };
        let mut started = Started::default();
        let timeout = Duration::from_millis(config.boot_timeout_ms.into());
        let sandbox = match tokio::time::timeout(timeout, boot.run(&mut started)).await {
            Ok(Ok(sandbox)) => sandbox,
            Ok(Err(error)) => return Err(started.cause(error).await),
            Err(_) => bail!("the guest was not ready within {} ms (timeouts.boot_ms); it was at: {}", config.boot_timeout_ms, boot.stage()),
        };
        started.keep();
        let growing = Arc::clone(&sandbox);
        tokio::spawn(async move { growing.growth.follow(&growing.vmm).await });
        tokio::spawn(watch_health(Arc::clone(&sandbox), Duration::from_millis(config.health_interval_ms.into())));
        tokio::spawn(watch_files(Arc::clone(&sandbox)));
        Ok(sandbox)
    }

    /// Follows the end of the machine.
    pub fn ended(&self) -> Ended {
        self.vmm.ended()
    }

    /// Hands one end of a connection to the guest, whose agent `take` has connect to the port that it is given, and waits
    /// for the connection's end.
    ///
    /// # Errors
    /// When the guest does not take it.
    pub async fn carry<F: Future<Output = errors::Result<()>>>(
        &self,
        connection: OwnedFd,
        take: impl FnOnce(u32) -> F,
    ) -> errors::Result<()> {
        let port = stream_port()?;
        let mut state = self.vmm.offer(Offer { port, ends: Ends::Duplex }, &[connection]).await?;
        if let Err(error) = take(port).await {
            self.vmm.withdraw(port).await;
            return Err(error);
        }
        // The sender goes with the stream.
        let _ = state.wait_for(|state| *state == StreamState::Closed).await;
        Ok(())
    }

    /// Has further processes count as the pod's.
    ///
    /// # Errors
    /// When the host does not allow it.
    pub fn count(&self, pids: &[u32]) -> Result<()> {
        score(pids)?;
        self.place.as_ref().map_or(Ok(()), |place| unless_delegated(place.join(Leaf::Machine, pids)))
    }

    /// Has the shim leave the pod's cgroup, which is about to go.
    pub fn leave(&self) {
        if self.place.is_some()
            && let Err(error) = unless_delegated(cgroup::leave())
        {
            log::error!("leave the pod's cgroup: {error:#}");
        }
    }

    /// Kills the machine and its file server.
    pub fn kill(&self, reason: &str) {
        self.vmm.kill(reason);
        self.fs.kill();
    }
}

/// Processes of a machine that is not ready yet; killed when dropped.
#[derive(Default)]
struct Started {
    vmm: Option<Arc<Vmm>>,
    fs: Option<Arc<Jailed>>,
}

impl Started {
    fn keep(mut self) {
        (self.vmm, self.fs) = (None, None);
    }

    /// Why a step of the boot failed: when the monitor has ended, what became of it is the reason, and not what was found
    /// of it then.
    async fn cause(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(vmm) = &self.vmm else { return error };
        let mut ended = vmm.ended();
        match tokio::time::timeout(LAST_WORDS, ended.wait_for(Option::is_some)).await.map(|end| end.map(|reason| reason.clone())) {
            Ok(Ok(Some(reason))) if !format!("{error:#}").contains(&reason) => anyhow::anyhow!("{reason}"),
            _ => error,
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(vmm) = &self.vmm {
            vmm.kill("the pod could not be started");
        }
        if let Some(fs) = &self.fs {
            fs.kill();
        }
    }
}

/// One boot, and how far it came.
struct Boot<'a> {
    config: &'a Config,
    store: &'a Arc<Store>,
    spec: &'a spec::Spec,
    files: &'a [PodFile],
    begin: Instant,
    stage: Mutex<&'static str>,
}

impl Boot<'_> {
    fn enter(&self, stage: &'static str) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }

    fn stage(&self) -> &'static str {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self, started: &mut Started) -> Result<Arc<Sandbox>> {
        let Self { config, store, .. } = *self;
        check_descriptor_limit()?;
        let bounds = Bounds::new(config, self.spec.pod_limits())?;
        let files = open_files(config, &bounds)?;
        check_users(config)?;
        let uid = store.reserve_uid(config.uid_base, config.uid_count)?;
        let (fs_listener, fs_client) = fs_socket(store.dir())?;

        self.enter("starting the virtual machine monitor");
        let vmm = Vmm::start(&config.vmm_path, uid).await.context("start the virtual machine monitor")?;
        started.vmm = Some(Arc::clone(&vmm));
        store.add_process("vmm", vmm.pid())?;

        self.enter("starting the virtio-fs server");
        let (threads, poll_us) = (config.fs_threads as usize, config.fs_poll_us);
        let (cache, writeback, maps) = (config.fs_cache, config.fs_writeback, config.fs_window_mib > 0);
        let id_base = Some(config.fs_id_base).filter(|base| *base != 0);
        let set_id = config.fs_set_id;
        let fs_config = FsConfig { id_base, set_id, cache, writeback, maps, threads, poll_us };
        let (share, root) = Unserved::make(store.dir()).context("make the pod's share")?;
        let (watched, crowded) = (Arc::clone(&vmm), Arc::new(Notify::new()));
        let on_end = move |end| async move {
            match end {
                FsEnd::Failed(reason) => watched.kill(&reason),
                // The server ends with a monitor that ends, and then it is the monitor that knows why.
                FsEnd::Gone(reason) => {
                    if tokio::time::timeout(LAST_WORDS, watched.ended().wait_for(Option::is_some)).await.is_err() {
                        watched.kill(&reason);
                    }
                }
            }
        };
        let (fs, namespace) = start_fs(&config.fs_path, uid, &fs_config, root, fs_listener, Arc::clone(&crowded), on_end)
            .await
            .context("start the virtio-fs server")?;
        started.fs = Some(Arc::clone(&fs));
        store.add_process("fs", fs.pid())?;
        let place = place_of(config, store, self.spec)?;
        if let Some(place) = &place {
            store.change(|record| record.cgroup = Some(place.path.clone()))?;
            cgroup::limit(&config.tenant)?;
            unless_delegated(place.make(&[vmm.pid(), fs.pid()]).await)?;
        }
        score(&[vmm.pid(), fs.pid()])?;
        // Who is not root may not lower it.
        let _ = std::fs::write("/proc/self/oom_score_adj", SHIM_OOM_SCORE);
        cores::part(config, store, vmm.pid()).await?;
        let processes = self.begin.elapsed();

        self.enter("setting up the virtual machine");
        let (ours, theirs) = UnixStream::pair().context("make the agent's socket")?;
        let watched = Arc::clone(&vmm);
        let violated = move |how: String| watched.kill(&format!("the guest's agent does not keep to the protocol: {how}"));
        let agent = Agent::new(ours, vmm.ended(), Duration::from_millis(config.agent_timeout_ms.into()), violated)?;
        let connected = self.start_machine(&vmm, &bounds, &files, &fs_client, theirs.into()).await?;
        self.hello(&vmm, &agent, connected, processes).await?;
        // The guest has mounted the share: the file server has mapped all memory.
        let growth = Growth::new(bounds, files.added)?;
        Ok(Arc::new(Sandbox { vmm, agent, growth, share: share.served_in(namespace), place, fs, crowded }))
    }

    /// Starts the vCPUs and offers the control port; the returned state tells when the guest connects.
    async fn start_machine(
        &self,
        vmm: &Vmm,
        bounds: &Bounds,
        files: &Files,
        fs_client: &OwnedFd,
        agent: OwnedFd,
    ) -> Result<watch::Receiver<StreamState>> {
        let config = self.config;
        let boot = BootConfig {
            vcpus: config.vcpus,
            max_vcpus: bounds.most.vcpus,
            memory_mib: config.memory_mib,
            max_added_mib: bounds.max_added_mib(),
            files_mib: config.fs_window_mib,
            nested: config.nested,
            report_free_memory: config.report_free_memory,
            disks: config.disk_places,
            disk_rings: config.disk_io_uring,
            kernel_args: config.kernel_args.clone(),
            console: files.console.is_some(),
        };
        let files_of_machine = [&files.kvm, &files.kernel, &files.initramfs, &files.memory, &files.added];
        let mut fds: Vec<BorrowedFd<'_>> = files_of_machine.into_iter().map(AsFd::as_fd).collect();
        fds.push(fs_client.as_fd());
        fds.extend(files.console.as_ref().map(AsFd::as_fd));
        vmm.boot(&boot, &fds).await?;
        vmm.offer(Offer { port: CONTROL_PORT, ends: Ends::Duplex }, &[agent]).await
    }

    /// Waits for the agent's answer, and logs where the time went.
    async fn hello(&self, vmm: &Vmm, agent: &Agent, mut connected: watch::Receiver<StreamState>, processes: Duration) -> Result<()> {
        // Containers that ask for no name of their own have the pod's.
        let pod = self.store.pod();
        let hostname = if self.spec.hostname().is_empty() { &pod } else { self.spec.hostname() };
        let answer = async {
            vmm.wait_running().await;
            self.enter("booting the guest kernel; the agent has not connected");
            // The request holds the time: it is made when the guest is there to read it.
            if connected.wait_for(|state| *state != StreamState::Offered).await.is_ok() {
                self.enter("waiting for the agent, which connected but did not answer");
            }
            agent.hello(hostname, self.spec.shm_bytes(), self.files).await
        };
        let mut ended = vmm.ended();
        let hello = tokio::select! {
            answer = answer => answer?,
            _ = ended.wait_for(Option::is_some) => return Err(agent.gone().into()),
        };
        log::info!(
            "machine is ready: processes {} ms, guest kernel {} ms, agent {} ms; {} ms in all; guest kernel {}",
            processes.as_millis(),
            hello.agent_start_us / 1000,
            hello.ready_us.saturating_sub(hello.agent_start_us) / 1000,
            self.begin.elapsed().as_millis(),
            errors::one_line(&hello.kernel),
        );
        Ok(())
    }
}

/// Refuses ids for monitors that are nobody's where we are.
fn check_users(config: &Config) -> Result<()> {
    let users = Users::here().context("read which users there are")?;
    let (first, count) = (config.uid_base, config.uid_count);
    anyhow::ensure!(
        users.have(first, count),
        "the {count} user ids from vmm.uid_base = {first} on are not all in this user namespace, which has {}",
        users.describe()
    );
    Ok(())
}

/// Takes as many open files as the host allows, and says so when they are too few.
fn check_descriptor_limit() -> Result<()> {
    let limit = raise_descriptor_limit(DESCRIPTOR_LIMIT).context("raise the limit of open files")?;
    anyhow::ensure!(
        limit >= LEAST_DESCRIPTORS,
        "the limit of open files is {limit} and a pod needs {LEAST_DESCRIPTORS}; raise LimitNOFILE of containerd's service or its `ulimit -n`"
    );
    Ok(())
}

/// Opens what the machine boots from, naming what is missing and what to do.
fn open_files(config: &Config, bounds: &Bounds) -> Result<Files> {
    let artefact = |what: &str, key: &str, path: &Path| {
        File::open(path).with_context(|| format!("{what} {} cannot be opened; run `cargo xtask install` or set {key}", path.display()))
    };
    let kernel = artefact("guest kernel", "kernel.path", &config.kernel_path)?;
    let initramfs = artefact("initramfs", "image.initramfs", &config.initramfs_path)?;
    for (what, key, path) in [
        ("virtual machine monitor", "vmm.path", &config.vmm_path),
        ("virtio-fs server", "fs.path", &config.fs_path),
        ("stand-in of containers", "task.path", &config.task_path),
    ] {
        artefact(what, key, path)?;
    }
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm: this host offers no hardware virtualization; run `caisson check`")?;
    let memory = memory_file("guest-memory", config.memory_mib)?;
    nix::fcntl::fcntl(
        &memory,
        nix::fcntl::FcntlArg::F_ADD_SEALS(
            nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_SEAL,
        ),
    )
    .context("seal the size of the guest memory file")?;
    // Its size changes with what the guest may have of it; to be mapped it must be whole.
    let added = memory_file("added-memory", bounds.max_added_mib())?;
    let console = config.kernel_console.then(console::open).transpose().context("make a pipe for the guest's console")?;
    Ok(Files { kvm, kernel, initramfs, memory, added, console })
}

/// A file in memory, of which nothing is there until it is written.
fn memory_file(name: &str, mib: u64) -> Result<File> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).with_context(|| format!("make the file {name}"))?;
    let file = File::from(file);
    file.set_len(mib << 20).with_context(|| format!("size the file {name} to {mib} MiB"))?;
    Ok(file)
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

/// Where processes count as the pod's: its tenant's cgroup or the one that containerd asks for.
fn place_of(config: &Config, store: &Store, spec: &spec::Spec) -> Result<Option<Place>> {
    let (namespace, pod) = store.read(|record| (record.namespace.clone(), record.pod.clone()));
    let of_tenant = Place::of_tenant(&config.tenant, &namespace, &pod)?;
    Ok(of_tenant.or_else(|| spec.cgroups_path().and_then(Place::parse)))
}

/// The shim's own (proc(5), `oom_score_adj`): its death would be that of the pod, and frees next to nothing.
const SHIM_OOM_SCORE: &str = "-998";

/// Has processes count as the pod's when memory runs out: containerd is not to be killed then; a pod may be, before the
/// rest of the host.
fn score(pids: &[u32]) -> Result<()> {
    for pid in pids {
        let path = format!("/proc/{pid}/oom_score_adj");
        let protected = std::fs::read_to_string(&path).is_ok_and(|score| score.starts_with('-'));
        if protected {
            std::fs::write(&path, "0").with_context(|| format!("set the OOM score of process {pid}"))?;
        }
    }
    Ok(())
}

/// What came of moving processes into the pod's cgroup.
fn unless_delegated(joined: Result<()>) -> Result<()> {
    match joined {
        // Who is not root has cgroups only where they were delegated. What was made of this one stays on record, to go with the pod.
        Err(error) if users::are_few() => {
            log::warn!("the pod is not in a cgroup of its own: {error:#}");
            Ok(())
        }
        joined => joined,
    }
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

/// From a guest that did not do as it was asked to the next time that it is.
const AFTER_FAILURE: Duration = Duration::from_secs(10);

/// Has the guest forget files that nobody uses, whenever the virtio-fs server has little room for more.
async fn watch_files(sandbox: Arc<Sandbox>) {
    let mut ended = sandbox.ended();
    loop {
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => return,
            () = sandbox.crowded.notified() => {}
        }
        if let Err(error) = sandbox.agent.forget_files().await {
            // What waits for it has its bound, and says then what it lacks.
            log::warn!("have the guest forget files: {error}");
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}
