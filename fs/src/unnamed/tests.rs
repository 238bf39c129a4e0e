//! Files without a name, by requests that a guest makes.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, init};
use virtiofsd::filesystem::{
    Extensions, FsOptions, GetxattrReply, ListxattrReply, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{InHeader, SetattrIn};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};
use virtiofsd::passthrough::{self, PassthroughFs};
use virtiofsd::soft_idmap::Id;

use super::*;
use crate::descriptors::Descriptors;
use crate::share::ATTRIBUTES;
use crate::volumes::CAPABILITIES;

/// The root of the share.
const ROOT: Inode = 1;
/// Descriptors that there are.
const MOST: usize = 8;

/// What is read, or is to be written.
struct Bytes(Vec<u8>);

impl ZeroCopyWriter for &mut Bytes {
    fn read_from_file_at(&mut self, file: &File, count: usize, offset: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        self.0 = vec![0; count];
        let length = file.read_at(&mut self.0, offset)?;
        self.0.truncate(length);
        Ok(length)
    }
}

impl ZeroCopyReader for &Bytes {
    fn write_to_file_at(&mut self, file: &File, count: usize, offset: u64, flags: Option<WritevFlags>) -> io::Result<usize> {
        assert_eq!(flags.map(|flags| flags.bits()), None);
        file.write_at(&self.0[..count], offset)
    }
}

fn context() -> Context {
    Context::from(InHeader::default())
}

fn files(folder: &Path) -> Files {
    files_of(folder, true)
}

/// With what gives a file rights on the host, or without.
fn files_of(folder: &Path, set_id: bool) -> Files {
    let attributes = XattrMap::try_from(ATTRIBUTES).unwrap();
    let config = passthrough::Config {
        root_dir: folder.to_str().unwrap().into(),
        xattr: true,
        xattrmap: Some(attributes.clone()),
        ..passthrough::Config::default()
    };
    let fs = PassthroughFs::new(config).unwrap();
    fs.open_root_node().unwrap();
    let share = Share::new(fs, true, false, Arc::new(Descriptors::new(1000, || ())));
    let descriptors = File::open("/proc/self/fd").unwrap();
    let watches = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    Files::new(
        share,
        Rules {
            descriptors,
            root: File::open(folder).unwrap(),
            set_id,
            attributes,
            ids: Some(65_536),
            attr_timeout: Duration::from_secs(1),
            caches: true,
            always: false,
            writeback: false,
            room: Room::new(MOST),
        },
        Linked::new(watches),
    )
}

fn wanted(flags: i32) -> CreateIn {
    CreateIn { flags: (libc::O_RDWR | libc::O_TMPFILE | flags).cast_unsigned(), mode: libc::S_IFREG | 0o666, umask: 0o027, open_flags: 0 }
}

fn make(files: &Files) -> (Entry, Handle) {
    let (entry, handle, _) = files.make(context(), ROOT, &wanted(0)).unwrap();
    (entry, handle)
}

fn write(files: &Files, inode: Inode, handle: Handle, offset: u64, text: &str) {
    let bytes = Bytes(text.into());
    let written = files.write(context(), inode, handle, &bytes, text.len() as u32, offset, None, false, true, 0).unwrap();
    assert_eq!(written, text.len());
}

fn read(files: &Files, inode: Inode, handle: Handle) -> String {
    let mut bytes = Bytes(Vec::new());
    files.read(context(), inode, handle, &mut bytes, 100, 0, None, 0).unwrap();
    String::from_utf8(bytes.0).unwrap()
}

fn release(files: &Files, inode: Inode, handle: Handle) {
    files.release(context(), inode, 0, handle, false, false, None).unwrap();
}

/// The number of the error that something ends with.
fn errno<T>(outcome: io::Result<T>) -> i32 {
    outcome.err().unwrap().raw_os_error().unwrap()
}

