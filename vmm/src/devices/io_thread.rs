//! The thread that serves the queues of our own devices and the streams behind vsock.
//!
//! One epoll loop. It owns all that it serves: device fronts and the control thread send it
//! commands, and nothing else touches its state.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use caisson_host::control::Control;
use caisson_protocol::vmm::{Event, NICS, Offer, RateLimit, Stopped};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::BalloonServer;
use super::mem::MemServer;
use super::net::NetServer;
use super::net::kernel::Kernel;
use super::net::wire::Wire;
use super::rng::RngServer;
use super::vsock::VsockServer;
use super::vsock::muxer::{FIRST_TOKEN, Muxer};
use super::{Activation, mem, net};
use crate::filters;
use crate::machine::stop;

/// Between two reports of how far added memory is in use.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Events taken from epoll at a time.
const BATCH: usize = 64;
/// Tokens of what is not a stream; streams count from [`FIRST_TOKEN`].
const WAKE: u64 = 0;
const RNG_QUEUE: u64 = 1;
const VSOCK_RX: u64 = 2;
const VSOCK_TX: u64 = 3;
/// Of a network interface: these and four more for each interface before it.
const NET_RX: u64 = 4;
const NET_TX: u64 = 5;
const NET_WIRE: u64 = 6;
const NET_CONTROL: u64 = 7;
const NET_TOKENS: u64 = 4;
const NET_END: u64 = NET_RX + NET_TOKENS * NICS as u64;
const MEM_QUEUE: u64 = NET_END;
const BALLOON_REPORTS: u64 = NET_END + 1;
const _: () = assert!(BALLOON_REPORTS < FIRST_TOKEN);

/// Which of the thread's devices an activation is for.
#[derive(Debug, Clone, Copy)]
pub enum Server {
    /// The entropy device.
    Rng,
    /// vsock.
    Vsock,
    /// A network interface, by its place.
    Net(usize),
    /// Memory.
    Mem,
    /// Reports of free memory.
    Balloon,
}

/// What the thread is told.
pub enum Command {
    /// A device's driver is ready.
    Activate(Server, Activation),
    /// The guest may open a stream.
    Offer(Offer, Vec<OwnedFd>),
    /// End the host's side of a stream.
    CloseSource(u32),
    /// Take an offer back, or break its stream.
    Withdraw(u32),
    /// The wire of a network interface, and the kernel's server for it, before its driver is ready.
    AttachNic(usize, Attached),
    /// Let go of a network interface; who waits for that hears of it.
    DetachNic(usize, Option<Sender<()>>),
    /// Another size of added memory is requested.
    MemoryRequested,
}

/// The way to tell the thread.
#[derive(Clone)]
pub struct Commands {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    /// Hands a command over.
    ///
    /// # Errors
    /// When the thread is gone, which is when the process ends.
    pub fn send(&self, command: Command) -> io::Result<()> {
        self.sender.send(command).map_err(|_| io::Error::other("the device thread is gone"))?;
        self.wake.write(1)
    }
}

/// What a network interface is attached by.
pub enum Attached {
    /// Where its frames go, not blocking, and what may pass each way.
    Served(Wire, RateLimit),
    /// The host's kernel serves it: for each pair of queues a tap and `/dev/vhost-net`.
    Kernel(Vec<(File, File)>),
}

/// A place for a network interface.
#[derive(Default)]
enum NetPlace {
    #[default]
    Empty,
    Attached(Attached),
    /// By the host's kernel.
    ServedOutside(Kernel),
    InService {
        server: Box<NetServer>,
        /// What the thread's epoll watches the wire for; it is not in there for nothing.
        watched: EventSet,
    },
}

/// The thread's state before and while it runs.
pub struct IoThread {
    epoll: Arc<Epoll>,
    wake: Arc<EventFd>,
    commands: Receiver<Command>,
    muxer: Muxer,
    vsock: Option<VsockServer>,
    rng: Option<RngServer>,
    nets: [NetPlace; NICS as usize],
    added: Arc<mem::Shared>,
    mem: Option<MemServer>,
    /// Where added memory ended when the shim was last told, and when that was.
    reported: u64,
    reported_at: Instant,
    balloon: Option<BalloonServer>,
}

