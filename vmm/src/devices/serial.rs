//! The debug console: a 16550 serial port whose output goes to one descriptor.

use std::fs::File;
use std::io;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// Interrupts by eventfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
pub struct Serial {
    port: vm_superio::Serial<Line, vm_superio::serial::NoEvents, File>,
    interrupt: EventFd,
}

impl Serial {
    /// A port that writes to `out`.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(out: File) -> io::Result<Self> {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { port: vm_superio::Serial::new(Line(interrupt.try_clone()?), out), interrupt })
    }

    /// The port's interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Reads register `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        self.port.read(offset as u8)
    }

    /// Writes register `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        // Output that nobody takes is lost; the guest must not wait for a debug console.
        let _ = self.port.write(offset as u8, value);
    }
}
