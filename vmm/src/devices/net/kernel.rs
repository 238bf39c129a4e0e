//! An interface whose queues the host's kernel serves, a thread of its for each pair, and the control queue by which the
//! driver says how many of the pairs it uses (virtio 1.2, 5.1.6.5.6).
//!
//! The tap has a queue for each pair. Those of pairs that the driver does not use are taken off the tap, so that the
//! kernel hands it no frames that nobody would fetch.
#![expect(unsafe_code, reason = "an ioctl without a safe wrapper")]

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::super::queue::{ActiveQueue, Chain};
use super::super::vhost_net::VhostNet;
use super::super::{Activation, Interrupt};
use super::{has_control, set_offloads};
use crate::memory::GuestMemory;

/// Class and command (5.1.6.5.6), and the answers to any (5.1.6.5).
const MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;
/// Commands before the thread looks after its other work.
const BUDGET: usize = 64;

nix::ioctl_write_ptr_bad!(
    /// `TUNSETQUEUE` (linux/if_tun.h): whether a tap hands frames to one of its queues.
    tun_set_queue, 0x4004_54d9, libc::ifreq
);

/// The interface in service.
pub struct Kernel {
    taps: Vec<File>,
    control: Option<ActiveQueue>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    _servers: Vec<VhostNet>,
}

impl Kernel {
    /// Hands each pair of queues to a server of the kernel's; the driver uses the first pair until it says otherwise.
    ///
    /// # Errors
    /// When there are too few queues, or the kernel refuses.
    pub fn start(wires: Vec<(File, File)>, mut activation: Activation) -> io::Result<Self> {
        let control = if has_control(activation.features) { activation.queues.pop() } else { None };
        let Activation { features, queues, memory, interrupt } = activation;
        // A driver may use a single pair of all that there are.
        let pairs = wires.into_iter().zip(queues.chunks_exact(2));
        let (mut taps, mut servers) = (Vec::new(), Vec::new());
        for (index, ((tap, device), queues)) in pairs.enumerate() {
            if index == 0 {
                set_offloads(&tap, features)?;
            } else {
                set_queue(&tap, libc::IFF_DETACH_QUEUE)?;
            }
            servers.push(VhostNet::start(device, &tap, features, &memory, queues, &interrupt)?);
            taps.push(tap);
        }
        if servers.is_empty() {
            return Err(ErrorKind::InvalidInput.into());
        }
        Ok(Self { taps, control, memory, interrupt, _servers: servers })
    }

    /// Readable when the driver has given a command.
    pub fn control_kick(&self) -> Option<&EventFd> {
        self.control.as_ref().map(ActiveQueue::kick)
    }

    /// Obeys the driver's commands; true when there are more.
    pub fn obey(&mut self) -> bool {
        let Self { taps, control: Some(queue), memory, interrupt, .. } = self else { return false };
        queue.clear_kick();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = queue.next(memory) else {
                more = false;
                break;
            };
            let head = chain.head_index();
            let written = answer(memory, chain, |pairs| use_pairs(taps, pairs));
            queue.give_back(memory, head, written);
        }
        queue.signal(memory, interrupt);
        more
    }
}

/// Reads a command and writes the answer to it; returns the bytes written.
fn answer(memory: &GuestMemory, chain: Chain<'_>, use_pairs: impl FnOnce(u16) -> bool) -> u32 {
    let (reader, writer) = (chain.clone().reader(memory), chain.writer(memory));
    let (Ok(mut reader), Ok(mut writer)) = (reader, writer) else { return 0 };
    let mut command = [0; 4];
    // A driver that gives less gets the answer of one whose command is unknown.
    let known = reader.read_exact(&mut command).is_ok() && command[..2] == MQ_VQ_PAIRS_SET;
    let done = known && use_pairs(u16::from_le_bytes([command[2], command[3]]));
    u32::from(writer.write_all(&[if done { OK } else { ERR }]).is_ok())
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

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const COMMAND: u64 = 0x8000;
    const ANSWER: u64 = 0x9000;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// What a driver hears to a command, given in two pieces as Linux does.
    fn hears(class: [u8; 2], data: &[u8], answer_flags: u16) -> (u8, bool) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mock = MockSplitQueue::create(&memory, GuestAddress(0x1000), 16);
        let chain: Vec<RawDescriptor> = [
            Descriptor::new(COMMAND, 2, NEXT, 1),
            Descriptor::new(COMMAND + 0x100, data.len() as u32, NEXT, 2),
            Descriptor::new(ANSWER, 1, answer_flags, 0),
        ]
        .map(RawDescriptor::from)
        .into();
        mock.build_multiple_desc_chains(&chain).unwrap();
        memory.write_slice(&class, GuestAddress(COMMAND)).unwrap();
        memory.write_slice(data, GuestAddress(COMMAND + 0x100)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(ANSWER)).unwrap();
        // Of two taps that are none no queue is in any state.
        let tap = || File::from(OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().unwrap()));
        let mut kernel = Kernel {
            taps: vec![tap(), tap()],
            control: Some(ActiveQueue::new(mock.create_queue().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            memory: memory.clone(),
            interrupt: Arc::new(Interrupt::new().unwrap()),
            _servers: Vec::new(),
        };
        let more = kernel.obey();
        (memory.read_obj(GuestAddress(ANSWER)).unwrap(), more)
    }

    #[test]
    fn only_a_number_of_pairs_that_there_is_can_be_chosen() {
        for (class, data, expected) in [
            (MQ_VQ_PAIRS_SET, &[0, 0][..], ERR),
            (MQ_VQ_PAIRS_SET, &[3, 0], ERR),
            (MQ_VQ_PAIRS_SET, &[1], ERR),
            ([0, 0], &[1, 0], ERR),
            ([4, 1], &[1, 0], ERR),
        ] {
            assert_eq!(hears(class, data, WRITE), (expected, false), "{class:?} {data:?}");
        }
        // Without room for an answer there is none.
        assert_eq!(hears(MQ_VQ_PAIRS_SET, &[1, 0], 0), (0xff, false));
    }
}
