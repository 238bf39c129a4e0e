//! The threads of the vCPUs: those that a machine starts with, and those that it gets later.
//!
//! ```text
//! created -> set up -> runs in a thread of its own, under the filter of vCPUs, to the machine's end
//! ```
//!
//! No thread that serves the guest may make threads. So where more vCPUs may be wanted later, one
//! thread waits as a spare, under a filter that lets it make its successor and a vCPU; then it
//! takes the narrower filter of vCPUs and runs that one.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};
use caisson_host::control::Control;
use caisson_protocol::vmm::{BootConfig, Event, Stopped};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::devices::Bus;
use crate::kernel::Entry;
use crate::machine::stop;
use crate::memory::{GuestMemory, Layout};
use crate::{cpuid, filters, panic_log, vcpu};

/// What makes vCPUs.
pub struct Vcpus {
    vm: Arc<VmFd>,
    supported: CpuId,
    tsc_deadline: bool,
    nested: bool,
    /// The most that there may be.
    max: u8,
}

/// What a vCPU's thread needs besides it.
#[derive(Clone)]
pub struct Surroundings {
    /// Where the machine's end is reported.
    pub control: Arc<Control>,
    /// Guest memory, for the log of a panic.
    pub memory: GuestMemory,
    /// Where that lies.
    pub layout: Layout,
    /// The devices.
    pub bus: Arc<Bus>,
}

impl Vcpus {
    /// Asks KVM what its vCPUs can do.
    ///
    /// # Errors
    /// When it does not say.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>, config: &BootConfig) -> Result<Self> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("ask KVM for its CPUID")?;
        Ok(Self {
            vm,
            supported,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            nested: config.nested,
            max: config.max_vcpus as u8,
        })
    }

    /// Makes a vCPU; the first one stands at `entry`, the others wait for it to wake them.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn make(&self, index: u8, entry: Option<Entry>) -> Result<VcpuFd> {
        let fd = self.vm.create_vcpu(u64::from(index)).with_context(|| format!("create vCPU {index}"))?;
        let cpuid = cpuid::for_vcpu(&self.supported, index, self.max, self.tsc_deadline, self.nested);
        vcpu::configure(&fd, &cpuid, entry).with_context(|| format!("set up vCPU {index}"))?;
        Ok(fd)
    }

    /// Starts the threads of the first vCPUs, and the spare one where there may be more; what is
    /// returned takes how many there are to be.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(self, first: Vec<VcpuFd>, around: Surroundings) -> Result<Sender<u32>> {
        let count = first.len() as u8;
        for (index, fd) in (0u8..).zip(first) {
            let around = around.clone();
            thread(index, move || run(fd, &around))?;
        }
        let (sender, wanted) = channel();
        if count < self.max {
            let spare = Spare { vcpus: self, around, index: count, wanted, target: 0 };
            thread(count, move || {
                if let Err(error) = filters::spare_vcpu() {
                    stop(&spare.around.control, Stopped::Failed(format!("{:#}", anyhow::Error::from(error))));
                }
                spare.wait();
            })?;
        }
        Ok(sender)
    }
}

fn thread(index: u8, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(body);
    thread.map(drop).with_context(|| format!("start the thread of vCPU {index}"))
}

/// Runs a vCPU to the machine's end.
fn run(mut fd: VcpuFd, around: &Surroundings) {
    let ended = filters::vcpu().map_err(anyhow::Error::from).and_then(|()| vcpu::run(&mut fd, &around.bus).map_err(anyhow::Error::from));
    let reason = match ended {
        Ok(()) => panic_log::read(&around.memory, around.layout).unwrap_or(Stopped::Reset),
        Err(error) => Stopped::Failed(format!("{error:#}")),
    };
    stop(&around.control, reason);
}

/// The thread that will be the next vCPU's.
struct Spare {
    vcpus: Vcpus,
    around: Surroundings,
    index: u8,
    wanted: Receiver<u32>,
    /// How many vCPUs there are to be.
    target: u32,
}

impl Spare {
    fn wait(mut self) {
        loop {
            while self.target <= u32::from(self.index) {
                let Ok(target) = self.wanted.recv() else { return };
                self.target = target;
            }
            let made = self.vcpus.make(self.index, None);
            let answer = made.as_ref().map(|_| u32::from(self.index) + 1).map_err(|error| format!("{error:#}"));
            // When the shim is gone, so are we in a moment.
            let _ = self.around.control.send(&Event::Vcpus(answer), &[], true);
            match made {
                Ok(fd) => return self.become_vcpu(fd),
                // Until the shim asks again.
                Err(_) => self.target = 0,
            }
        }
    }

    fn become_vcpu(mut self, fd: VcpuFd) {
        let around = self.around.clone();
        self.index += 1;
        if self.index < self.vcpus.max {
            // Without a successor the machine keeps what it has: who asks for more hears that there is none.
            let _ = thread(self.index, move || self.wait());
        }
        run(fd, &around);
    }
}
