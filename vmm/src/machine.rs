//! The machine: KVM, memory, devices and vCPUs, put together in the order that they need.
#![expect(unsafe_code, reason = "KVM takes guest memory by address, and its descriptor by number")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use anyhow::{Context, Result, ensure};
use caisson_host::control::Control;
use caisson_protocol::guest::{FIRST_DISK_DEVICE, FIRST_NIC_DEVICE};
use caisson_protocol::vmm::{
    ADDED_MIB_STEP, BLOCK_SIZES, BootConfig, DISK_PARTS, DISKS, Disk, Event, FILES_MIB, MEMORY_MIB, NICS, Nic, Stopped, VCPUS,
};
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::files::FileWindow;
use crate::devices::io_thread::{Attached, Command, Commands, IoThread};
use crate::devices::mmio::{INTERRUPT_ACK, INTERRUPT_QUEUE, MmioTransport, QUEUE_NOTIFY};
use crate::devices::serial::Serial;
use crate::devices::window::Windows;
use crate::devices::{Bus, DeviceSlot, MMIO_SIZE, balloon, blk, fs, mem, net, rng, vsock};
use crate::memory::{self, GuestMemory, Layout, MMIO_START};
use crate::restrict::restrict;
use crate::vcpus::{Surroundings, Vcpus};
use crate::{kernel, mptable, vcpu};

/// The API version that every KVM has had since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// First interrupt line for devices; those below belong to the PC.
const FIRST_IRQ: u32 = 5;
/// Lines that disks share: those of the IOAPIC that the devices before them leave.
const DISK_IRQS: std::ops::Range<u32> = FIRST_IRQ + FIRST_DISK_DEVICE..mptable::IRQS as u32;
/// Interrupt line of the first serial port.
const SERIAL_IRQ: u32 = 4;
/// A window for files may be so many times as large as memory: the kernel takes a 64th of its size to describe it, and is to
/// have most of its memory for something else.
const WINDOW_PER_MEMORY: u64 = 16;
/// Three pages that Intel's VMX needs to run real mode, out of everything's way.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine boots from.
pub struct BootFiles {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// ELF kernel.
    pub kernel: File,
    /// cpio archive.
    pub initramfs: File,
    /// Guest memory, of the configured size.
    pub memory: File,
    /// Memory that may be added later, as large as it may become.
    pub added: File,
    /// vhost-user socket of the virtio-fs server.
    pub fs: OwnedFd,
    /// Where the serial console is written to.
    pub console: Option<File>,
}

/// A machine whose vCPUs do not run yet.
pub struct Machine {
    around: Surroundings,
    first_vcpus: Vec<VcpuFd>,
    vcpus: Vcpus,
    io: IoThread,
    commands: Commands,
    places: Places,
    added: Arc<mem::Shared>,
    acknowledged: EventFd,
    vm: Arc<VmFd>,
}

/// A machine whose vCPUs run.
pub struct Running {
    /// The way to the device thread.
    pub commands: Commands,
    places: Places,
    bus: Arc<Bus>,
    /// The memory that is added.
    added: Arc<mem::Shared>,
    /// Takes how many vCPUs there are to be.
    wanted_vcpus: Sender<u32>,
    memory: GuestMemory,
    /// The slot and the address of the room for added memory, until KVM knows of it.
    room: Option<(u32, GuestAddress)>,
    /// Takes the drivers' acknowledgements of what queues interrupted for; nobody reads it.
    acknowledged: EventFd,
    // Closing the VM's descriptor would disconnect every interrupt, whoever else holds the VM.
    vm: Arc<VmFd>,
}

impl Running {
    /// Puts an interface into an empty place; the guest finds it when it looks again.
    ///
    /// # Errors
    /// When there is no such place, or it is not empty.
    pub fn attach_nic(&mut self, nic: Nic, attached: Attached) -> Result<()> {
        let index = nic.place as usize;
        let place = self.nic(nic.place)?.clone();
        self.connect(FIRST_NIC_DEVICE + nic.place)?;
        // The wire first: once the device appears its driver may come at any time.
        self.commands.send(Command::AttachNic(index, attached))?;
        ensure!(place.attach(nic), "network interface {index}: its place is taken");
        self.show(FIRST_NIC_DEVICE + nic.place)
    }