impl IoThread {
    /// A thread that is not started yet, and the way to tell it; `added` is what the memory device shares.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(added: Arc<mem::Shared>) -> io::Result<(Self, Commands)> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let (sender, commands) = channel();
        let thread = Self {
            muxer: Muxer::new(Arc::clone(&epoll)),
            epoll,
            wake: Arc::clone(&wake),
            commands,
            vsock: None,
            rng: None,
            nets: Default::default(),
            added,
            mem: None,
            reported: 0,
            reported_at: Instant::now(),
            balloon: None,
        };
        Ok((thread, Commands { sender, wake }))
    }

    /// Starts the thread. When it fails, so does the VM.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn spawn(mut self, control: Arc<Control>) -> io::Result<()> {
        std::thread::Builder::new().name("devices".into()).spawn(move || {
            let error = filters::io().map_err(anyhow::Error::from).and_then(|()| self.run(&control).map_err(anyhow::Error::from));
            if let Err(error) = error {
                stop(&control, Stopped::Failed(format!("serve devices: {error:#}")));
            }
        })?;
        Ok(())
    }

    fn run(&mut self, control: &Control) -> io::Result<()> {
        loop {
            let waits = [self.report_added(control)?, self.release_frames()?];
            // Of two waits the shorter one; -1 is the longest.
            let timeout = waits.into_iter().filter(|wait| *wait >= 0).min().unwrap_or(-1);
            self.turn(control, timeout)?;
        }
    }

    /// Serves what is ready, or else what is within `timeout` milliseconds (-1: whenever it is).
    ///
    /// # Errors
    /// When a descriptor cannot be watched or served, or the shim not be told.
    pub fn turn(&mut self, control: &Control, timeout: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                WAKE => self.obey()?,
                RNG_QUEUE => self.rng.iter_mut().for_each(RngServer::serve),
                VSOCK_RX => self.vsock.iter().for_each(VsockServer::clear_rx_kick),
                VSOCK_TX => {
                    if let Some(vsock) = &mut self.vsock {
                        vsock.transmit(&mut self.muxer);
                    }
                }
                token @ NET_RX..NET_END => self.serve_net((token - NET_RX) / NET_TOKENS, (token - NET_RX) % NET_TOKENS)?,
                MEM_QUEUE => self.mem.iter_mut().for_each(MemServer::serve),
                BALLOON_REPORTS => self.balloon.iter_mut().for_each(BalloonServer::serve),
                token => self.muxer.ready(token),
            }
        }
        if let Some(vsock) = &mut self.vsock {
            vsock.fill(&mut self.muxer);
        }
        for port in self.muxer.take_opened() {
            control.send(&Event::StreamOpened { port }, &[], true)?;
        }
        for port in self.muxer.take_closed() {
            control.send(&Event::StreamClosed { port }, &[], true)?;
        }
        Ok(())
    }

    fn obey(&mut self) -> io::Result<()> {
        // The counter only wakes us; the channel holds the commands.
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Offer(offer, fds) => self.muxer.offer(offer, fds)?,
                Command::CloseSource(port) => self.muxer.close_source(port),
                Command::Withdraw(port) => self.muxer.withdraw(port),
                Command::AttachNic(place, attached) => {
                    if let Some(place @ NetPlace::Empty) = self.nets.get_mut(place) {
                        *place = NetPlace::Attached(attached);
                    }
                }
                Command::DetachNic(place, done) => {
                    self.detach_net(place)?;
                    if let Some(done) = done {
                        // It may have stopped to wait.
                        let _ = done.send(());
                    }
                }
                Command::Activate(Server::Net(place), activation) => self.activate_net(place, activation)?,
                Command::MemoryRequested => self.mem.iter().for_each(MemServer::requested),
                Command::Activate(Server::Mem, activation) => {
                    let server = MemServer::new(activation, Arc::clone(&self.added))?;
                    self.watch(server.kick(), MEM_QUEUE)?;
                    self.mem = Some(server);
                }
                Command::Activate(Server::Balloon, activation) => {
                    let server = BalloonServer::new(activation)?;
                    self.watch(server.kick(), BALLOON_REPORTS)?;
                    self.balloon = Some(server);
                }
                Command::Activate(Server::Rng, activation) => {
                    let server = RngServer::new(activation)?;
                    self.watch(server.kick(), RNG_QUEUE)?;
                    self.rng = Some(server);
                }
                Command::Activate(Server::Vsock, activation) => {
                    let server = VsockServer::new(activation)?;
                    self.watch(server.rx_kick(), VSOCK_RX)?;
                    self.watch(server.tx_kick(), VSOCK_TX)?;
                    self.vsock = Some(server);
                }
            }
        }
        Ok(())
    }

    fn watch(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
    }

    fn activate_net(&mut self, place: usize, activation: Activation) -> io::Result<()> {
        let Some(NetPlace::Attached(attached)) = self.nets.get_mut(place).map(std::mem::take) else {
            // It was taken away while its driver came up.
            return Ok(());
        };
        let first = NET_TOKENS * place as u64;
        let (wire, limit) = match attached {
            Attached::Served(wire, limit) => (wire, limit),
            Attached::Kernel(wires) => {
                let kernel = Kernel::start(wires, activation)?;
                kernel.control_kick().map_or(Ok(()), |kick| self.watch(kick, first + NET_CONTROL))?;
                self.nets[place] = NetPlace::ServedOutside(kernel);
                return Ok(());
            }
        };
        if let Wire::Tap(tap) = &wire {
            net::set_offloads(tap, activation.features)?;
        }
        let server = NetServer::new(activation, wire, limit)?;
        self.watch(server.rx_kick(), first + NET_RX)?;
        self.watch(server.tx_kick(), first + NET_TX)?;
        self.watch(server.wire(), first + NET_WIRE)?;
        self.nets[place] = NetPlace::InService { server: Box::new(server), watched: EventSet::IN };
        Ok(())
    }

    /// Closes all that an interface has. The transport keeps the notifications open, so that they leave
    /// the epoll by our word.
    fn detach_net(&mut self, place: usize) -> io::Result<()> {
        let taken = self.nets.get_mut(place).map(std::mem::take);
        let watched = match &taken {
            Some(NetPlace::InService { server, watched }) => {
                let wire = (!watched.is_empty()).then(|| server.wire().as_raw_fd());
                [Some(server.rx_kick().as_raw_fd()), Some(server.tx_kick().as_raw_fd()), wire]
            }
            Some(NetPlace::ServedOutside(kernel)) => [kernel.control_kick().map(AsRawFd::as_raw_fd), None, None],
            _ => return Ok(()),
        };
        watched.into_iter().flatten().try_for_each(|fd| self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()))
    }

    fn serve_net(&mut self, place: u64, source: u64) -> io::Result<()> {
        let (server, watched) = match self.nets.get_mut(place as usize) {
            Some(NetPlace::InService { server, watched }) => (server, watched),
            Some(NetPlace::ServedOutside(kernel)) => {
                // With more to do the thread comes back by itself.
                let again = kernel.obey().then(|| kernel.control_kick()).flatten();
                return again.map_or(Ok(()), |kick| kick.write(1));
            }
            _ => return Ok(()),
        };
        let source = source + NET_RX;
        // With more to do the thread comes back by itself.
        if (source == NET_TX || watched.contains(EventSet::OUT)) && server.transmit() {
            server.tx_kick().write(1)?;
        }
        if source == NET_RX {
            server.room();
        }
        if source != NET_TX && server.receive() {
            server.rx_kick().write(1)?;
        }
        // A wire that nobody can take from would keep the thread awake.
        let awaits = server.awaits();
        let operation = match (watched.is_empty(), awaits.is_empty()) {
            _ if awaits == *watched => return Ok(()),
            (true, _) => ControlOperation::Add,
            (_, true) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        *watched = awaits;
        let token = NET_WIRE + NET_TOKENS * place;
        self.epoll.ctl(operation, server.wire().as_raw_fd(), EpollEvent::new(awaits, token))
    }

    /// Carries frames on that a limit held back until now; how many milliseconds to wait before there are
    /// more, or -1.
    fn release_frames(&mut self) -> io::Result<i32> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for place in 0..u64::from(NICS) {
            for (direction, source) in [NET_TX, NET_WIRE].into_iter().enumerate() {
                if self.held(place, direction).is_some_and(|time| time <= now) {
                    self.serve_net(place, source - NET_RX)?;
                }
                next = next.into_iter().chain(self.held(place, direction)).min();
            }
        }
        // Rounded up, so that the time has come when the wait is over.
        Ok(next.map_or(-1, |time| i32::try_from(time.saturating_duration_since(now).as_millis()).unwrap_or(i32::MAX - 1) + 1))
    }

    fn held(&self, place: u64, direction: usize) -> Option<Instant> {
        match self.nets.get(place as usize) {
            Some(NetPlace::InService { server, .. }) => server.held()[direction],
            _ => None,
        }
    }

    /// Tells the shim how far added memory is in use, not too often; how many milliseconds to wait
    /// before there is more to tell, or -1.
    fn report_added(&mut self, control: &Control) -> io::Result<i32> {
        let Some(mem) = &self.mem else { return Ok(-1) };
        let end = mem.end();
        if end == self.reported {
            return Ok(-1);
        }
        let wait = REPORT_INTERVAL.saturating_sub(self.reported_at.elapsed());
        if !wait.is_zero() {
            return Ok(wait.as_millis() as i32 + 1);
        }
        (self.reported, self.reported_at) = (end, Instant::now());
        control.send(&Event::AddedMemoryEnd { mib: end >> 20 }, &[], true)?;
        Ok(-1)
    }
}
