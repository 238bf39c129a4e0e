//! The devices, and the bus by which the guest reaches them.
//!
//! Every virtio device has the same parts: a module primer that names its section of the virtio
//! 1.2 specification, a struct that is its front (configuration space and features), and what
//! serves its queues once the driver is ready. Devices know guest memory and an interrupt; they
//! know nothing of KVM or of the shim.

pub mod balloon;
pub mod blk;
pub mod files;
pub mod fs;
pub mod io_thread;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod serial;
pub mod vhost;
pub mod vhost_net;
pub mod vsock;
pub mod window;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use self::files::FileWindow;
use self::mmio::MmioTransport;
use self::queue::ActiveQueue;
use self::serial::Serial;
use crate::memory::{GuestMemory, MMIO_START};

/// Bytes of a device's register window.
pub const MMIO_SIZE: u64 = 0x1000;

/// Where a device is in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Guest physical address of its registers.
    pub base: u64,
    /// Interrupt line.
    pub irq: u32,
}

/// A device's interrupt line, with the reason that its status register gives.
#[derive(Debug)]
pub struct Interrupt {
    eventfd: EventFd,
    config_changed: AtomicBool,
}

impl Interrupt {
    /// A line that nothing listens to yet.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { eventfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?, config_changed: AtomicBool::new(false) })
    }

    /// The line itself, for KVM or for a server in another process.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// Tells the driver that a queue has used buffers.
    pub fn queue(&self) {
        // A full counter means that an interrupt is pending, which is what is wanted.
        let _ = self.eventfd.write(1);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config(&self) {
        self.config_changed.store(true, Ordering::Release);
        self.queue();
    }

    fn config_changed(&self) -> bool {
        self.config_changed.load(Ordering::Acquire)
    }

    fn acknowledge_config(&self) {
        self.config_changed.store(false, Ordering::Release);
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Features that the driver accepted.
    pub features: u64,
    /// The queues, as the driver set them up, each with its notification.
    pub queues: Vec<ActiveQueue>,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Guest memory with the window for files, where there is one: buffers may lie in it for whoever reads and writes them by
    /// system calls alone.
    pub reach: Option<GuestMemory>,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
}

/// A device that could not be taken into service.
#[derive(Debug, thiserror::Error)]
#[error("activate {device}")]
pub struct ActivateError {
    /// Which device.
    pub device: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// A virtio device, as the transport sees it.
///
/// Life cycle: the transport reads identity, features and configuration at any time; it calls
/// [`VirtioDevice::activate`] when the driver is ready and the queues are valid, and not again until
/// [`VirtioDevice::reset`] has given the queues back.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, 5).
    fn id(&self) -> u32;
    /// The most entries of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The most queues that it has at any time.
    fn most_queues(&self) -> usize {
        self.queue_sizes().len()
    }
    /// How many of its queues are used by a driver that has accepted these features.
    fn used_queues(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }
    /// Memory that it shares with the driver beside the queues', as its guest physical address and its size in bytes
    /// (2.10): the region of number 0.
    fn shared_memory(&self) -> Option<(u64, u64)> {
        None
    }
    /// Features on offer.
    fn features(&self) -> u64;
    /// Reads the configuration space; what lies beyond reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Goes up whenever the configuration space changes (2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }
    /// Takes the device into service.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Takes an active device out of service; false when that cannot be.
    fn reset(&mut self) -> bool {
        false
    }
}

/// Copies the part of a configuration space that a read asks for.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (index, byte) in (offset..).zip(data) {
        *byte = usize::try_from(index).ok().and_then(|index| config.get(index)).copied().unwrap_or(0);
    }
}

/// The guest's way to its devices, by address and by port.
pub struct Bus {
    transports: Vec<Mutex<MmioTransport>>,
    serial: Option<Mutex<Serial>>,
    /// The window for files, and where it begins.
    files: Option<(u64, Arc<FileWindow>)>,
}

/// First and last port of the first serial port.
const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// Keyboard controller: its command port, and the command that resets the machine.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

impl Bus {
    /// A bus with these devices, in windows from [`MMIO_START`] on, beside a window for files.
    pub fn new(transports: Vec<MmioTransport>, serial: Option<Serial>, files: Option<(u64, Arc<FileWindow>)>) -> Self {
        Self { transports: transports.into_iter().map(Mutex::new).collect(), serial: serial.map(Mutex::new), files }
    }

    /// Mends memory at an address that cannot be read as a file has become shorter; whether that is so.
    pub fn repair(&self, address: u64) -> bool {
        self.files.as_ref().is_some_and(|(start, files)| address.checked_sub(*start).is_some_and(|at| files.repair(at)))
    }

    /// A device, by the number of its window.
    pub fn transport(&self, index: usize) -> Option<MutexGuard<'_, MmioTransport>> {
        self.transports.get(index).map(lock)
    }

    fn device(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let transport = self.transports.get(usize::try_from(offset / MMIO_SIZE).ok()?)?;
        Some((transport, offset % MMIO_SIZE))
    }

    /// A read from device memory; where no device is, all bits are set, as on a PC.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((transport, offset)) => lock(transport).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write to device memory; where no device is, nothing happens.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.device(address) {
            lock(transport).write(offset, data);
        }
    }

    /// A read from a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match (&self.serial, data) {
            (Some(serial), [byte]) if SERIAL_PORTS.contains(&port) => *byte = lock(serial).read(port - SERIAL_PORTS.start()),
            // The keyboard controller is ready for a command.
            (_, [byte]) if port == KEYBOARD_COMMAND => *byte = 0,
            (_, data) => data.fill(0xff),
        }
    }

    /// A write to a port; true when it resets the machine.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        match (&self.serial, data) {
            (Some(serial), [byte]) if SERIAL_PORTS.contains(&port) => lock(serial).write(port - SERIAL_PORTS.start(), *byte),
            (_, [KEYBOARD_RESET]) if port == KEYBOARD_COMMAND => return true,
            _ => {}
        }
        false
    }
}

/// A thread that panicked ends the process (`panic = "abort"`), so no lock is ever poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_device_is_reads_give_ones_and_writes_nothing() {
        let bus = Bus::new(Vec::new(), None, None);
        let mut data = [0; 4];
        bus.mmio_read(MMIO_START, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.mmio_write(u64::MAX, &data);
        bus.mmio_write(0, &data);
    }

    #[test]
    fn the_keyboard_controller_resets_the_machine() {
        let bus = Bus::new(Vec::new(), None, None);
        assert!(bus.port_write(KEYBOARD_COMMAND, &[KEYBOARD_RESET]));
        assert!(!bus.port_write(KEYBOARD_COMMAND, &[0xaa]));
    }
}