#[test]
fn a_file_without_a_name_is_written_and_read_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (entry, handle) = make(&files);
    assert_eq!((entry.attr.nlink, entry.attr.mode & 0o7777), (0, 0o640));
    write(&files, entry.inode, handle, 2, "text");
    assert_eq!(read(&files, entry.inode, handle), "\0\0text");
    // It may be opened once more, by what /proc calls it.
    let again = files.open(context(), entry.inode, false, 0).unwrap().0.unwrap();
    assert_eq!(read(&files, entry.inode, again), "\0\0text");
    assert_eq!(files.lseek(context(), entry.inode, again, 0, libc::SEEK_HOLE.cast_unsigned()).unwrap(), 6);
    files.fallocate(context(), entry.inode, again, 0, 0, 4096).unwrap();
    assert_eq!(files.getattr(context(), entry.inode, None).unwrap().0.size, 4096);
    files.fsync(context(), entry.inode, true, again).and_then(|()| files.flush(context(), entry.inode, again, 0)).unwrap();
    assert!(files.statfs(context(), entry.inode).unwrap().f_blocks > 0);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    [handle, again].iter().for_each(|handle| release(&files, entry.inode, *handle));
    files.forget(context(), entry.inode, 1);
    let known = files.known();
    assert_eq!((known.files.len(), known.open.len()), (0, 0));
    drop(known);
    assert_eq!(errno(files.getattr(context(), entry.inode, None)), libc::EBADF);
    assert_eq!(errno(files.open(context(), entry.inode, false, 0)), libc::EBADF);
}

#[test]
fn a_file_that_was_given_a_name_is_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (made, handle) = make(&files);
    write(&files, made.inode, handle, 0, "before");
    let linked = files.link(context(), made.inode, ROOT, c"name").unwrap();
    assert_eq!((linked.inode, linked.attr.nlink, linked.attr.size), (made.inode, 1, 6));
    assert_eq!(files.lookup(context(), ROOT, c"name").unwrap().inode, made.inode);
    assert_eq!(files.link(context(), made.inode, ROOT, c"second").unwrap().inode, made.inode);
    assert_eq!(files.create(context(), ROOT, c"name", 0, false, 0, 0, Extensions::default()).unwrap().0.inode, made.inode);
    // What was opened before goes on, as does what is opened by a name.
    let named = files.open(context(), made.inode, false, libc::O_RDWR.cast_unsigned()).unwrap().0.unwrap();
    write(&files, made.inode, handle, 0, "after!");
    assert_eq!(
        (read(&files, made.inode, named), fs::read_to_string(folder.path().join("second")).unwrap()),
        ("after!".into(), "after!".into())
    );
    let size = SetattrIn { size: 3, ..SetattrIn::default() };
    assert_eq!(files.setattr(context(), made.inode, size, Some(handle), SetattrValid::SIZE).unwrap().0.size, 3);
    [handle, named].iter().for_each(|handle| release(&files, made.inode, *handle));
    // It was told of: made, linked, looked up, linked again, created. At the last it is the share's alone.
    files.forget(context(), made.inode, 4);
    assert!(files.getattr(context(), made.inode, None).is_ok());
    files.batch_forget(context(), vec![(made.inode, 1)]);
    assert!(files.known().files.is_empty() && files.known().named.is_empty());
    assert_eq!(errno(files.getattr(context(), made.inode, None)), libc::EBADF);
    assert!(files.lookup(context(), ROOT, c"second").unwrap().inode < FIRST);
}