    /// Takes an interface away.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn detach_nic(&self, index: u32) -> Result<()> {
        self.nic(index)?.detach();
        self.show(FIRST_NIC_DEVICE + index)?;
        Ok(self.commands.send(Command::DetachNic(index as usize, None))?)
    }

    fn nic(&self, index: u32) -> Result<&net::Place> {
        self.places.nics.get(index as usize).with_context(|| format!("network interface {index}: there are {NICS} places"))
    }

    /// Puts a disk into an empty place; the guest finds it when it looks again.
    ///
    /// # Errors
    /// When there is no such place, it is not empty, or the disk is none that can be.
    pub fn attach_disk(&mut self, disk: Disk, files: Vec<File>, control: &Arc<Control>) -> Result<()> {
        let index = disk.place;
        let place = self.disk(index)?.clone();
        ensure!(BLOCK_SIZES.contains(&disk.block_size), "disk {index}: blocks of {} bytes; allowed is {BLOCK_SIZES:?}", disk.block_size);
        let parts = disk.parts.len();
        ensure!((1..=DISK_PARTS).contains(&parts), "disk {index}: {parts} parts; allowed is 1 to {DISK_PARTS}");
        ensure!(parts == files.len(), "disk {index}: {parts} parts came with {} descriptors", files.len());
        ensure!(parts == 1 || disk.read_only, "disk {index}: of {parts} parts, it must be read-only");
        let queues = self.connect(FIRST_DISK_DEVICE + index)?;
        place.attach(disk, files, queues, control).with_context(|| format!("disk {index}"))
    }

    /// The place for a disk.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn disk(&self, index: u32) -> Result<&blk::Place> {
        self.places.disks.get(index as usize).with_context(|| format!("disk {index}: there are {} places", self.places.disks.len()))
    }

    /// Lets KVM know of a place's interrupt and notifications; returns how many of these it has.
    fn connect(&mut self, device: u32) -> Result<usize> {
        // The guest may hold the transport for as long as a disk takes to answer: it is asked once.
        if let Some(kicks) = self.places.connected.get(&device) {
            return Ok(*kicks);
        }
        let transport = self.bus.transport(device as usize).with_context(|| format!("device {device} does not exist"))?;
        connect(&self.vm, &transport, &slot(device), &self.acknowledged)?;
        let kicks = transport.kicks().len();
        self.places.connected.insert(device, kicks);
        Ok(kicks)
    }

    /// Has a device's window show what it is now.
    fn show(&self, device: u32) -> Result<()> {
        self.bus.transport(device as usize).with_context(|| format!("device {device} does not exist"))?.show();
        Ok(())
    }

    /// Asks the guest to have so much memory added.
    ///
    /// # Errors
    /// When there is no room for so much.
    pub fn add_memory(&mut self, mib: u64) -> Result<()> {
        // KVM describes the room for it page by page: not before it is wanted.
        if let Some((slot, region)) = self.room.take() {
            give_memory(&self.vm, &self.memory, slot, region)?;
        }
        ensure!(self.added.request(mib << 20), "{mib} MiB of added memory: there is no room for so much");
        Ok(self.commands.send(Command::MemoryRequested)?)
    }

    /// Makes vCPUs until there are so many; the shim hears of each, or why there is none.
    ///
    /// # Errors
    /// When the shim is gone.
    pub fn add_vcpus(&self, control: &Control, count: u32) -> Result<()> {
        if self.wanted_vcpus.send(count).is_err() {
            let reason = "there is no thread for another one".to_owned();
            control.send(&Event::Vcpus(Err(reason)), &[], true)?;
        }
        Ok(())
    }
}

