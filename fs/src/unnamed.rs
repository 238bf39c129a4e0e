//! Files without a name: those that a program opens with `O_TMPFILE`, and may give a name later (open(2)).
//!
//! virtiofsd finds a file by its name, so it cannot know these: they are kept here until they have one. The guest knows a
//! file by the number that it was told first, for as long as it remembers it, so that goes on to hold then:
//!
//! ```text
//! made --> Unnamed: ours --given a name--> Named: the share's, and the guest's number for it is ours
//!             \                                      \
//!              `-- forgotten by the guest: gone       `-- forgotten: known by the share's number, should it come again
//! ```
//!
//! What the guest has opened of it meanwhile stays ours until it is closed.

mod file;
mod held;

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, SetxattrFlags,
    ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, CreateIn, SetattrIn};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::xattrmap::XattrMap;

use crate::request::Make;
use crate::seal::check_name;
use crate::share::{Handle, Inode, Share, check_range};
use file::{Unnamed, as_another};
use held::Held;
pub use held::Room;

type DirIter = <Share as FileSystem>::DirIter;

/// Our numbers, of files and of what the guest has open, are from this on; the library below counts up from one.
pub const FIRST: u64 = 1 << 63;

/// How such files are made and served.
pub struct Rules {
    /// `/proc/self/fd`.
    pub descriptors: File,
    /// The names of attributes, as the share has them.
    pub attributes: XattrMap,
    /// The first id that users of a pod with ids of its own do not have.
    pub ids: Option<u32>,
    /// For how long the guest may keep what it has heard of a file.
    pub attr_timeout: Duration,
    /// Whether it may keep what it has read of one.
    pub caches: bool,
    /// For what is open of them.
    pub room: Arc<Room>,
}

/// What the guest knows of ours.
#[derive(Default)]
struct Known {
    /// Numbers given out.
    numbers: u64,
    files: HashMap<Inode, Place>,
    open: HashMap<Handle, (Inode, Arc<Held>)>,
    /// Those of the share that the guest knows by a number of ours.
    named: HashMap<Inode, Inode>,
}

/// Where a file is.
#[derive(Clone)]
enum Place {
    Here(Arc<Unnamed>),
    /// `untold` is whether the share has yet to pass over that the guest was told of the file here.
    Share {
        inode: Inode,
        untold: bool,
    },
}

impl Known {
    fn number(&mut self) -> u64 {
        self.numbers += 1;
        FIRST + self.numbers - 1
    }

    /// Keeps an open file.
    fn open(&mut self, inode: Inode, file: Arc<Held>) -> Handle {
        let handle = self.number();
        self.open.insert(handle, (inode, file));
        handle
    }
}

/// The share, with the files in it that have no name. A copy is of the same one.
#[derive(Clone)]
pub struct Files {
    share: Share,
    rules: Arc<Rules>,
    known: Arc<RwLock<Known>>,
}

impl Files {
    /// Those of a share.
    pub fn new(share: Share, rules: Rules) -> Self {
        Self { share, rules: Arc::new(rules), known: Arc::default() }
    }