#[test]
fn a_file_without_a_name_has_what_others_have() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (made, handle) = make(&files);
    let set = |wanted: SetattrIn, valid| files.setattr(context(), made.inode, wanted, None, valid).unwrap().0;
    write(&files, made.inode, handle, 0, "text");
    assert_eq!(set(SetattrIn { mode: 0o4711, ..SetattrIn::default() }, SetattrValid::MODE).mode, libc::S_IFREG | 0o4711);
    let times = SetattrIn { atime: 5, mtime: 7, mtimensec: 9, ..SetattrIn::default() };
    let attr = set(times, SetattrValid::ATIME | SetattrValid::MTIME);
    assert_eq!((attr.atime, attr.mtime, attr.mtimensec), (5, 7, 9));
    let attr = set(times, SetattrValid::MTIME | SetattrValid::MTIME_NOW);
    assert!(attr.atime == 5 && attr.mtime > 7);
    assert_eq!(set(SetattrIn { size: 2, ..SetattrIn::default() }, SetattrValid::SIZE).size, 2);
    let value = |name, size| files.getxattr(context(), made.inode, name, size);
    for name in [c"user.one", c"trusted.two"] {
        files.setxattr(context(), made.inode, name, b"value", 0, SetxattrFlags::empty()).unwrap();
        assert!(matches!(value(name, 0).unwrap(), GetxattrReply::Count(5)));
        assert!(matches!(value(name, 9).unwrap(), GetxattrReply::Value(value) if value == b"value"));
    }
    assert_eq!(errno(value(c"user.one", 3)), libc::ERANGE);
    assert_eq!(errno(value(c"user.none", 3)), libc::ENODATA);
    // What the guest calls trusted the host keeps under another name, which the guest cannot use itself.
    assert_eq!(errno(value(c"user.virtiofs.trusted.two", 9)), libc::ENODATA);
    assert_eq!(errno(files.removexattr(context(), made.inode, c"user.virtiofs.trusted.two")), libc::EPERM);
    let names = || match files.listxattr(context(), made.inode, 1000).unwrap() {
        ListxattrReply::Names(names) => String::from_utf8(names).unwrap(),
        ListxattrReply::Count(count) => panic!("{count}"),
    };
    let mut listed: Vec<String> = names().split_terminator('\0').map(String::from).collect();
    listed.sort();
    assert_eq!(listed, ["trusted.two", "user.one"]);
    [c"user.one", c"trusted.two"].iter().for_each(|name| files.removexattr(context(), made.inode, name).unwrap());
    assert_eq!(names(), "");
}

#[test]
fn who_writes_a_file_that_runs_as_its_owner_takes_that_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (made, handle) = make(&files);
    let mode = SetattrIn { mode: 0o4755, ..SetattrIn::default() };
    files.setattr(context(), made.inode, mode, None, SetattrValid::MODE).unwrap();
    write(&files, made.inode, handle, 0, "text");
    assert_eq!(files.getattr(context(), made.inode, None).unwrap().0.mode & 0o7777, 0o755);
}

#[test]
fn ranges_are_copied_between_files_with_and_without_a_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "0123456789").unwrap();
    let files = files(folder.path());
    let (made, handle) = make(&files);
    let file = files.lookup(context(), ROOT, c"file").unwrap().inode;
    let open = files.open(context(), file, false, libc::O_RDWR.cast_unsigned()).unwrap().0.unwrap();
    assert_eq!(files.copyfilerange(context(), file, open, 3, made.inode, handle, 1, 4, 0).unwrap(), 4);
    assert_eq!(read(&files, made.inode, handle), "\x003456");
    assert_eq!(files.copyfilerange(context(), made.inode, handle, 1, file, open, 8, 4, 0).unwrap(), 4);
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "012345673456");
    assert_eq!(errno(files.copyfilerange(context(), file, handle, 0, made.inode, handle, 0, 1, 0)), libc::EBADF);
}

#[test]
fn a_name_is_given_where_one_may_be_made() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("c/snapshot/fs")).unwrap();
    fs::write(folder.path().join("there"), "").unwrap();
    let files = files(folder.path());
    let find = |parent, name| files.lookup(context(), parent, name).unwrap().inode;
    let snapshot = find(find(ROOT, c"c"), c"snapshot");
    let upper = find(snapshot, c"fs");
    let (made, _) = make(&files);
    let link = |parent, name| files.link(context(), made.inode, parent, name);
    assert_eq!(errno(files.make(context(), snapshot, &wanted(0))), libc::EPERM);
    assert_eq!(errno(link(snapshot, c"evil")), libc::EPERM);
    for name in [c"c/snapshot/evil", c"../evil", c".", c""] {
        assert_eq!(errno(link(upper, name)), libc::EINVAL, "{name:?}");
    }
    assert_eq!(errno(link(ROOT, c"there")), libc::EEXIST);
    assert_eq!(errno(link(find(ROOT, c"there"), c"x")), libc::ENOTDIR);
    assert_eq!(errno(files.make(context(), find(ROOT, c"there"), &wanted(0))), libc::ENOTDIR);
    assert_eq!(errno(files.make(context(), made.inode, &wanted(0))), libc::EBADF);
    let (never, ..) = files.make(context(), ROOT, &wanted(libc::O_EXCL)).unwrap();
    assert_eq!(errno(files.link(context(), never.inode, ROOT, c"x")), libc::ENOENT);
    assert_eq!(fs::read_dir(folder.path().join("c/snapshot")).unwrap().count(), 1);
    assert_eq!(link(upper, c"name").unwrap().inode, made.inode);
    assert!(folder.path().join("c/snapshot/fs/name").exists());
}

