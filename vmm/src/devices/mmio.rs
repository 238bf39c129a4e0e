//! The virtio-mmio transport (virtio 1.2, 4.2), version 2.
//!
//! ```text
//! reset -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK (the device is activated)
//!                                        any     -> FAILED / NEEDS_RESET (until the machine resets)
//! ```
//!
//! A driver may reset the device as often as it likes before DRIVER_OK. After that the queues
//! belong to the device's thread or server. Those of disks and network interfaces give them back; of
//! other devices our guest's drivers never let go, and a reset marks them as broken.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::queue::ActiveQueue;
use super::window::Window;
use super::{Activation, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

/// Register that a driver writes a queue's number to; KVM turns that into an eventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Register by which a driver acknowledges an interrupt, with the reasons that it saw.
pub const INTERRUPT_ACK: u64 = 0x64;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "CAIS".
const VENDOR: u32 = 0x5349_4143;

/// Bits of the device status (virtio 1.2, 2.1).
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
/// Bits of the interrupt status (4.2.2).
pub const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;
/// More of it than any device has that is shown in a window.
const SHOWN_CONFIG: usize = 64;
/// Feature bits that every device has (6).
const VIRTIO_F_INDIRECT_DESC: u32 = 28;
const VIRTIO_F_EVENT_IDX: u32 = 29;
const VIRTIO_F_VERSION_1: u32 = 32;

/// Features that our queues support, for devices whose queues we serve ourselves.
pub const QUEUE_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_INDIRECT_DESC;

/// A queue as its driver describes it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct QueueState {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// Everything that the driver can see or set: the transport's state, ready to be saved.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    region_select: u32,
    queues: Vec<QueueState>,
}

/// A device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    reach: Option<GuestMemory>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    state: State,
    window: Option<Window>,
}

