//! An interface whose queues the host's kernel serves, a thread of its for each pair.
//!
//! The tap has a queue for each pair. Those of pairs that the driver does not use are taken off the tap, so that the
//! kernel hands it no frames that nobody would fetch.
#![expect(unsafe_code, reason = "an ioctl without a safe wrapper")]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::EventFd;

use super::super::Activation;
use super::super::vhost_net::VhostNet;
use super::control::ControlQueue;
use super::{has_control, set_offloads};

nix::ioctl_write_ptr_bad!(
    /// `TUNSETQUEUE` (linux/if_tun.h): whether a tap hands frames to one of its queues.
    tun_set_queue, 0x4004_54d9, libc::ifreq
);

/// The interface in service.
pub struct Kernel {
    taps: Vec<File>,
    control: Option<ControlQueue>,
    _servers: Vec<VhostNet>,
}

impl Kernel {
    /// Hands each pair of queues to a server of the kernel's; the driver uses the first pair until it says otherwise.
    ///
    /// # Errors
    /// When there are too few queues, or the kernel refuses.
    pub fn start(wires: Vec<(File, File)>, mut activation: Activation) -> io::Result<Self> {
        let control = if has_control(activation.features) { activation.queues.pop() } else { None };
        let Activation { features, queues, memory, reach, interrupt } = activation;
        let reach = reach.as_ref().unwrap_or(&memory);
        // A driver may use a single pair of all that there are.
        let pairs = wires.into_iter().zip(queues.chunks_exact(2));
        let (mut taps, mut servers) = (Vec::new(), Vec::new());
        for (index, ((tap, device), queues)) in pairs.enumerate() {
            if index == 0 {
                set_offloads(&tap, features)?;
            } else {
                set_queue(&tap, libc::IFF_DETACH_QUEUE)?;
            }
            servers.push(VhostNet::start(device, &tap, features, reach, queues, &interrupt)?);
            taps.push(tap);
        }
        if servers.is_empty() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let control = control.map(|queue| ControlQueue::new(queue, memory, interrupt));
        Ok(Self { taps, control, _servers: servers })
    }

    /// Readable when the driver has given a command.
    pub fn control_kick(&self) -> Option<&EventFd> {
        self.control.as_ref().map(ControlQueue::kick)
    }

    /// Obeys the driver's commands; true when there are more.
    pub fn obey(&mut self) -> bool {
        let Self { taps, control, .. } = self;
        control.as_mut().is_some_and(|control| control.obey(|pairs| use_pairs(taps, pairs)))
    }
}

/// Has the tap hand frames to the queues of the first so many pairs.
fn use_pairs(taps: &[File], pairs: u16) -> bool {
    let pairs = usize::from(pairs);
    if !(1..=taps.len()).contains(&pairs) {
        return false;
    }
    let states = (1..taps.len()).map(|index| if index < pairs { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    taps[1..].iter().zip(states).all(|(tap, state)| match set_queue(tap, state) {
        // It is in that state.
        Err(error) => error.raw_os_error() == Some(libc::EINVAL),
        Ok(()) => true,
    })
}

fn set_queue(tap: &File, state: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes is an ifreq without a name, which this ioctl does not look at.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = state as libc::c_short;
    // SAFETY: the request lives through the call.
    unsafe { tun_set_queue(tap.as_raw_fd(), &raw const request) }?;
    Ok(())
}
