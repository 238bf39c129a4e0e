//! A guest that does as it likes with the queues and the requests of virtio-fs, against the device that `caisson-fs`
//! runs, in a share that is nearly empty at first: nothing leads out of it, a snapshot's folder stays as it is, and each request is answered or ends the server.
#![no_main]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use caisson_fs::dax::Dax;
use caisson_fs::descriptors::Descriptors;
use caisson_fs::device::Device;
use caisson_fs::linked::Linked;
use caisson_fs::share::Share;
use caisson_fs::unnamed::{FIRST, Files, Room, Rules};
use caisson_fuzz::Input;
use caisson_fuzz::driver::{DATA, MEMORY_BYTES, Rings, SIZE, scribble};
use caisson_protocol::fs::HOST_IDS;
use caisson_protocol::guest::SNAPSHOT_DIR;
use caisson_sys::mounts::{Attributes, set_attributes};
use libfuzzer_sys::fuzz_target;
use nix::libc::MOUNT_ATTR_RDONLY;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::inotify::{CreateFlags, init};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{Config, PassthroughFs};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Names the folder that is to be the share; what is beside it the process may write, too.
const SHARE: &str = "CAISSON_FUZZ_SHARE";
/// `FUSE_INIT` and the version of the protocol that is spoken, with no features (linux/fuse.h).
const INIT: u32 = 26;
const VERSION: [u32; 4] = [7, 38, 0, 0];
/// Requests known to the protocol, and some that are not; from the last on it is the queues that are meddled with.
const OPCODES: u32 = 56;
const MEDDLES: u8 = 0xe0;
/// Bytes of a request's header, and of an answer.
const HEADER: usize = 40;
const ANSWER: u32 = 0x2000;
/// What a file beside the share holds, and no answer may; its name is one that seeds try to reach.
const SECRET: &[u8] = b"what no guest may see";
const SECRET_FILE: &str = "secret";
/// The most descriptors that the guest may hold.
const DESCRIPTORS: u64 = 512;
/// The most bytes of what follows the header.
const BODY: usize = 0x800;
/// Inodes are numbers from 1 on, and from `FIRST` on for files without a name: so many of either are likely to be there.
const KNOWN: u64 = 8;
/// Descriptors for files without a name.
const UNNAMED: usize = 16;

/// One input in so many finds an overlay in the share.
const OVERLAY_EACH: usize = 16;

/// What is in a snapshot's folder.
const SNAPSHOT: [&str; 2] = ["fs", "work"];

const NOTHING: Option<&str> = None;

/// The share. Of what is mounted the process may write that alone and what lies beside it, whatever a
/// request makes of a path.
fn share() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(std::env::var_os(SHARE).unwrap_or_else(|| panic!("{SHARE} is not set; run `cargo xtask fuzz`")));
        let beside = folder.parent().expect("the share lies in a folder");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace; run as root");
        mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING).expect("mounts of its own");
        mount(Some(beside), beside, NOTHING, MsFlags::MS_BIND, NOTHING).expect("a mount that is written");
        let open = |path: &Path| File::open(path).expect("a folder");
        set_attributes(&open(Path::new("/")), Attributes::set(MOUNT_ATTR_RDONLY), true).expect("all else is read-only");
        set_attributes(&open(beside), Attributes { clear: MOUNT_ATTR_RDONLY, ..Attributes::default() }, false).expect("this is not");
        std::fs::write(beside.join(SECRET_FILE), SECRET).expect("a file beside the share");
        folder
    })
}

/// Adds a container's folder, as the shim makes it, with a snapshot's in it that is to stay as it is.
fn add_snapshot(share: &Path) -> PathBuf {
    let container = share.join("c");
    let snapshot = container.join(SNAPSHOT_DIR);
    SNAPSHOT.iter().try_for_each(|name| std::fs::create_dir_all(snapshot.join(name))).expect("folders of the share");
    for folder in [&container, &snapshot] {
        mount(Some(folder), folder, NOTHING, MsFlags::MS_BIND, NOTHING).expect("a mount in the share");
    }
    let open = File::open(&container).expect("a folder");
    set_attributes(&open, Attributes::set(MOUNT_ATTR_RDONLY), false).expect("what holds the snapshot is read-only");
    snapshot
}

/// Adds an overlay, in whose lower layer one file has two names.
fn add_overlay(share: &Path) {
    let (lower, overlay) = (share.join("l"), share.join("o"));
    for folder in ["l", "u", "w", "o"] {
        std::fs::create_dir(share.join(folder)).expect("a folder of the share");
    }
    std::fs::write(lower.join("p"), "old").expect("a file of a layer");
    std::fs::hard_link(lower.join("p"), lower.join("q")).expect("another name of it");
    let layers = format!("lowerdir={0}/l,upperdir={0}/u,workdir={0}/w", share.display());
    mount(Some("overlay"), &overlay, Some("overlay"), MsFlags::empty(), Some(layers.as_str())).expect("an overlay");
}

