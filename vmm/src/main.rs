//! `caisson-vmm`: boots one virtual machine from file descriptors and serves it until it ends.
//!
//! ```text
//! main: jail -> receive Boot -> memory -> kernel -> devices -> vCPUs -> serve requests
//! ```
//!
//! The process opens no path: everything arrives on the control socket. It ends when the guest
//! does, or when the control socket closes, which is how it dies with its shim.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control::Control;
use caisson_host::jail::{self, Empty, Side, raise_descriptor_limit};
use caisson_protocol::vmm::{BootConfig, Event, NIC_PAIRS, Nic, NicWire, Request, Stopped};
use caisson_vmm::devices::io_thread::{Attached, Command};
use caisson_vmm::devices::net::wire::{Stream, Wire};
use caisson_vmm::machine::{BootFiles, Machine, Running};
use caisson_vmm::{filters, machine};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Streams that a pod may have open at once take two descriptors each.
const DESCRIPTOR_LIMIT: u64 = 8192;

fn main() {
    let Ok(control) = Control::inherited() else {
        eprintln!("caisson-vmm is started by containerd-shim-caisson-v2, not by hand");
        std::process::exit(2);
    };
    let control = Arc::new(control);
    let witness = Arc::clone(&control);
    jail::on_panic(move |reason| {
        machine::stop(&witness, Stopped::Failed(format!("the virtual machine monitor {reason}")));
    });
    if let Err(error) = run(&control) {
        // The shim reports it; when the shim is gone there is nobody left to tell.
        let _ = control.send(&Event::Stopped(Stopped::Failed(format!("{error:#}"))), &[], true);
        std::process::exit(1);
    }
}

fn run(control: &Arc<Control>) -> Result<()> {
    let id = std::env::args().nth(1).and_then(|id| id.parse().ok()).context("caisson-vmm needs the user id that it runs as")?;
    match (Empty { id }).unshare()? {
        Side::Outside(child) => {
            control.send(&Event::Jailed { pid: child.as_raw().unsigned_abs() }, &[], true).context("report the jailed process")?;
            return Ok(());
        }
        Side::Inside(inside) => inside.enter()?,
    }
    filters::use_one_heap();
    end_when_asked().context("take SIGTERM")?;
    raise_descriptor_limit(DESCRIPTOR_LIMIT).context("raise the limit of open descriptors")?;
    let Some((Request::Boot(config), fds)) = control.receive(true).context("receive the boot request")? else {
        bail!("the shim closed the control socket before the boot request");
    };
    let files = boot_files(&config, fds)?;
    let machine = Machine::build(&config, files, Arc::clone(control))?;
    let mut running = machine.start()?;
    control.send(&Event::Running, &[], true).context("report that the vCPUs run")?;
    filters::control()?;
    serve(control, &mut running)
}

/// Ends the process on SIGTERM, which an operator or the host's shutdown may send: a namespace's process 1 is not ended by
/// a signal that it has no handler for.
#[expect(unsafe_code, reason = "a signal handler")]
fn end_when_asked() -> nix::Result<()> {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: _exit is async-signal-safe and does not return.
        unsafe { libc::_exit(128 + libc::SIGTERM) }
    }
    let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing that a handler may not do.
    unsafe { sigaction(Signal::SIGTERM, &action) }.map(drop)
}

/// Names the descriptors that came with the boot request, in the order that [`Request::Boot`] states.
fn boot_files(config: &BootConfig, fds: Vec<OwnedFd>) -> Result<BootFiles> {
    let expected = 6 + usize::from(config.console);
    ensure!(fds.len() == expected, "the boot request came with {} descriptors instead of {expected}", fds.len());
    let mut fds = fds.into_iter();
    let mut next = || fds.next().context("a descriptor is missing");
    Ok(BootFiles {
        kvm: next()?,
        kernel: File::from(next()?),
        initramfs: File::from(next()?),
        memory: File::from(next()?),
        added: File::from(next()?),
        fs: next()?,
        console: if config.console { Some(File::from(next()?)) } else { None },
    })
}

/// What a network interface is attached by, of the descriptors that came with it.
fn wire(nic: Nic, fds: Vec<OwnedFd>) -> Result<Attached> {
    let mut files = fds.into_iter().map(File::from);
    let mut next = || files.next().context("a network interface came with too few descriptors");
    Ok(match nic.wire {
        NicWire::Tap => Attached::Served(Wire::Tap(next()?), nic.limit),
        NicWire::Stream => Attached::Served(Wire::Stream(Stream::new(next()?)), nic.limit),
        NicWire::Kernel { pairs } => {
            ensure!((1..=NIC_PAIRS).contains(&pairs), "{pairs} pairs of queues: allowed is 1 to {NIC_PAIRS}");
            let mut of_each = || (0..pairs).map(|_| next()).collect::<Result<Vec<File>>>();
            let (taps, servers) = (of_each()?, of_each()?);
            Attached::Kernel(taps.into_iter().zip(servers).collect())
        }
    })
}

/// Hands requests to the thread that owns the streams, until the shim is gone.
fn serve(control: &Arc<Control>, running: &mut Running) -> Result<()> {
    while let Some((request, fds)) = control.receive(true).context("receive a request")? {
        match request {
            Request::Boot(_) => bail!("the shim asked twice to boot"),
            Request::Offer(offer) => {
                ensure!(
                    fds.len() == offer.ends.fd_count(),
                    "offer of port {} came with {} descriptors instead of {}",
                    offer.port,
                    fds.len(),
                    offer.ends.fd_count()
                );
                running.commands.send(Command::Offer(offer, fds))?;
            }
            Request::CloseSource { port } => running.commands.send(Command::CloseSource(port))?,
            Request::Withdraw { port } => running.commands.send(Command::Withdraw(port))?,
            Request::AttachNic(nic) => {
                running.attach_nic(nic, wire(nic, fds)?)?;
            }
            Request::DetachNic { place } => running.detach_nic(place)?,
            Request::AttachDisk(disk) => {
                let place = disk.place;
                let files = fds.into_iter().map(File::from).collect();
                if let Err(error) = running.attach_disk(disk, files, control) {
                    control.send(&Event::DiskRefused { place, reason: format!("{error:#}") }, &[], true)?;
                }
            }
            Request::ResizeDisk { place, bytes } => running.disk(place)?.resize(bytes),
            Request::DetachDisk { place } => running.disk(place)?.detach(),
            Request::AddMemory { mib } => running.add_memory(mib)?,
            Request::AddVcpus { vcpus } => running.add_vcpus(control, vcpus)?,
        }
    }
    Ok(())
}