/// The places for what a pod gets after its start.
#[derive(Default)]
struct Places {
    nics: [net::Place; NICS as usize],
    disks: Vec<blk::Place>,
    /// Those whose interrupt and notifications KVM knows, with how many of the latter they have.
    connected: HashMap<u32, usize>,
}

impl Machine {
    /// Builds a machine that stands at the kernel's first instruction.
    ///
    /// # Errors
    /// What could not be done and why, in one sentence.
    pub fn build(config: &BootConfig, mut files: BootFiles, control: Arc<Control>) -> Result<Self> {
        check(config)?;
        // SAFETY: the descriptor is ours and given up here; Kvm owns it from now on.
        let kvm = unsafe { Kvm::from_raw_fd(files.kvm.into_raw_fd()) };
        ensure!(kvm.get_api_version() == KVM_API_VERSION, "/dev/kvm speaks version {} instead of {KVM_API_VERSION}", kvm.get_api_version());
        let layout = Layout::new(config.memory_mib, config.max_added_mib);
        let memory = memory::map(files.memory, files.added, layout)?;
        let vm = Arc::new(create_vm(&kvm, &memory, layout)?);

        let added = mem::Shared::new(layout.added_start(), layout.added);
        let (io, commands) = IoThread::new(Arc::clone(&added)).context("create the device thread")?;
        let window = (config.files_mib > 0).then(|| FileWindow::new(config.files_mib).map(Arc::new)).transpose();
        let window = window.context("make room for the window for files")?;
        let reach = window.as_ref().map(|window| give_window(&vm, &memory, window, layout)).transpose()?;
        let shared = window.as_ref().map(|window| (layout.window_start(), window));
        let vhost_fs = fs::VhostUserFs::connect(UnixStream::from(files.fs), shared, &control).context("connect to the virtio-fs server")?;
        let mut places = Places { disks: (0..config.disks).map(|_| blk::Place::default()).collect(), ..Places::default() };
        if config.disk_rings
            && let Err(error) = places.disks.iter_mut().try_for_each(|place| place.add_rings(config.max_vcpus))
        {
            places.disks.iter_mut().for_each(blk::Place::remove_rings);
            control.send(&Event::NoRings { reason: error.to_string() }, &[], true).context("report that there are no rings")?;
        }
        let mut transports = vec![
            MmioTransport::new(Box::new(vhost_fs), memory.clone())?,
            MmioTransport::new(Box::new(vsock::Vsock::new(commands.clone())), memory.clone())?,
            MmioTransport::new(Box::new(rng::Rng::new(commands.clone())), memory.clone())?,
        ];
        for (index, place) in places.nics.iter().enumerate() {
            let device = net::Net::new(index, place.clone(), commands.clone());
            transports.push(MmioTransport::new(Box::new(device), memory.clone())?.reaching(reach.as_ref()));
        }
        transports.push(MmioTransport::new(Box::new(mem::Mem::new(Arc::clone(&added), commands.clone())), memory.clone())?);
        let balloon = balloon::Balloon::new(commands.clone(), config.report_free_memory);
        transports.push(MmioTransport::new(Box::new(balloon), memory.clone())?);
        for place in &places.disks {
            let device = blk::Blk::new(place.clone(), config.max_vcpus);
            transports.push(MmioTransport::new(Box::new(device), memory.clone())?.reaching(reach.as_ref()));
        }
        let slots: Vec<DeviceSlot> = (0u32..).take(transports.len()).map(slot).collect();
        show_windows(&vm, memory.num_regions() as u32, &mut transports)?;
        let acknowledged = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("make an eventfd")?;
        for (device, transport) in (0u32..).zip(&transports) {
            if !is_place(device) {
                connect(&vm, transport, &slot(device), &acknowledged)?;
            }
        }
        let serial = files.console.map(Serial::new).transpose().context("create the serial console")?;
        if let Some(serial) = &serial {
            vm.register_irqfd(serial.interrupt(), SERIAL_IRQ).context("connect the serial console's interrupt")?;
        }

        let command_line = kernel::command_line(layout, &slots, config);
        let entry = kernel::load(&memory, layout, &mut files.kernel, &mut files.initramfs, &command_line)?;
        mptable::write(&memory, config.max_vcpus as u8).context("write the MP table")?;
        vcpu::write_boot_tables(&memory)?;
        let vcpus = Vcpus::new(&kvm, Arc::clone(&vm), config)?;
        let first_vcpus = (0..config.vcpus as u8).map(|index| vcpus.make(index, (index == 0).then_some(entry))).collect::<Result<_>>()?;
        let around = Surroundings {
            control,
            memory,
            layout,
            bus: Arc::new(Bus::new(transports, serial, window.map(|window| (layout.window_start(), window)))),
        };
        Ok(Self { around, first_vcpus, vcpus, io, commands, places, added, acknowledged, vm })
    }

