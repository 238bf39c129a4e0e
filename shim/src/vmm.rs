//! The pod's two jailed processes, as the shim sees them: started, spoken to, watched, killed.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use caisson_host::control::{self, Control};
use caisson_host::process::Process;
use caisson_protocol::vmm::{BootConfig, Disk, Event, Nic, Offer, Request, Stopped};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::channel::Channel;
use crate::errors::one_line;
use crate::pod::lock;

/// For what a disk was asked to be done before it is closed.
const DETACH_TIMEOUT: Duration = Duration::from_secs(10);

/// A jailed process at the other end of a control socket.
pub struct Jailed {
    control: Channel,
    process: Arc<Process>,
}

impl Jailed {
    /// Starts `program`, sends it a message if it is to have one first, and waits until it has its namespaces.
    ///
    /// # Errors
    /// When it cannot be started, or its first message is not what `pid_of` knows.
    pub async fn start<E: DeserializeOwned>(
        program: &Path,
        arguments: &[String],
        first: Option<(&(impl Serialize + Sync), &[BorrowedFd<'_>])>,
        pid_of: impl Fn(E) -> Result<u32, String>,
    ) -> Result<Self> {
        let (ours, theirs) = Control::pair().context("make a control socket")?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir("/").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        control::pass(&mut command, theirs.as_fd());
        let mut starter = command.spawn().with_context(|| format!("start {}", program.display()))?;
        drop(theirs);
        let control = Channel::new(ours).context("watch a control socket")?;
        if let Some((message, descriptors)) = first {
            // One that ends before it has read this says why.
            let _ = control.send(message, descriptors).await;
        }
        let first = control.receive::<E>().await.with_context(|| format!("hear from {}", program.display()));
        // It forks into its PID namespace and ends; the child is ours by adoption.
        let status = tokio::task::spawn_blocking(move || starter.wait()).await.context("collect a process")?;
        match first? {
            Some((event, _)) => match pid_of(event) {
                // It is our child and nobody collects it yet: the id is still its own.
                Ok(pid) => {
                    let process = Process::open(pid).with_context(|| format!("hold {}", program.display()))?;
                    Ok(Self { control, process: Arc::new(process) })
                }
                Err(reason) => bail!("{reason}"),
            },
            None => bail!("{} ended before it was in its jail: {}", program.display(), status.context("collect a process")?),
        }
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// When the process is gone.
    pub async fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.control.send(message, fds).await
    }

    /// The next message; `None` when the process is gone.
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        self.control.receive().await
    }

    /// Its id on the host.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Kills the process; it may be gone.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Collects the process, so that no zombie stays, and says how it ended. It is killed first: one
    /// that has ended by itself keeps its own status.
    pub async fn collect(&self) -> String {
        let process = Arc::clone(&self.process);
        process.kill();
        match tokio::task::spawn_blocking(move || process.collect()).await {
            Ok(Ok(end)) => end.to_string(),
            // We killed it, whatever else is known.
            _ => "was killed".into(),
        }
    }
}

/// What is known of a stream's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamState {
    /// The guest has not connected.
    Offered,
    /// It has.
    Open,
    /// Over.
    Closed,
}

/// Why a pod's machine ended; `None` while it runs.
pub type Ended = watch::Receiver<Option<String>>;

/// How many vCPUs there are, 0 until the first was made after the start, or why there is no further one.
type VcpuCount = Result<u32, String>;

/// Events of a monitor that are taken in a second. A pod has some for each stream of each process that it starts.
const MAX_EVENTS: u32 = 4096;
/// Lines that events of a monitor may add to the log.
const MAX_LINES: u32 = 64;

/// How often a monitor, which may have been taken over, is heard.
struct Pace {
    since: Instant,
    events: u32,
    lines: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { since: Instant::now(), events: 0, lines: 0 }
    }
}

impl Pace {
    /// Counts an event, and waits for the next second when there were too many in this one.
    async fn keep(&mut self) {
        const SECOND: Duration = Duration::from_secs(1);
        self.events += 1;
        let passed = self.since.elapsed();
        if self.events > MAX_EVENTS {
            tokio::time::sleep(SECOND.saturating_sub(passed)).await;
        }
        if self.events > MAX_EVENTS || passed > SECOND {
            (self.since, self.events) = (Instant::now(), 0);
        }
    }

    /// Adds a line to the log, unless there were too many.
    fn say(&mut self, line: impl FnOnce()) {
        self.lines = self.lines.saturating_add(1);
        if self.lines <= MAX_LINES {
            line();
        }
        if self.lines == MAX_LINES {
            log::warn!("the virtual machine monitor has said much; nothing more of that is logged");
        }
    }
}

/// The virtual machine monitor.
pub struct Vmm {
    process: Jailed,
    /// MiB of the file of added memory that the guest may hold.
    added: watch::Sender<u64>,
    vcpus: watch::Sender<VcpuCount>,
    /// The place whose disk was closed last; of one at a time it is asked for.
    detached: watch::Sender<Option<u32>>,
    streams: Mutex<HashMap<u32, watch::Sender<StreamState>>>,
    running: watch::Sender<bool>,
    ended: watch::Sender<Option<String>>,
    /// Bytes of the largest file that it may write.
    most_written: Mutex<u64>,
}

