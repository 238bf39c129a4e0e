//! A guest that does as it likes with a disk's queue: no request goes beyond the disk, and a disk
//! that is read-only stays as it is.
#![no_main]

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, LazyLock, Mutex};

use caisson_fuzz::Input;
use caisson_fuzz::driver::{DATA, Rings, memory, scribble};
use caisson_host::control::Control;
use caisson_protocol::vmm::{Disk, RateLimit};
use caisson_vmm::devices::blk::backing::Backing;
use caisson_vmm::devices::blk::request::Request;
use caisson_vmm::devices::blk::ring::Ring;
use caisson_vmm::devices::blk::under_way::UnderWay;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 64 << 10;
/// What lies behind the disk in its file, and must stay as it is.
const BEHIND: [u8; 4096] = [0xa5; 4096];

/// Kernels take their time to make one and to let it go.
static RING: LazyLock<Mutex<Ring>> = LazyLock::new(|| Mutex::new(Ring::new().expect("a ring")));

fuzz_target!(|data: &[u8]| {
    let (memory, mut rings, mut input) = (memory(), Rings::new(0), Input(data));
    let mut queue = rings.queue(&memory);
    let fd = nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::empty()).expect("a memory file");
    let mut file = std::fs::File::from(fd);
    file.write_all(&[1; DISK_BYTES as usize]).and_then(|()| file.write_all(&BEHIND)).expect("a memory file is written");
    let how = input.u8();
    let read_only = how & 1 != 0;
    let mut ring = (how & 2 != 0).then(|| RING.lock().expect("nobody else"));
    // What cannot be written may be in several files.
    let parts = if read_only { vec![DISK_BYTES / 4, DISK_BYTES / 2, DISK_BYTES / 4] } else { vec![DISK_BYTES] };
    let files = parts.iter().map(|_| file.try_clone().expect("a descriptor")).collect();
    let disk = Disk { place: 0, parts, block_size: 512, read_only, serial: "fuzz".into(), limit: RateLimit::default() };
    let (_shim, control) = Control::pair().expect("a control socket");
    let backing = Backing::new(&disk, files, Arc::new(control));
    while !input.is_empty() {
        match input.u8() % 4 {
            0 => scribble(&memory, &mut input),
            1 => rings.offer_any(&memory, &mut input),
            2 => {
                // A request in the usual three buffers.
                let kind = u32::from(input.u8() % 16);
                let (sector, length, written) = (u64::from(input.u16()), u32::from(input.u16()), input.u8() & 1 != 0);
                let header = u128::from(kind) | u128::from(sector) << 64;
                let _ = memory.write_slice(&header.to_le_bytes(), GuestAddress(DATA));
                let _ = memory.write_slice(input.bytes(16), GuestAddress(DATA + 0x100));
                rings.offer(&memory, &[(DATA, 16, false), (DATA + 0x100, length, written), (DATA + 0x80, 1, true)]);
            }
            _ => {
                let mut under_way = UnderWay::new(ring.as_deref_mut());
                loop {
                    let chain = if under_way.has_room() { queue.next(&memory) } else { None };
                    let Some(chain) = chain else {
                        if under_way.is_empty() {
                            break;
                        }
                        under_way.submit().expect("the kernel takes requests");
                        while let Some((head, written)) = under_way.next_ended(&backing) {
                            queue.give_back(&memory, head, written);
                        }
                        continue;
                    };
                    let head = chain.head_index();
                    let request = Request::read(&memory, None, chain);
                    if let Some(written) = request.map_or(Some(0), |request| under_way.start(&backing, head, request)) {
                        queue.give_back(&memory, head, written);
                    }
                }
            }
        }
    }
    let mut content = Vec::new();
    file.seek(SeekFrom::Start(0)).and_then(|_| std::io::Read::read_to_end(&mut file, &mut content)).expect("a memory file is read");
    let (disk, behind) = content.split_at(DISK_BYTES as usize);
    assert_eq!((file.metadata().expect("a size").size(), behind), (DISK_BYTES + BEHIND.len() as u64, &BEHIND[..]), "beyond the disk");
    assert!(!read_only || disk.iter().all(|byte| *byte == 1), "a read-only disk was written");
});