    /// Starts the device thread and the vCPUs.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(self) -> Result<Running> {
        let Self { around, first_vcpus, vcpus, io, commands, places, added, acknowledged, vm } = self;
        let bus = Arc::clone(&around.bus);
        io.spawn(Arc::clone(&around.control)).context("start the device thread")?;
        let (memory, layout) = (around.memory.clone(), around.layout);
        let room = (layout.added > 0).then(|| (memory.num_regions() as u32 - 1, GuestAddress(layout.added_start())));
        let wanted_vcpus = vcpus.start(first_vcpus, around)?;
        Ok(Running { commands, places, bus, added, wanted_vcpus, memory, room, acknowledged, vm })
    }
}

/// Refuses a machine of a size that there is none of.
fn check(config: &BootConfig) -> Result<()> {
    let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
    for vcpus in [config.vcpus, config.max_vcpus] {
        ensure!(VCPUS.contains(&vcpus), "{vcpus} vCPUs: allowed is {} to {}", VCPUS.start(), VCPUS.end());
    }
    ensure!(config.vcpus <= config.max_vcpus, "{} vCPUs: there may be at most {} later", config.vcpus, config.max_vcpus);
    ensure!(MEMORY_MIB.contains(&config.memory_mib), "{} MiB of memory: allowed is {least} to {most}", config.memory_mib);
    let room = most - config.memory_mib;
    ensure!(
        config.max_added_mib <= room && config.max_added_mib.is_multiple_of(ADDED_MIB_STEP),
        "{} MiB of added memory: allowed is 0 to {room}, in steps of {ADDED_MIB_STEP}",
        config.max_added_mib
    );
    ensure!(DISKS.contains(&config.disks), "{} places for disks: allowed is {} to {}", config.disks, DISKS.start(), DISKS.end());
    let (least, most) = (FILES_MIB.start(), FILES_MIB.end());
    let allowed = config.files_mib == 0 || (FILES_MIB.contains(&config.files_mib) && config.files_mib.is_multiple_of(2));
    ensure!(allowed, "{} MiB for a window for files: allowed is 0, or an even number from {least} to {most}", config.files_mib);
    let most = config.memory_mib * WINDOW_PER_MEMORY;
    ensure!(
        config.files_mib <= most,
        "a window of {} MiB for files takes too much of {} MiB of memory for the kernel's description of it; allowed is up to {most} MiB",
        config.files_mib,
        config.memory_mib
    );
    Ok(())
}

/// Reports why the VM stopped, and ends the process with all its threads.
pub fn stop(control: &Control, reason: Stopped) -> ! {
    // When the shim is gone there is nobody left to tell.
    let _ = control.send(&Event::Stopped(reason), &[], true);
    std::process::exit(0);
}

/// Creates the VM with its interrupt controllers, timer and memory.
fn create_vm(kvm: &Kvm, memory: &GuestMemory, layout: Layout) -> Result<VmFd> {
    let vm = kvm.create_vm().context("create a KVM virtual machine")?;
    vm.set_tss_address(TSS_ADDRESS).context("set the TSS address")?;
    vm.create_irq_chip().context("create the interrupt controllers")?;
    // A thread of the host's kernel runs it. A guest that has its processors' own timers needs none.
    if !kvm.check_extension(Cap::TscDeadlineTimer) {
        vm.create_pit2(kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).context("create the timer")?;
    }
    restrict(kvm, &vm)?;
    let first = memory.iter().map(GuestMemoryRegion::start_addr).filter(|start| layout.added == 0 || start.0 != layout.added_start());
    for (slot, start) in (0u32..).zip(first) {
        give_memory(&vm, memory, slot, start)?;
    }
    Ok(vm)
}