    /// Makes a file without a name in a folder, and opens it.
    ///
    /// # Errors
    /// Those of open(2); `EOPNOTSUPP` where the file system of the host knows no such files, and for a guest's overlayfs.
    pub fn make(&self, ctx: Context, folder: Inode, wanted: &CreateIn) -> io::Result<(Entry, Handle, OpenOptions)> {
        // It asks without the flag. When it has copied a file up so, it goes on by the name that the file was made with, which is
        // none, and takes it for gone when it is told so; Linux has that as late as 6.12.
        if wanted.flags.cast_signed() & libc::O_TMPFILE != libc::O_TMPFILE {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let unnamed = self.share.within(ctx, folder, |open| Unnamed::make(&self.rules, ctx, (folder, open), wanted))?;
        let attr = self.attr(&unnamed)?;
        let mut known = self.known_mut();
        let inode = known.number();
        let handle = known.open(inode, Arc::clone(&unnamed.file));
        known.files.insert(inode, Place::Here(Arc::new(unnamed)));
        let entry = Entry { inode, generation: 0, attr, attr_timeout: self.rules.attr_timeout, entry_timeout: Duration::ZERO };
        Ok((entry, handle, self.options()))
    }

    /// What makes them, for the device.
    pub fn maker(&self) -> Make {
        let files = self.clone();
        Box::new(move |ctx, folder, wanted| files.make(ctx, folder, wanted))
    }

    /// Opens a file that the guest knows, to be mapped.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn file(&self, ctx: Context, inode: Inode, writes: bool) -> io::Result<File> {
        self.share.file(ctx, self.number_of_share(inode), writes)
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn attr(&self, unnamed: &Unnamed) -> io::Result<Attr> {
        let mut attr = unnamed.attr()?;
        self.share.mark(&mut attr);
        Ok(attr)
    }

    /// Nobody but the guest changes such a file, so it keeps what it has of it.
    fn options(&self) -> OpenOptions {
        if self.rules.caches { OpenOptions::KEEP_CACHE } else { OpenOptions::DIRECT_IO }
    }

    /// Where a file is; of one that is nowhere the share says so.
    fn place(&self, inode: Inode) -> Place {
        let elsewhere = Place::Share { inode, untold: false };
        if inode < FIRST { elsewhere } else { self.known().files.get(&inode).cloned().unwrap_or(elsewhere) }
    }

    /// The number by which the share knows a file, if it does.
    fn number_of_share(&self, inode: Inode) -> Inode {
        if let Place::Share { inode, .. } = self.place(inode) { inode } else { inode }
    }

    /// A file that the guest has opened here.
    fn opened(&self, inode: Inode, handle: Handle) -> Option<Arc<Held>> {
        if handle < FIRST {
            return None;
        }
        self.known().open.get(&handle).filter(|(of, _)| *of == inode).map(|(_, file)| Arc::clone(file))
    }

    /// A file that the guest has opened, wherever that is.
    fn opened_anywhere(&self, ctx: Context, inode: Inode, handle: Handle) -> io::Result<File> {
        match self.opened(inode, handle) {
            Some(file) => file.try_clone(),
            None => self.share.opened_file(ctx, self.number_of_share(inode), handle),
        }
    }

    /// What the guest is told of a file of the share.
    fn told(&self, mut entry: Entry) -> Entry {
        if let Some(ours) = self.known().named.get(&entry.inode) {
            entry.inode = *ours;
        }
        entry
    }

    /// Gives a file its first name.
    fn name(&self, ctx: Context, ours: Inode, unnamed: &Unnamed, folder: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.share.within(ctx, folder, |folder| unnamed.link(&self.rules, folder, name))?;
        let entry = self.share.lookup(ctx, folder, name).inspect_err(|_| {
            // A name that the guest does not hear of would be there all the same.
            let _ = self.share.unlink(ctx, folder, name);
        })?;
        // Somebody of the host may have put another in its place since.
        if entry.attr.ino != unnamed.attr()?.ino {
            return Ok(self.told(entry));
        }
        let mut known = self.known_mut();
        known.files.insert(ours, Place::Share { inode: entry.inode, untold: true });
        known.named.insert(entry.inode, ours);
        Ok(Entry { inode: ours, ..entry })
    }

    /// What the guest has forgotten of a file of the share's is not ours any more, once that has it no longer.
    fn forget_named(&self, ctx: Context, of_share: Inode) {
        let Some(ours) = self.known().named.get(&of_share).copied() else { return };
        if self.share.getattr(ctx, of_share, None).is_err_and(|error| error.raw_os_error() == Some(libc::EBADF)) {
            let mut known = self.known_mut();
            known.files.remove(&ours);
            known.named.remove(&of_share);
        }
    }
}

/// Requests about folders, and those of the share as a whole.
macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $answer {
            self.share.$name($($argument),*)
        })*
    };
}

