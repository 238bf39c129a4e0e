//! The share as the guest's requests meet it: virtiofsd's file system, with five things of ours. Files without a name are
//! beside it (`unnamed.rs`).
//!
//! **What may be kept.** With the policy `auto` a guest drops what it has cached of a file whenever the
//! file is opened, so that a program is read again each time that it is run. Here it keeps that,
//! as long as the file's times and size are those that it had when the guest last opened it:
//!
//! ```text
//! unknown --open--> fresh (its change is too recent to be told from the next) --open, unchanged--> settled
//! settled --open, unchanged--> settled: the guest keeps what it has
//!     any --open, changed--> fresh or settled, by the age of its last change
//!     any --forgotten by the guest--> unknown
//! ```
//!
//! A change through somebody's mapping of the file shows in its times when the kernel writes it out.
//!
//! **What need not be said.** That a file is closed matters to file systems which write then, as NFS does; of one
//! that was opened to be read alone the guest does not tell.
//!
//! **What is sealed.** The folders that hold containers' snapshots (`seal.rs`).
//!
//! **What is counted.** The descriptors that the guest holds (`descriptors.rs`).
//!
//! **What is refused.** Offsets that no file has, and names that are paths: no kernel asks for them, and the server below has
//! no answer for the former and follows the latter.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, SetxattrFlags,
    ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

use crate::dax;
use crate::descriptors::Descriptors;
use crate::seal::{Seal, check_name};
use crate::volumes::{as_another, as_user};

/// After so long a change is told from the next by its time: file systems count in steps of up to two
/// seconds, and a file server's clock may be a little behind ours.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// So many files are remembered, in some 10 MiB: a guest may have any number of them open, and forgetting costs no more
/// than that they are read again.
const MOST_OPENED: usize = 65_536;

/// A guest's `trusted` attributes are not the host's: those hold for every process there, and who sets them must be its
/// root. They are kept under names that no guest can use otherwise (virtiofsd's `doc/xattr-mapping.md`).
pub const ATTRIBUTES: &str = "/prefix/all/trusted./user.virtiofs./ /bad/server//trusted./ /bad/client/user.virtiofs.// /ok/all///";

/// By which the guest knows a file.
pub type Inode = <PassthroughFs as FileSystem>::Inode;
/// By which it knows what it has open.
pub type Handle = <PassthroughFs as FileSystem>::Handle;
type DirIter = <PassthroughFs as FileSystem>::DirIter;

/// By which a file's state is known from another: change and modification in nanoseconds, size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    changed: u128,
    modified: u128,
    size: u64,
}

impl Stamp {
    fn of(attr: &Attr) -> Self {
        let time = |seconds: u64, nanoseconds: u32| u128::from(seconds) * 1_000_000_000 + u128::from(nanoseconds);
        Self { changed: time(attr.ctime, attr.ctimensec), modified: time(attr.mtime, attr.mtimensec), size: attr.size }
    }

    /// Whether a change from now on has another time.
    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        self.changed.checked_add(SETTLED_AFTER.as_nanos()).is_some_and(|settled| settled < now)
    }
}

/// The files that the guest has opened, as they were then, and whether that was settled.
#[derive(Default)]
struct Opened(HashMap<Inode, (Stamp, bool)>);

impl Opened {
    /// Notes that a file is opened; whether what the guest has of it is what the file holds.
    fn open(&mut self, inode: Inode, stamp: Stamp, now: SystemTime) -> bool {
        if self.0.len() >= MOST_OPENED && !self.0.contains_key(&inode) {
            self.0.clear();
        }
        let known = self.0.insert(inode, (stamp, stamp.is_settled(now)));
        known == Some((stamp, true))
    }

    fn forget(&mut self, inode: Inode) {
        self.0.remove(&inode);
    }
}

/// The share. A copy is of the same one.
#[derive(Clone)]
pub struct Share {
    fs: Arc<PassthroughFs>,
    /// Of the policy `auto` alone: with `always` a guest keeps everything, with `never` nothing.
    opened: Option<Arc<Mutex<Opened>>>,
    descriptors: Arc<Descriptors>,
    seal: Arc<Seal>,
    /// Whether the guest maps files.
    maps: bool,
}

/// Takes the file that it is to be written from.
struct Taken(Option<File>);

impl ZeroCopyWriter for Taken {
    fn read_from_file_at(&mut self, file: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        self.0 = Some(file.try_clone()?);
        Ok(0)
    }
}

impl Share {
    /// A share of files; with `keep` the guest keeps what it has of files that did not change, with `maps` it maps large ones.
    pub fn new(fs: PassthroughFs, keep: bool, maps: bool, descriptors: Arc<Descriptors>) -> Self {
        Self { fs: Arc::new(fs), opened: keep.then(Arc::default), descriptors, seal: Arc::default(), maps }
    }