/// Gives KVM the region of guest memory that starts at an address.
fn give_memory(vm: &VmFd, memory: &GuestMemory, slot: u32, start: GuestAddress) -> Result<()> {
    let region = memory.find_region(start).context("find guest memory")?;
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: start.0,
        memory_size: region.len(),
        userspace_addr: memory.get_host_address(start).context("find guest memory")? as u64,
    };
    // SAFETY: the mapping is that of `memory`, which Machine and its threads keep to the process's end.
    unsafe { vm.set_user_memory_region(region) }.context("give the VM its memory")
}

/// Gives KVM the window for files behind all memory; returns both together.
fn give_window(vm: &VmFd, memory: &GuestMemory, window: &FileWindow, layout: Layout) -> Result<GuestMemory> {
    let start = layout.window_start();
    let reach = memory::with_window(memory, window, start)?;
    // Behind the slots of memory, and that of the register windows.
    give_memory(vm, &reach, memory.num_regions() as u32 + 1, GuestAddress(start))?;
    Ok(reach)
}

/// Gives the guest the windows of the devices whose registers change by its own doing, as memory that it
/// cannot write.
fn show_windows(vm: &VmFd, slot: u32, transports: &mut [MmioTransport]) -> Result<()> {
    let shown = (FIRST_NIC_DEVICE + NICS) as usize;
    let windows = Windows::new(shown).context("map the register windows")?;
    for (index, transport) in transports.iter_mut().enumerate().take(shown) {
        transport.show_in(windows.window(index));
    }
    let region = kvm_userspace_memory_region {
        slot,
        flags: kvm_bindings::KVM_MEM_READONLY,
        guest_phys_addr: MMIO_START,
        memory_size: windows.bytes(),
        userspace_addr: windows.address(),
    };
    // SAFETY: the mapping is that of the windows, each of which keeps it; the bus has them as long as the machine runs.
    unsafe { vm.set_user_memory_region(region) }.context("give the VM its register windows")
}

/// Where a device is, by its number.
const fn slot(device: u32) -> DeviceSlot {
    let irq = match device.checked_sub(FIRST_DISK_DEVICE) {
        Some(disk) => DISK_IRQS.start + disk % (DISK_IRQS.end - DISK_IRQS.start),
        None => FIRST_IRQ + device,
    };
    DeviceSlot { base: MMIO_START + device as u64 * MMIO_SIZE, irq }
}

/// Whether a device, by its number, is a place for what may come later: KVM need not know of it before.
const fn is_place(device: u32) -> bool {
    device >= FIRST_DISK_DEVICE || (device >= FIRST_NIC_DEVICE && device < FIRST_NIC_DEVICE + NICS)
}

/// Lets KVM deliver a device's notifications and interrupts by eventfd.
fn connect(vm: &VmFd, transport: &MmioTransport, slot: &DeviceSlot, acknowledged: &EventFd) -> Result<()> {
    vm.register_irqfd(transport.interrupt().eventfd(), slot.irq).context("connect a device's interrupt")?;
    for (queue, kick) in (0u32..).zip(transport.kicks()) {
        vm.register_ioevent(kick, &IoEventAddress::Mmio(slot.base + QUEUE_NOTIFY), queue).context("connect a queue's notification")?;
    }
    // That a queue's interrupt was seen is of no interest: let the guest go on. Whether the configuration was is.
    let acknowledge = IoEventAddress::Mmio(slot.base + INTERRUPT_ACK);
    vm.register_ioevent(acknowledged, &acknowledge, INTERRUPT_QUEUE).context("connect a device's acknowledgements")?;
    Ok(())
}