/// Requests that are answered with a file.
macro_rules! tell {
    ($(fn $name:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> io::Result<Entry> {
            self.share.$name($($argument),*).map(|entry| self.told(entry))
        })*
    };
}

/// Requests about a file, by what is done with one here, and by what the share is asked besides.
macro_rules! of_file {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty { |$self:ident, $ctx:ident, $unnamed:ident| $here:expr })*) => {
        $(fn $name(&$self, $ctx: Context, inode: Inode, $($argument: $kind),*) -> io::Result<$answer> {
            match $self.place(inode) {
                Place::Here($unnamed) => $here,
                Place::Share { inode, .. } => $self.share.$name($ctx, inode, $($argument),*),
            }
        })*
    };
}

/// Requests about a file that the guest has open.
macro_rules! of_open_file {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty { |$self:ident, $file:ident| $here:expr })*) => {
        $(fn $name(&$self, ctx: Context, inode: Inode, handle: Handle, $($argument: $kind),*) -> io::Result<$answer> {
            match $self.opened(inode, handle) {
                Some($file) => $here,
                None => $self.share.$name(ctx, $self.number_of_share(inode), handle, $($argument),*),
            }
        })*
    };
}

impl FileSystem for Files {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        *self.known_mut() = Known::default();
        self.share.init(capable)
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        if inode < FIRST {
            self.share.forget(ctx, inode, count);
            return self.forget_named(ctx, inode);
        }
        let mut known = self.known_mut();
        let Some(Place::Share { inode: of_share, untold }) = known.files.get_mut(&inode) else {
            let gone = known.files.remove(&inode);
            drop(known);
            // The host frees what it held, which may take a while.
            return drop(gone);
        };
        let (of_share, untold) = (*of_share, std::mem::take(untold));
        drop(known);
        self.share.forget(ctx, of_share, count.saturating_sub(untold.into()));
        self.forget_named(ctx, of_share);
    }

    fn destroy(&self) {
        self.share.destroy();
        *self.known_mut() = Known::default();
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        let (entry, handle, options) = self.share.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        Ok((self.told(entry), handle, options))
    }

    fn link(&self, ctx: Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        match self.place(inode) {
            Place::Here(unnamed) => self.name(ctx, inode, &unnamed, parent, name),
            Place::Share { inode, .. } => self.share.link(ctx, inode, parent, name).map(|entry| self.told(entry)),
        }
    }

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        match self.place(inode) {
            Place::Here(unnamed) => {
                let file = unnamed.open(&self.rules, flags, kill_priv)?;
                Ok((Some(self.known_mut().open(inode, file)), self.options()))
            }
            Place::Share { inode, .. } => self.share.open(ctx, inode, kill_priv, flags),
        }
    }

    fn release(
        &self,
        ctx: Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let closed = self.opened(inode, handle).and_then(|_| self.known_mut().open.remove(&handle));
        if closed.is_some() {
            return Ok(());
        }
        self.share.release(ctx, self.number_of_share(inode), flags, handle, flush, unlock, lock_owner)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        wanted: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        match self.place(inode) {
            Place::Here(unnamed) => {
                unnamed.set(&wanted, valid)?;
                Ok((self.attr(&unnamed)?, self.rules.attr_timeout))
            }
            Place::Share { inode, .. } => self.share.setattr(ctx, inode, wanted, handle.filter(|handle| *handle < FIRST), valid),
        }
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let Some(file) = self.opened(inode, handle) else {
            return self.share.read(ctx, self.number_of_share(inode), handle, to, size, offset, lock_owner, flags);
        };
        check_range(offset, size.into())?;
        to.read_from_file_at(&file, size as usize, offset, None)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        mut from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let Some(file) = self.opened(inode, handle) else {
            let inode = self.number_of_share(inode);
            return self.share.write(ctx, inode, handle, from, size, offset, lock_owner, delayed, kill_priv, flags);
        };
        check_range(offset, size.into())?;
        let _another = as_another(kill_priv)?;
        // What was written to the guest's memory first has its place already.
        let appends = !delayed && flags.cast_signed() & libc::O_APPEND != 0;
        from.write_to_file_at(&file, size as usize, offset, appends.then_some(WritevFlags::RWF_APPEND))
    }

    fn fsync(&self, ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        match self.opened(inode, handle) {
            Some(file) if datasync => file.sync_data(),
            Some(file) => file.sync_all(),
            None => self.share.fsync(ctx, self.number_of_share(inode), datasync, handle),
        }
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        from: Inode,
        from_handle: Handle,
        mut from_offset: u64,
        to: Inode,
        to_handle: Handle,
        mut to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        if from_handle < FIRST && to_handle < FIRST {
            let [from, to] = [from, to].map(|inode| self.number_of_share(inode));
            return self.share.copyfilerange(ctx, from, from_handle, from_offset, to, to_handle, to_offset, length, flags);
        }
        check_range(from_offset, length)?;
        check_range(to_offset, length)?;
        let (from, to) = (self.opened_anywhere(ctx, from, from_handle)?, self.opened_anywhere(ctx, to, to_handle)?);
        Ok(copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), length as usize)?)
    }

    of_open_file! {
        fn flush(owner: u64) -> () { |self, file| file.try_clone().map(drop) }
        fn fallocate(mode: u32, offset: u64, length: u64) -> () { |self, file| {
            check_range(offset, length)?;
            Ok(fallocate(file, FallocateFlags::from_bits_retain(mode), offset, length)?)
        } }
        fn lseek(offset: u64, whence: u32) -> u64 { |self, file| find(&file, offset, whence) }
    }

    of_file! {
        fn getattr(handle: Option<Handle>) -> (Attr, Duration) { |self, _ctx, file| Ok((self.attr(&file)?, self.rules.attr_timeout)) }
        fn setxattr(name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> () { |self, _ctx, file|
            file.set_attribute(&self.rules.attributes, name, value, flags, extra)
        }
        fn getxattr(name: &CStr, size: u32) -> GetxattrReply { |self, _ctx, file| file.attribute(&self.rules.attributes, name, size) }
        fn listxattr(size: u32) -> ListxattrReply { |self, _ctx, file| file.attributes(&self.rules.attributes, size) }
        fn removexattr(name: &CStr) -> () { |self, _ctx, file| file.remove_attribute(&self.rules.attributes, name) }
        fn statfs() -> libc::statvfs64 { |self, ctx, file| self.share.statfs(ctx, file.folder) }
    }

    tell! {
        fn lookup(ctx: Context, parent: Inode, name: &CStr);
        fn symlink(ctx: Context, target: &CStr, parent: Inode, name: &CStr, extensions: Extensions);
        fn mknod(ctx: Context, parent: Inode, name: &CStr, mode: u32, device: u32, umask: u32, extensions: Extensions);
        fn mkdir(ctx: Context, parent: Inode, name: &CStr, mode: u32, umask: u32, extensions: Extensions);
    }

    pass_on! {
        fn opendir(ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<DirIter>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rename(ctx: Context, from: Inode, name: &CStr, to: Inode, new_name: &CStr, flags: u32) -> io::Result<()>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}

/// Finds the next of a file's data or holes (lseek(2)); no kernel asks for more.
fn find(file: &File, offset: u64, whence: u32) -> io::Result<u64> {
    let place = match whence.cast_signed() {
        libc::SEEK_DATA => SeekFrom::Data(offset),
        libc::SEEK_HOLE => SeekFrom::Hole(offset),
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    Ok(seek(file, place)?)
}

#[cfg(test)]
mod tests;