    /// Opens a file that the guest knows, to be mapped.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn file(&self, ctx: Context, inode: Inode, writes: bool) -> io::Result<File> {
        let flags = if writes { libc::O_RDWR } else { libc::O_RDONLY }.cast_unsigned();
        let (handle, _) = self.descriptors.mind(self.fs.open(ctx, inode, false, flags))?;
        let handle = handle.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let file = self.opened_file(ctx, inode, handle);
        self.fs.release(ctx, inode, flags, handle, false, false, None)?;
        file
    }

    /// A file that the guest has opened.
    ///
    /// # Errors
    /// When it has not, or there is no descriptor left.
    pub fn opened_file(&self, ctx: Context, inode: Inode, handle: Handle) -> io::Result<File> {
        let mut taken = Taken(None);
        self.fs.read(ctx, inode, handle, &mut taken, 1, 0, None, 0)?;
        taken.0.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Does something in a folder in which the guest may make and name files.
    ///
    /// # Errors
    /// Those of `act`, of open(2), and `EPERM` where it may not.
    pub fn within<T>(&self, ctx: Context, folder: Inode, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let _opened = self.seal.open(&[folder])?;
        act(&self.file(ctx, folder, false)?)
    }

    /// Says of a file what a guest with a window needs to hear.
    pub fn mark(&self, attr: &mut Attr) {
        if self.maps {
            dax::mark(attr);
        }
    }

    fn marked(&self, mut entry: Entry) -> Entry {
        self.mark(&mut entry.attr);
        entry
    }

    /// What the guest may keep of a file that it has just opened. `attr` looks at the file after that: what the guest
    /// reads from now on is that or newer.
    pub fn keeps(&self, inode: Inode, flags: u32, attr: impl FnOnce() -> io::Result<Attr>) -> OpenOptions {
        let mut options = OpenOptions::empty();
        if let Some(mut opened) = self.opened()
            && let Ok(attr) = attr()
            && opened.open(inode, Stamp::of(&attr), SystemTime::now())
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        if flags.cast_signed() & libc::O_ACCMODE == libc::O_RDONLY {
            options |= OpenOptions::NOFLUSH;
        }
        options
    }

    /// Forgets what [`Self::keeps`] noted of a file.
    pub fn unkeep(&self, inode: Inode) {
        if let Some(mut opened) = self.opened() {
            opened.forget(inode);
        }
    }

    /// Looks a name up. `replace` sees each file that the guest does not know yet, as [`Descriptors::answer_or`] says; what
    /// it replaces is forgotten.
    ///
    /// # Errors
    /// Those of the lookup, and of `replace`.
    pub fn lookup_or(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        replace: impl FnOnce(&Entry) -> io::Result<Option<Entry>>,
    ) -> io::Result<Entry> {
        let replace = |entry: &Entry| {
            let other = replace(entry);
            if !matches!(other, Ok(None)) {
                self.fs.forget(ctx, entry.inode, 1);
            }
            other
        };
        let find = || self.descriptors.answer_or(|| self.fs.lookup(ctx, parent, name), |entry| entry.inode, replace);
        self.seal.find(parent, name, find, |entry| entry.inode).map(|entry| self.marked(entry))
    }

    /// Whether the guest knows no such file any more: the server says so by an error of its own.
    pub fn is_unknown(&self, ctx: Context, inode: Inode) -> bool {
        self.fs.getattr(ctx, inode, None).is_err_and(|error| error.raw_os_error() == Some(libc::EBADF))
    }

    /// What counts the descriptors that the guest holds.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Notes that the guest has a file open, when it has.
    fn hold(&self, handle: Option<Handle>) -> Option<Handle> {
        handle.inspect(|_| self.descriptors.take())
    }

    fn opened(&self) -> Option<MutexGuard<'_, Opened>> {
        self.opened.as_ref().map(|opened| opened.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Refuses what is beyond the largest file.
///
/// # Errors
/// `EINVAL`.
pub fn check_range(offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Requests that are the file system's own affair.
macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $answer {
            self.fs.$name($($argument),*)
        })*
    };
}

/// Requests that change files, or those of such names in folders.
macro_rules! change {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) of $($folder:ident),* named [$($file:ident),*] => $answer:ty;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> $answer {
            let _opened = self.seal.open(&[$($folder),*])?;
            $(check_name($file)?;)*
            self.fs.$name($($argument),*)
        })*
    };
}

