//! The control queue, by which a driver says how many of an interface's pairs of queues it uses (virtio 1.2, 5.1.6.5).

use std::io::{Read, Write};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::super::Interrupt;
use super::super::queue::{ActiveQueue, Chain};
use crate::memory::GuestMemory;

/// Class and command (5.1.6.5.6), and the answers to any (5.1.6.5).
const MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;
/// Commands before the thread looks after its other work.
const BUDGET: usize = 64;

/// The queue in service.
pub struct ControlQueue {
    queue: ActiveQueue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl ControlQueue {
    /// Takes the queue over.
    pub fn new(queue: ActiveQueue, memory: GuestMemory, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, interrupt }
    }

    /// Readable when the driver has given a command.
    pub fn kick(&self) -> &EventFd {
        self.queue.kick()
    }

    /// Obeys the driver's commands, at most [`BUDGET`]; true when there are more. `use_pairs` is told how many pairs the driver
    /// uses, and says whether that can be.
    pub fn obey(&mut self, mut use_pairs: impl FnMut(u16) -> bool) -> bool {
        let Self { queue, memory, interrupt } = self;
        queue.clear_kick();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = queue.next(memory) else {
                more = false;
                break;
            };
            let head = chain.head_index();
            let written = answer(memory, chain, &mut use_pairs);
            queue.give_back(memory, head, written);
        }
        queue.signal(memory, interrupt);
        more
    }
}

/// Reads a command and writes the answer to it; returns the bytes written.
fn answer(memory: &GuestMemory, chain: Chain<'_>, use_pairs: &mut impl FnMut(u16) -> bool) -> u32 {
    let (reader, writer) = (chain.clone().reader(memory), chain.writer(memory));
    let (Ok(mut reader), Ok(mut writer)) = (reader, writer) else { return 0 };
    let mut command = [0; 4];
    // A driver that gives less gets the answer of one whose command is unknown.
    let known = reader.read_exact(&mut command).is_ok() && command[..2] == MQ_VQ_PAIRS_SET;
    let done = known && use_pairs(u16::from_le_bytes([command[2], command[3]]));
    u32::from(writer.write_all(&[if done { OK } else { ERR }]).is_ok())
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const COMMAND: u64 = 0x8000;
    const ANSWER: u64 = 0x9000;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// What a driver hears to a command, given in two pieces as Linux does, when there are two pairs.
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
        let queue = ActiveQueue::new(mock.create_queue().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut control = ControlQueue::new(queue, memory.clone(), Arc::new(Interrupt::new().unwrap()));
        let more = control.obey(|pairs| (1..=2).contains(&pairs));
        (memory.read_obj(GuestAddress(ANSWER)).unwrap(), more)
    }

    #[test]
    fn only_a_number_of_pairs_that_there_is_can_be_chosen() {
        for (class, data, expected) in [
            (MQ_VQ_PAIRS_SET, &[2, 0][..], OK),
            (MQ_VQ_PAIRS_SET, &[0, 0], ERR),
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