impl Vmm {
    /// Starts the monitor in its jail.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(program: &Path, uid: u32) -> Result<Arc<Self>> {
        let pid_of = |event: Event| match event {
            Event::Jailed { pid } => Ok(pid),
            Event::Stopped(Stopped::Failed(reason)) => Err(reason),
            other => Err(format!("the virtual machine monitor said {other:?} first")),
        };
        let process = Jailed::start(program, &[uid.to_string()], None::<(&(), _)>, pid_of).await?;
        let vmm = Arc::new(Self {
            process,
            added: watch::Sender::default(),
            vcpus: watch::Sender::new(Ok(0)),
            detached: watch::Sender::default(),
            streams: Mutex::default(),
            running: watch::Sender::new(false),
            ended: watch::Sender::new(None),
            most_written: Mutex::new(0),
        });
        tokio::spawn(Arc::clone(&vmm).listen());
        Ok(vmm)
    }

    /// Its process id on the host.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<u32, watch::Sender<StreamState>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the monitor's messages until it is gone.
    async fn listen(self: Arc<Self>) {
        let mut reason = None;
        let mut pace = Pace::default();
        loop {
            let event = self.process.receive::<Event>().await;
            pace.keep().await;
            match event {
                Ok(Some((Event::Running, _))) => {
                    self.running.send_replace(true);
                }
                Ok(Some((Event::StreamOpened { port }, _))) => {
                    if let Some(stream) = self.streams().get(&port) {
                        stream.send_replace(StreamState::Open);
                    }
                }
                Ok(Some((Event::StreamClosed { port }, _))) => {
                    if let Some(stream) = self.streams().remove(&port) {
                        stream.send_replace(StreamState::Closed);
                    }
                }
                Ok(Some((Event::AddedMemoryEnd { mib }, _))) => {
                    self.added.send_replace(mib);
                }
                Ok(Some((Event::NoRings { reason }, _))) => {
                    pace.say(|| log::warn!("disks do without io_uring (disk.io_uring): {}", one_line(&reason)));
                }
                Ok(Some((Event::DiskRefused { place, reason }, _))) => {
                    pace.say(|| log::error!("attach disk {place}: {}", one_line(&reason)));
                }
                Ok(Some((Event::DiskDetached { place }, _))) => {
                    self.detached.send_replace(Some(place));
                }
                Ok(Some((Event::Vcpus(count), _))) => {
                    self.vcpus.send_modify(|now| *now = count);
                }
                // Its last word, whether it lives or not.
                Ok(Some((Event::Stopped(stopped), _))) => {
                    reason = Some(describe(&stopped));
                    break;
                }
                Ok(Some((Event::Jailed { .. }, _))) => {}
                Ok(None) => break,
                Err(error) => {
                    reason = Some(format!("the virtual machine monitor spoke nonsense: {error}"));
                    break;
                }
            }
        }
        let ended = self.process.collect().await;
        for (_, stream) in self.streams().drain() {
            stream.send_replace(StreamState::Closed);
        }
        self.end(reason.unwrap_or_else(|| format!("the virtual machine monitor {ended}")));
    }

    /// Records why the machine ended; the first reason counts.
    fn end(&self, reason: String) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(reason);
            }
            first
        });
    }

    /// Boots the machine. `files` are the descriptors that [`Request::Boot`] names.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn boot(&self, config: &BootConfig, files: &[BorrowedFd<'_>]) -> Result<()> {
        self.process.send(&Request::Boot(config.clone()), files).await.context("send the boot request")
    }

    /// Lets the guest connect to a port; the returned state follows the stream.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn offer(&self, offer: Offer, fds: &[OwnedFd]) -> Result<watch::Receiver<StreamState>> {
        let (sender, state) = watch::channel(StreamState::Offered);
        self.streams().insert(offer.port, sender);
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.process.send(&Request::Offer(offer), &borrowed).await.context("offer a stream to the guest")?;
        Ok(state)
    }

    /// Ends the host's side of a stream once it is drained.
    pub async fn close_source(&self, port: u32) {
        // A monitor that is gone has no streams.
        let _ = self.process.send(&Request::CloseSource { port }, &[]).await;
    }

    /// Puts a network interface into an empty place of the machine; the descriptors are those that
    /// [`Request::AttachNic`] states.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn attach_nic(&self, nic: Nic, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.process.send(&Request::AttachNic(nic), fds).await.context("attach a network interface")
    }

    /// Takes a network interface away from the machine.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn detach_nic(&self, place: u32) -> Result<()> {
        self.process.send(&Request::DetachNic { place }, &[]).await.context("detach a network interface")
    }

    /// Puts a disk into an empty place of the machine, with a file for each of its parts.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn attach_disk(&self, disk: Disk, files: &[BorrowedFd<'_>]) -> Result<()> {
        self.let_write(disk.parts.iter().copied().max().unwrap_or(0))?;
        self.process.send(&Request::AttachDisk(disk), files).await.context("attach a disk")
    }

    /// Lets the monitor write files of so many bytes, and of as many as it could before: a disk's file becomes no larger by
    /// it than the disk is.
    fn let_write(&self, bytes: u64) -> Result<()> {
        let mut most = lock(&self.most_written);
        if bytes > *most {
            self.process.process.limit_files(bytes).context("let the virtual machine monitor write a disk's file")?;
            *most = bytes;
        }
        Ok(())
    }

    /// Tells the guest the size of a disk.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn resize_disk(&self, place: u32, bytes: u64) -> Result<()> {
        self.let_write(bytes)?;
        self.process.send(&Request::ResizeDisk { place, bytes }, &[]).await.context("resize a disk")
    }

    /// Takes a disk away, and returns when it is closed.
    ///
    /// # Errors
    /// When that takes too long, as for a disk that does not answer. With the monitor gone it is closed.
    pub async fn detach_disk(&self, place: u32) -> Result<()> {
        self.detached.send_replace(None);
        let (mut detached, mut ended) = (self.detached.subscribe(), self.ended());
        if self.process.send(&Request::DetachDisk { place }, &[]).await.is_err() {
            return Ok(());
        }
        let closed = async {
            tokio::select! {
                _ = detached.wait_for(|last| *last == Some(place)) => {}
                _ = ended.wait_for(Option::is_some) => {}
            }
        };
        tokio::time::timeout(DETACH_TIMEOUT, closed)
            .await
            .with_context(|| format!("detach a disk: it was not closed within {} s", DETACH_TIMEOUT.as_secs()))
    }

    /// Lets the guest have so much added memory.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub async fn add_memory(&self, mib: u64) -> Result<()> {
        self.process.send(&Request::AddMemory { mib }, &[]).await.context("add memory")
    }

    /// Follows how many MiB of its file the guest may hold, counted from the file's beginning.
    pub fn added(&self) -> watch::Receiver<u64> {
        self.added.subscribe()
    }

    /// Makes vCPUs until there are so many.
    ///
    /// # Errors
    /// When the monitor is gone, or cannot make them.
    pub async fn add_vcpus(&self, vcpus: u32) -> Result<()> {
        let (mut count, mut ended) = (self.vcpus.subscribe(), self.ended());
        if count.borrow_and_update().as_ref().is_ok_and(|count| *count >= vcpus) {
            return Ok(());
        }
        self.process.send(&Request::AddVcpus { vcpus }, &[]).await.context("make vCPUs")?;
        loop {
            tokio::select! {
                changed = count.changed() => changed.context("make vCPUs")?,
                _ = ended.wait_for(Option::is_some) => bail!("make vCPUs: the machine ended"),
            }
            match &*count.borrow_and_update() {
                Ok(count) if *count >= vcpus => return Ok(()),
                Ok(_) => {}
                Err(reason) => bail!("make vCPUs: {reason}"),
            }
        }
    }

    /// Takes an offer back, or breaks its stream.
    pub async fn withdraw(&self, port: u32) {
        let _ = self.process.send(&Request::Withdraw { port }, &[]).await;
    }

    /// Kills the machine, for a reason that its containers' exits are explained with.
    pub fn kill(&self, reason: &str) {
        self.end(reason.to_owned());
        self.process.kill();
    }

    /// Follows the end of the machine.
    pub fn ended(&self) -> Ended {
        self.ended.subscribe()
    }

    /// Waits until the vCPUs have started.
    pub async fn wait_running(&self) {
        // The sender lives in self.
        let _ = self.running.subscribe().wait_for(|running| *running).await;
    }
}