/// Requests that make a file in a folder, and are answered with it.
macro_rules! make {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) of $folder:ident $file:ident;)*) => {
        $(fn $name(&self, $($argument: $kind),*) -> io::Result<Entry> {
            let _opened = self.seal.open(&[$folder])?;
            check_name($file)?;
            self.descriptors.answer(|| self.fs.$name($($argument),*), |entry| entry.inode).map(|entry| self.marked(entry))
        })*
    };
}

impl FileSystem for Share {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = DirIter;

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        let opened = {
            let _another = as_another(kill_priv)?;
            self.fs.open(ctx, inode, false, flags)
        };
        let (handle, options) = self.descriptors.mind(opened)?;
        let handle = self.hold(handle);
        Ok((handle, options | self.keeps(inode, flags, || self.fs.getattr(ctx, inode, handle).map(|(attr, _)| attr))))
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        self.unkeep(inode);
        self.fs.forget(ctx, inode, count);
        // It may have been told of it again meanwhile.
        if self.is_unknown(ctx, inode) {
            self.descriptors.give_back();
            self.seal.forget(inode);
        }
    }

    fn destroy(&self) {
        self.fs.destroy();
        self.descriptors.clear();
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
        let _opened = self.seal.open(&[parent])?;
        check_name(name)?;
        let create = || self.fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions);
        let (entry, handle, options) = self.descriptors.answer(create, |(entry, ..)| entry.inode)?;
        Ok((self.marked(entry), self.hold(handle), options))
    }

    fn opendir(&self, ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.descriptors.mind(self.fs.opendir(ctx, inode, flags)).map(|(handle, options)| (self.hold(handle), options))
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
        self.fs.release(ctx, inode, flags, handle, flush, unlock, lock_owner)?;
        self.descriptors.give_back();
        Ok(())
    }

    fn releasedir(&self, ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.fs.releasedir(ctx, inode, flags, handle)?;
        self.descriptors.give_back();
        Ok(())
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        check_range(offset, size.into())?;
        self.fs.read(ctx, inode, handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Inode,
        handle: Handle,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        check_range(offset, size.into())?;
        let _another = as_another(kill_priv)?;
        self.fs.write(ctx, inode, handle, from, size, offset, lock_owner, delayed, false, flags)
    }

    fn fallocate(&self, ctx: Context, inode: Inode, handle: Handle, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        check_range(offset, length)?;
        let _user = as_user(ctx)?;
        self.fs.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        from: Inode,
        from_handle: Handle,
        from_offset: u64,
        to: Inode,
        to_handle: Handle,
        to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        check_range(from_offset, length)?;
        check_range(to_offset, length)?;
        let _user = as_user(ctx)?;
        self.fs.copyfilerange(ctx, from, from_handle, from_offset, to, to_handle, to_offset, length, flags)
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        self.lookup_or(ctx, parent, name, |_| Ok(None))
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let maps = if self.maps { FsOptions::HAS_INODE_DAX } else { FsOptions::empty() };
        self.fs.init(capable).map(|wanted| wanted | maps)
    }

    fn getattr(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)> {
        let (mut attr, valid) = self.fs.getattr(ctx, inode, handle)?;
        self.mark(&mut attr);
        Ok((attr, valid))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let _opened = self.seal.open(&[inode])?;
        let _another = as_another(valid.contains(SetattrValid::KILL_SUIDGID))?;
        let (mut attr, valid) = self.fs.setattr(ctx, inode, attr, handle, valid - SetattrValid::KILL_SUIDGID)?;
        self.mark(&mut attr);
        Ok((attr, valid))
    }

    make! {
        fn symlink(ctx: Context, target: &CStr, parent: Inode, name: &CStr, extensions: Extensions) of parent name;
        fn mknod(ctx: Context, parent: Inode, name: &CStr, mode: u32, device: u32, umask: u32, extensions: Extensions) of parent name;
        fn mkdir(ctx: Context, parent: Inode, name: &CStr, mode: u32, umask: u32, extensions: Extensions) of parent name;
        fn link(ctx: Context, inode: Inode, parent: Inode, name: &CStr) of parent name;
    }

    change! {
        fn setxattr(ctx: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) of inode named [] => io::Result<()>;
        fn removexattr(ctx: Context, inode: Inode, name: &CStr) of inode named [] => io::Result<()>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) of parent named [name] => io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) of parent named [name] => io::Result<()>;
        fn rename(ctx: Context, from: Inode, name: &CStr, to: Inode, new_name: &CStr, flags: u32) of from, to named [name, new_name]
            => io::Result<()>;
    }

    pass_on! {
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn flush(ctx: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn statfs(ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn getxattr(ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<DirIter>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests;