#[test]
fn nothing_is_kept_of_what_a_guest_forgets_by_any_number() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (made, handle) = make(&files);
    files.link(context(), made.inode, ROOT, c"name").unwrap();
    release(&files, made.inode, handle);
    let of_share = files.number_of_share(made.inode);
    files.forget(context(), of_share, 1);
    assert!(files.known().files.is_empty() && files.known().named.is_empty());
    // A guest that begins anew knows nothing.
    make(&files);
    files.init(FsOptions::empty()).unwrap();
    assert!(files.known().files.is_empty() && files.known().open.is_empty());
}

#[test]
fn an_overlay_of_the_guest_makes_no_files_without_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let as_overlayfs = CreateIn { flags: (libc::O_RDWR | libc::O_LARGEFILE).cast_unsigned(), ..wanted(0) };
    assert_eq!(errno(files(folder.path()).make(context(), ROOT, &as_overlayfs)), libc::EOPNOTSUPP);
}

#[test]
fn a_file_is_made_as_who_asks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let ask = |uid: u32, gid: u32| {
        let header = InHeader { uid: uid.into(), gid: gid.into(), ..InHeader::default() };
        files.make(Context::from(header), ROOT, &wanted(0)).map(|(entry, ..)| (entry.attr.uid.into_inner(), entry.attr.gid.into_inner()))
    };
    assert_eq!(ask(1000, 100).unwrap(), (1000, 100));
    // Nor has the thread become such a user since.
    assert_eq!(errno(ask(65_536, 0)), libc::EPERM);
    assert_eq!(errno(ask(0, 65_536)), libc::EPERM);
    let own = fs::metadata("/proc/thread-self").unwrap();
    assert_eq!(ask(0, 0).unwrap(), (own.uid(), own.gid()));
}

#[test]
fn no_more_descriptors_are_held_than_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let made: Vec<_> = (0..MOST).map(|_| make(&files)).collect();
    let inode = |number: usize| made[number].0.inode;
    assert_eq!(errno(files.make(context(), ROOT, &wanted(0))), libc::ENFILE);
    assert_eq!(errno(files.open(context(), inode(0), false, 0)), libc::ENFILE);
    // One that is closed is still known, and one that is forgotten still open.
    release(&files, inode(0), made[0].1);
    files.forget(context(), inode(1), 1);
    assert_eq!(errno(files.make(context(), ROOT, &wanted(0))), libc::ENFILE);
    files.forget(context(), inode(0), 1);
    let again = files.open(context(), inode(2), false, 0).unwrap().0.unwrap();
    assert_eq!(errno(files.make(context(), ROOT, &wanted(0))), libc::ENFILE);
    release(&files, inode(2), again);
    make(&files);
    // One that has a name takes those of the share.
    files.link(context(), inode(3), ROOT, c"name").unwrap();
    release(&files, inode(3), made[3].1);
    make(&files);
    files.destroy();
    files.init(FsOptions::empty()).unwrap();
    (0..MOST).map(|_| make(&files)).for_each(|(entry, _)| assert!(entry.inode >= FIRST));
}