/// A request's bytes: its header (`struct fuse_in_header`) and what follows it.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = (HEADER + body.len()) as u32;
    let owner = [0u32; 4];
    let mut bytes = [length, opcode].map(u32::to_le_bytes).concat();
    bytes.extend([7, node].map(u64::to_le_bytes).concat());
    bytes.extend(owner.map(u32::to_le_bytes).concat());
    bytes.extend(body);
    bytes
}

/// Ends the process as what was found.
fn escaped(how: &str) -> ! {
    eprintln!("panicked: {how}");
    std::process::abort();
}

fuzz_target!(|data: &[u8]| {
    let share = share();
    mount(Some("share"), share, Some("tmpfs"), MsFlags::MS_NODEV | MsFlags::MS_NOSUID, Some("size=16m,nr_inodes=1k")).expect("a share");
    let snapshot = add_snapshot(share);
    // It takes long.
    if data.len().is_multiple_of(OVERLAY_EACH) {
        add_overlay(share);
    }
    let config = Config { root_dir: share.to_string_lossy().into_owned(), xattr: true, announce_submounts: true, ..Config::default() };
    let fs = PassthroughFs::new(config).expect("the share can be served");
    fs.open_root_node().expect("the share can be opened");
    let ended = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ended);
    let descriptors = Arc::new(Descriptors::new(DESCRIPTORS, || ()));
    let rules = Rules {
        descriptors: File::open("/proc/self/fd").expect("a folder"),
        root: File::open(share).expect("the share"),
        set_id: false,
        attributes: XattrMap::try_from("/ok/all///").expect("a rule"),
        ids: Some(HOST_IDS),
        attr_timeout: Duration::ZERO,
        caches: true,
        always: false,
        writeback: false,
        room: Room::new(UNNAMED),
    };
    let watches = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("an inotify instance");
    let files = Files::new(Share::new(fs, true, true, Arc::clone(&descriptors)), rules, Linked::new(watches));
    let (make, opener) = (files.maker(), files.clone());
    let dax = Dax::new(move |ctx, inode, writes| opener.file(ctx, inode, writes));
    let device = Device::new(files, make, Some(dax), Duration::ZERO, 0, descriptors, move |_reason| end.store(true, Ordering::Relaxed));
    let memory = GuestMemoryMmap::<BitmapMmapRegion>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).expect("memory");
    let memory = GuestMemoryAtomic::new(memory);
    device.update_memory(memory.clone()).expect("it takes any memory");
    let (mut rings, mut input) = ([Rings::new(0), Rings::new(1)], Input(data));
    let vrings = rings.map(|rings| {
        let vring = VringMutex::new(memory.clone(), SIZE).expect("a size that virtio knows");
        let [descriptors, available, used] = rings.addresses();
        vring.set_queue_info(descriptors, available, used).expect("addresses that are aligned");
        vring.set_queue_event_idx(true);
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        vring
    });
    let guest = memory.memory();
    let serve = || {
        device.handle_event(1, EventSet::IN, &vrings, 0).expect("what is wrong ends the server");
        let mut answer = [0; ANSWER as usize];
        guest.read_slice(&mut answer, GuestAddress(DATA + 0x1_0000)).expect("an answer lies in memory");
        if answer.windows(SECRET.len()).any(|window| window == SECRET) {
            escaped("a request read what lies beside the share");
        }
    };
    let ask = |rings: &mut Rings, bytes: &[u8]| {
        guest.write_slice(bytes, GuestAddress(DATA)).expect("a request fits");
        rings.offer(&*guest, &[(DATA, bytes.len() as u32, false), (DATA + 0x1_0000, ANSWER, true)]);
        serve();
    };
    ask(&mut rings[1], &request(INIT, 0, &VERSION.map(u32::to_le_bytes).concat()));
    while !input.is_empty() && !ended.load(Ordering::Relaxed) {
        match input.u8() {
            meddle @ MEDDLES.. => {
                let rings = &mut rings[usize::from(meddle & 1)];
                if meddle & 2 == 0 {
                    rings.offer_any(&*guest, &mut input)
                } else {
                    scribble(&*guest, &mut input)
                }
                serve();
            }
            opcode => {
                let (opcode, node) = (u32::from(opcode) % OPCODES, u64::from(input.u8()) % (2 * KNOWN));
                let node = if node < KNOWN { node } else { FIRST + node - KNOWN };
                let length = usize::from(input.u16()) % BODY;
                ask(&mut rings[1], &request(opcode, node, input.bytes(length)));
            }
        }
    }
    drop(device);
    let folders = || SNAPSHOT.iter().filter(|name| std::fs::symlink_metadata(snapshot.join(name)).is_ok_and(|meta| meta.is_dir()));
    if std::fs::read_dir(&snapshot).expect("the snapshot's folder").count() != SNAPSHOT.len() || folders().count() != SNAPSHOT.len() {
        escaped("a request changed a snapshot's folder");
    }
    umount2(share, MntFlags::MNT_DETACH).expect("the share is let go");
    let secret = share.with_file_name(SECRET_FILE);
    if std::fs::read(&secret).is_ok_and(|content| content != SECRET) || !secret.exists() {
        escaped("a request changed what lies beside the share");
    }
});
