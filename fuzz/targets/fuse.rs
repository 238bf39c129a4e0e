//! A guest that does as it likes with the requests of virtio-fs, against the server that `caisson-fs`
//! runs, in a share that is empty at first: nothing leads out of it, and each request is answered.
#![no_main]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use caisson_fs::share::Share;
use caisson_fuzz::Input;
use caisson_fuzz::driver::{DATA, MEMORY_BYTES, Rings, memory};
use caisson_sys::mounts::{Attributes, set_attributes};
use libfuzzer_sys::fuzz_target;
use nix::libc::MOUNT_ATTR_RDONLY;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::passthrough::{Config, PassthroughFs};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Names the folder that is to be the share; what is beside it the process may write, too.
const SHARE: &str = "CAISSON_FUZZ_SHARE";
/// `FUSE_INIT` and the version of the protocol that is spoken, with no features (linux/fuse.h).
const INIT: u32 = 26;
const VERSION: [u32; 4] = [7, 38, 0, 0];
/// Requests known to the protocol, and some that are not.
const OPCODES: u32 = 56;
/// Bytes of a request's header, and of an answer.
const HEADER: usize = 40;
const ANSWER: u32 = 0x2000;
/// What a file beside the share holds, and no answer may; its name is one that seeds try to reach.
const SECRET: &[u8] = b"what no guest may see";
const SECRET_FILE: &str = "secret";
/// The most bytes of what follows the header.
const BODY: usize = 0x800;
/// Inodes are numbers from 1 on: small ones are likely to be there.
const KNOWN: u64 = 8;

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
    let config = Config { root_dir: share.to_string_lossy().into_owned(), xattr: true, announce_submounts: true, ..Config::default() };
    let fs = PassthroughFs::new(config).expect("the share can be served");
    fs.open_root_node().expect("the share can be opened");
    let server = Server::new(Share::new(fs, true));
    let (memory, mut rings, mut input) = (memory(), Rings::new(0), Input(data));
    // The server's view of the same memory, but for the rings.
    let data = GuestMemoryMmap::<BitmapMmapRegion>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).expect("memory");
    let mut queue = rings.queue(&memory);
    let mut ask = |bytes: &[u8]| {
        data.write_slice(bytes, GuestAddress(DATA)).expect("a request fits");
        rings.offer(&memory, &[(DATA, bytes.len() as u32, false), (DATA + 0x1_0000, ANSWER, true)]);
        while let Some(chain) = queue.next(&memory) {
            let head = chain.head_index();
            let (reader, writer) = (Reader::new(&data, chain.clone()), Writer::new(&data, chain));
            if let (Ok(reader), Ok(writer)) = (reader, writer) {
                let _ = server.handle_message(reader, writer, None::<&mut vhost::vhost_user::Backend>);
            }
            queue.give_back(&memory, head, 0);
        }
        let mut answer = [0; ANSWER as usize];
        data.read_slice(&mut answer, GuestAddress(DATA + 0x1_0000)).expect("an answer lies in memory");
        if answer.windows(SECRET.len()).any(|window| window == SECRET) {
            escaped("a request read what lies beside the share");
        }
    };
    ask(&request(INIT, 0, &VERSION.map(u32::to_le_bytes).concat()));
    while !input.is_empty() {
        let (opcode, node) = (u32::from(input.u8()) % OPCODES, u64::from(input.u8()) % KNOWN);
        let length = usize::from(input.u16()) % BODY;
        ask(&request(opcode, node, input.bytes(length)));
    }
    drop(server);
    umount2(share, MntFlags::MNT_DETACH).expect("the share is let go");
    let secret = share.with_file_name(SECRET_FILE);
    if std::fs::read(&secret).is_ok_and(|content| content != SECRET) || !secret.exists() {
        escaped("a request changed what lies beside the share");
    }
});