impl MmioTransport {
    /// A device after reset.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> std::io::Result<Self> {
        let queues = device.most_queues();
        let kicks = (0..queues).map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)).collect::<Result<_, _>>()?;
        let state = State { queues: vec![QueueState::default(); queues], ..State::default() };
        Ok(Self { device, memory, reach: None, interrupt: Arc::new(Interrupt::new()?), kicks, state, window: None })
    }

    /// Lets the device have buffers in a window for files, too.
    pub fn reaching(mut self, reach: Option<&GuestMemory>) -> Self {
        self.reach = reach.cloned();
        self
    }

    /// Shows the registers in a window from now on. The device's own changes are shown by [`Self::show`] alone,
    /// and it must not interrupt for one of its configuration.
    pub fn show_in(&mut self, window: Window) {
        self.window = Some(window);
        self.show();
    }

    /// Brings the window up to date, if there is one.
    pub fn show(&self) {
        let Some(window) = &self.window else { return };
        let mut config = [0; SHOWN_CONFIG];
        self.device.read_config(0, &mut config);
        window.show_bytes(CONFIG, &config);
        (0..CONFIG).step_by(4).for_each(|offset| window.show(offset, self.register(offset)));
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The notifications of the queues, in order.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// A read of the registers.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
            return;
        }
        // Registers are 32 bits wide and read whole (4.2.2.2); anything else reads as zero.
        let value = if data.len() == 4 { self.register(offset) } else { 0 };
        for (byte, source) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = source;
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.id(),
            0x0c => VENDOR,
            0x10 => match self.state.device_features_select {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            0x34 => self.device.queue_sizes().get(self.state.queue_select as usize).copied().map_or(0, u32::from),
            0x44 => u32::from(self.queue().is_some_and(|queue| queue.ready)),
            // Whether a queue was used is not recorded: a server in another process interrupts
            // without us. Telling the driver to look is always right.
            0x60 => INTERRUPT_QUEUE | if self.interrupt.config_changed() { INTERRUPT_CONFIG } else { 0 },
            0x70 => self.state.status,
            // Of a shared memory region that there is not the length is all ones (4.2.2).
            0xb0 => self.shared_memory().1 as u32,
            0xb4 => (self.shared_memory().1 >> 32) as u32,
            0xb8 => self.shared_memory().0 as u32,
            0xbc => (self.shared_memory().0 >> 32) as u32,
            0xfc => self.device.config_generation(),
            _ => 0,
        }
    }

    /// The region that is selected.
    fn shared_memory(&self) -> (u64, u64) {
        self.device.shared_memory().filter(|_| self.state.region_select == 0).unwrap_or((u64::MAX, u64::MAX))
    }

    fn queue(&self) -> Option<&QueueState> {
        self.state.queues.get(self.state.queue_select as usize)
    }

    /// A write to the registers.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        let configurable = self.state.status & DRIVER_OK == 0;
        match offset {
            0x14 => self.state.device_features_select = value,
            0x24 => self.state.driver_features_select = value,
            0x20 if self.state.status & FEATURES_OK == 0 => self.accept_features(value),
            0x30 => self.state.queue_select = value,
            0xac => self.state.region_select = value,
            INTERRUPT_ACK if value & INTERRUPT_CONFIG != 0 => self.interrupt.acknowledge_config(),
            0x70 => self.set_status(value),
            0x38 | 0x44 | 0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 if configurable => self.set_queue(offset, value),
            _ => return,
        }
        self.show();
    }

    fn accept_features(&mut self, value: u32) {
        let shift = match self.state.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.state.driver_features & !(u64::from(u32::MAX) << shift);
        self.state.driver_features = (kept | u64::from(value) << shift) & self.device.features();
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        let max = self.device.queue_sizes().get(self.state.queue_select as usize).copied().unwrap_or(0);
        let Some(queue) = self.state.queues.get_mut(self.state.queue_select as usize) else { return };
        let low = |address: &mut u64| *address = (*address & !u64::from(u32::MAX)) | u64::from(value);
        let high = |address: &mut u64| *address = (*address & u64::from(u32::MAX)) | u64::from(value) << 32;
        match offset {
            0x38 => queue.size = u16::try_from(value).ok().filter(|size| size.is_power_of_two() && *size <= max).unwrap_or(0),
            0x44 => queue.ready = value == 1,
            0x80 => low(&mut queue.descriptors),
            0x84 => high(&mut queue.descriptors),
            0x90 => low(&mut queue.available),
            0x94 => high(&mut queue.available),
            0xa0 => low(&mut queue.used),
            _ => high(&mut queue.used),
        }
    }

    fn set_status(&mut self, value: u32) {
        let was = self.state.status;
        if value == 0 {
            if was & DRIVER_OK == 0 || self.device.reset() {
                self.state = State { queues: vec![QueueState::default(); self.state.queues.len()], ..State::default() };
            } else {
                self.state.status |= NEEDS_RESET;
            }
            return;
        }
        // A driver sets bits and never clears one but by a reset (2.1.1).
        self.state.status |= value;
        // A driver that does not know virtio 1 cannot use the device (6.1).
        if value & FEATURES_OK != 0 && self.state.driver_features & (1 << VIRTIO_F_VERSION_1) == 0 {
            self.state.status &= !FEATURES_OK;
        }
        if value & DRIVER_OK != 0 && was & DRIVER_OK == 0 {
            self.activate();
        }
    }

    /// Hands the queues to the device; a device that cannot be activated says so by NEEDS_RESET.
    fn activate(&mut self) {
        let activated = self.active_queues().and_then(|queues| {
            let activation = Activation {
                features: self.state.driver_features,
                queues,
                memory: self.memory.clone(),
                reach: self.reach.clone(),
                interrupt: Arc::clone(&self.interrupt),
            };
            self.device.activate(activation).map_err(|error| format!("{error}: {}", error.source))
        });
        if activated.is_err() {
            self.state.status |= NEEDS_RESET;
        }
    }

    fn active_queues(&self) -> Result<Vec<ActiveQueue>, String> {
        let event_idx = self.state.driver_features & (1 << VIRTIO_F_EVENT_IDX) != 0;
        self.state
            .queues
            .iter()
            .zip(self.device.queue_sizes())
            .zip(&self.kicks)
            .take(self.device.used_queues(self.state.driver_features))
            .map(|((state, max), kick)| {
                let mut queue = Queue::new(*max).map_err(|error| error.to_string())?;
                queue.set_size(state.size);
                queue.set_desc_table_address(Some(state.descriptors as u32), Some((state.descriptors >> 32) as u32));
                queue.set_avail_ring_address(Some(state.available as u32), Some((state.available >> 32) as u32));
                queue.set_used_ring_address(Some(state.used as u32), Some((state.used >> 32) as u32));
                queue.set_event_idx(event_idx);
                queue.set_ready(state.ready);
                if !queue.is_valid(&self.memory) {
                    return Err("a queue is not set up or lies outside of memory".into());
                }
                Ok(ActiveQueue::new(queue, kick.try_clone().map_err(|error| error.to_string())?))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ActivateError;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vm_memory::GuestAddress;

    struct Fake(Arc<AtomicUsize>);

    impl VirtioDevice for Fake {
        fn id(&self) -> u32 {
            4
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn features(&self) -> u64 {
            QUEUE_FEATURES
        }
        fn read_config(&self, _offset: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            assert_eq!(activation.queues.len(), 1);
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn transport() -> (MmioTransport, Arc<AtomicUsize>) {
        let activated = Arc::new(AtomicUsize::new(0));
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        (MmioTransport::new(Box::new(Fake(Arc::clone(&activated))), memory).unwrap(), activated)
    }

    fn get(transport: &mut MmioTransport, offset: u64) -> u32 {
        let mut data = [0; 4];
        transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(transport: &mut MmioTransport, offset: u64, value: u32) {
        transport.write(offset, &value.to_le_bytes());
    }

    /// What a driver does to bring the device up, with its queue's used ring at `used`.
    fn bring_up(transport: &mut MmioTransport, used: u32) {
        for status in [0, 1, 3] {
            set(transport, 0x70, status);
        }
        for half in [0, 1] {
            set(transport, 0x14, half);
            let features = get(transport, 0x10);
            set(transport, 0x24, half);
            set(transport, 0x20, features);
        }
        set(transport, 0x70, 11);
        assert_eq!(get(transport, 0x70), 11);
        for (register, value) in [(0x30, 0), (0x38, 16), (0x80, 0x1000), (0x90, 0x2000), (0xa0, used), (0x44, 1)] {
            set(transport, register, value);
        }
        set(transport, 0x70, 15);
    }

    #[test]
    fn a_driver_finds_the_device_and_activates_it_once() {
        let (mut transport, activated) = transport();
        assert_eq!((get(&mut transport, 0), get(&mut transport, 4), get(&mut transport, 8)), (MAGIC, 2, 4));
        bring_up(&mut transport, 0x3000);
        set(&mut transport, 0x70, 15);
        assert_eq!((activated.load(Ordering::Relaxed), get(&mut transport, 0x70)), (1, 15));
    }

    #[test]
    fn a_window_shows_what_a_read_would_find() {
        let (mut transport, _) = transport();
        let windows = super::super::window::Windows::new(2).unwrap();
        transport.show_in(windows.window(1));
        bring_up(&mut transport, 0x3000);
        set(&mut transport, 0x30, 3);
        let shown = |offset| windows.shown(1, offset);
        for offset in (0..CONFIG + 64).step_by(4) {
            assert_eq!(shown(offset), get(&mut transport, offset), "{offset:#x}");
        }
        assert_eq!((shown(0x70), shown(0x44)), (15, 0), "a queue that is not there is not ready");
        set(&mut transport, 0x70, 0);
        assert_eq!(shown(0x70), get(&mut transport, 0x70), "after a reset");
    }

    #[test]
    fn a_queue_outside_of_memory_is_refused() {
        let (mut transport, activated) = transport();
        bring_up(&mut transport, 0xfff0_0000);
        assert_eq!((activated.load(Ordering::Relaxed), get(&mut transport, 0x70)), (0, 15 | NEEDS_RESET));
    }

    #[test]
    fn a_driver_without_virtio_1_is_refused() {
        let (mut transport, _) = transport();
        set(&mut transport, 0x70, 3);
        set(&mut transport, 0x70, 11);
        assert_eq!(get(&mut transport, 0x70) & FEATURES_OK, 0);
    }

    #[test]
    fn a_reset_after_activation_marks_the_device_broken() {
        let (mut transport, activated) = transport();
        bring_up(&mut transport, 0x3000);
        set(&mut transport, 0x70, 0);
        assert_ne!(get(&mut transport, 0x70) & NEEDS_RESET, 0);
        bring_up_is_refused(&mut transport);
        assert_eq!(activated.load(Ordering::Relaxed), 1);
    }

    fn bring_up_is_refused(transport: &mut MmioTransport) {
        for status in [1, 3, 11, 15] {
            set(transport, 0x70, status);
        }
        assert_ne!(get(transport, 0x70) & NEEDS_RESET, 0);
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics(accesses in proptest::collection::vec((any::<bool>(), 0u64..0x200, any::<u32>(), 1usize..9), 0..200)) {
            let (mut transport, _) = transport();
            for (write, offset, value, length) in accesses {
                let mut data = u64::from(value).to_le_bytes();
                if write { transport.write(offset, &data[..length]) } else { transport.read(offset, &mut data[..length]) }
            }
        }
    }
}