/// An overlay in whose lower layer one file has the names `p` and `q`, in a mount namespace of this thread. Only root may
/// have one: nobody else gets a folder, and node tests show the same.
fn overlay() -> Option<tempfile::TempDir> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, none) = (folder.path(), None::<&str>);
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("files"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    for name in ["lower", "upper", "work", "root"] {
        fs::create_dir(path.join(name)).unwrap();
    }
    fs::write(path.join("lower/p"), "old").unwrap();
    fs::hard_link(path.join("lower/p"), path.join("lower/q")).unwrap();
    let layers = format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", path.display());
    mount(Some("overlay"), &path.join("root"), Some("overlay"), MsFlags::empty(), Some(layers.as_str())).unwrap();
    Some(folder)
}

#[test]
fn names_of_a_file_in_a_layer_are_files_of_their_own() {
    let Some(folder) = overlay() else { return };
    let root = folder.path().join("root");
    let files = files(&root);
    let find = |name: &CStr| files.lookup(context(), ROOT, name).unwrap().inode;
    let (q, p) = (find(c"q"), find(c"p"));
    assert!(p >= FIRST && q >= FIRST && p != q);
    assert_eq!((find(c"p"), find(c"q")), (p, q));
    // The host's number is no help, as both have one.
    let ino = |inode| files.getattr(context(), inode, None).unwrap().0.ino;
    assert_eq!(ino(p), ino(q));
    let (handle, options) = files.open(context(), p, false, libc::O_WRONLY.cast_unsigned()).unwrap();
    assert_eq!(options, OpenOptions::empty());
    write(&files, p, handle.unwrap(), 0, "new");
    files.release(context(), p, 0, handle.unwrap(), false, false, None).unwrap();
    assert_eq!(
        (fs::read_to_string(root.join("p")).unwrap().as_str(), fs::read_to_string(root.join("q")).unwrap().as_str()),
        ("new", "old")
    );
    // It has another number of the host's now and one name, and is the same file to the guest.
    assert!(ino(p) != ino(q));
    assert_eq!((find(c"p"), find(c"q")), (p, q));
    // Two names in the upper layer are one file.
    assert_eq!(files.link(context(), p, ROOT, c"r").unwrap().inode, p);
    assert_eq!((find(c"r"), find(c"p")), (p, p));
    files.rename(context(), ROOT, c"q", ROOT, c"s", 0).unwrap();
    assert_eq!(find(c"s"), q);
    // `p` was told of five times, by three lookups of that name, by the link, and by a lookup of the other.
    files.forget(context(), p, 5);
    assert!(files.getattr(context(), p, None).is_ok());
    files.forget(context(), p, 1);
    assert_eq!(files.getattr(context(), p, None).unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert!(find(c"p") > q && find(c"s") == q);
}

#[test]
fn attributes_of_a_file_with_several_names_go_to_the_name_that_was_meant() {
    let Some(folder) = overlay() else { return };
    let root = folder.path().join("root");
    let files = files(&root);
    let [q, p] = [c"q", c"p"].map(|name| files.lookup(context(), ROOT, name).unwrap().inode);
    let wanted = SetattrIn { mode: 0o600, size: 1, uid: 5.into(), mtime: 7, ..SetattrIn::default() };
    let valid = SetattrValid::MODE | SetattrValid::SIZE | SetattrValid::UID | SetattrValid::MTIME;
    files.setattr(context(), p, wanted, None, valid).unwrap();
    let seen =
        |name: &str| fs::metadata(root.join(name)).map(|meta| (meta.mode() & 0o777, meta.size(), meta.uid(), meta.mtime() == 7)).unwrap();
    assert_eq!(seen("p"), (0o600, 1, 5, true));
    assert_eq!((seen("q").1, seen("q").2, seen("q").3), (3, 0, false));
    assert!(files.statfs(context(), q).unwrap().f_bsize > 0);
}

#[test]
fn what_gives_a_file_rights_on_the_host_is_done_and_not_kept_in_a_volume() {
    for keeps in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let files = files_of(folder.path(), keeps);
        let (entry, handle, _) =
            files.create(context(), ROOT, c"file", 0o4755, false, libc::O_RDWR.cast_unsigned(), 0, Extensions::default()).unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("file"), if keeps { 0o4755 } else { 0o755 });
        let change = |inode, mode| files.setattr(context(), inode, SetattrIn { mode, ..SetattrIn::default() }, None, SetattrValid::MODE);
        // The guest hears what is kept.
        assert_eq!(change(entry.inode, 0o6711).unwrap().0.mode & 0o7777, if keeps { 0o6711 } else { 0o711 });
        change(entry.inode, 0o2644).unwrap();
        assert_eq!(mode("file"), 0o2644);
        let inner = files.mkdir(context(), ROOT, c"folder", 0o755, 0, Extensions::default()).unwrap();
        change(inner.inode, 0o2775).unwrap();
        assert_eq!(mode("folder"), 0o2775);
        let unnamed = make(&files).0;
        assert_eq!(change(unnamed.inode, 0o4700).unwrap().0.mode & 0o7777, if keeps { 0o4700 } else { 0o700 });
        if nix::unistd::geteuid().is_root() {
            // Who makes room in it writes it.
            change(entry.inode, 0o4711).unwrap();
            let user = Context::from(InHeader { uid: 1000.into(), gid: 1000.into(), ..InHeader::default() });
            files.fallocate(user, entry.inode, handle.unwrap(), 0, 0, 4096).unwrap();
            assert_eq!(mode("file"), 0o711);
            // Also in a thread that has made a file as that user meanwhile.
            fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
            files.create(user, ROOT, c"users", 0o600, false, libc::O_RDWR.cast_unsigned(), 0, Extensions::default()).unwrap();
            let cut = SetattrIn { size: 1, ..SetattrIn::default() };
            for valid in [SetattrValid::SIZE, SetattrValid::SIZE | SetattrValid::KILL_SUIDGID] {
                change(entry.inode, 0o4711).unwrap();
                files.setattr(context(), entry.inode, cut, None, valid).unwrap();
                let kills = valid.contains(SetattrValid::KILL_SUIDGID) || !keeps;
                assert_eq!(mode("file"), if kills { 0o711 } else { 0o4711 }, "{valid:?}");
            }
        }
        files.release(context(), entry.inode, 0, handle.unwrap(), false, false, None).unwrap();
        let device = files.mknod(context(), ROOT, c"null", libc::S_IFCHR | 0o666, 0x103, 0, Extensions::default());
        let refused = device.err().and_then(|error| error.raw_os_error());
        // Not everybody may make one, and nobody may be let to here.
        assert!(refused == Some(libc::EPERM) || keeps, "{refused:?}");
        if nix::unistd::geteuid().is_root() {
            assert_eq!(refused.is_none(), keeps);
            files.mknod(context(), ROOT, c"gone", libc::S_IFCHR, 0, 0, Extensions::default()).unwrap();
            let capabilities = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            files.setxattr(context(), entry.inode, CAPABILITIES, &capabilities, 0, SetxattrFlags::empty()).unwrap();
            assert_eq!(files.getxattr(context(), entry.inode, CAPABILITIES, 100).is_ok(), keeps);
            if !keeps {
                let pipe = files.mknod(context(), ROOT, c"pipe", libc::S_IFIFO | 0o600, 0, 0, Extensions::default()).unwrap().inode;
                files.setxattr(context(), pipe, CAPABILITIES, &capabilities, 0, SetxattrFlags::empty()).unwrap();
            }
        }
    }
}

#[test]
fn a_file_system_without_access_lists_has_none_for_a_file() {
    let files = files(Path::new("/proc"));
    let inode = files.lookup(context(), ROOT, c"sys").unwrap().inode;
    for name in ACCESS_LISTS {
        assert_eq!(files.getxattr(context(), inode, name, 100).err().unwrap().raw_os_error(), Some(libc::ENODATA), "{name:?}");
    }
    assert_eq!(files.getxattr(context(), inode, c"user.other", 100).err().unwrap().raw_os_error(), Some(libc::EOPNOTSUPP));
}