fn describe(stopped: &Stopped) -> String {
    match stopped {
        Stopped::Reset => "the guest reset the machine".into(),
        Stopped::Panic { reason, log } => {
            let log: Vec<String> = log.lines().map(one_line).collect();
            log::error!("the guest kernel's log before its panic:\n{}", log.join("\n"));
            format!("the guest kernel panicked: {}", one_line(reason))
        }
        Stopped::Failed(reason) => one_line(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::MAX_SAID;

    #[tokio::test]
    async fn a_monitor_is_heard_so_often_and_logged_so_much() {
        let (mut pace, mut said) = (Pace::default(), 0);
        let begin = Instant::now();
        for _ in 0..=MAX_EVENTS {
            pace.keep().await;
            pace.say(|| said += 1);
        }
        assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
        assert_eq!(said, MAX_LINES);
    }

    #[test]
    fn what_a_monitor_says_is_one_line_of_bounded_length() {
        let said = describe(&Stopped::Failed(format!("one\n\u{1b}[2Jtwo{}", "x".repeat(70_000))));
        assert!(said.starts_with("one  [2Jtwo") && said.len() == MAX_SAID, "{}", said.len());
        assert_eq!(describe(&Stopped::Panic { reason: "a\tb".into(), log: String::new() }), "the guest kernel panicked: a b");
    }
}
