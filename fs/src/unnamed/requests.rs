//! The guest's requests: what is done with files of ours, and what the share is asked.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, SetxattrFlags,
    ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, ROOT_ID, SetattrIn};
use virtiofsd::oslib::WritevFlags;

use super::file::Kind;
use super::{ACCESS_LISTS, DirIter, FIRST, Files, Place};
use crate::share::{Handle, Inode, check_range};
use crate::volumes::{CAPABILITIES, as_another, as_user};

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
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty { |$self:ident, $ctx:ident, $file:ident| $here:expr })*) => {
        $(fn $name(&$self, $ctx: Context, inode: Inode, handle: Handle, $($argument: $kind),*) -> io::Result<$answer> {
            match $self.opened(inode, handle) {
                Some($file) => $here,
                None => $self.share.$name($ctx, $self.number_of_share(inode), handle, $($argument),*),
            }
        })*
    };
}

impl FileSystem for Files {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.clear();
        self.share.init(capable)
    }

    fn forget(&self, ctx: Context, inode: Inode, count: u64) {
        if inode < FIRST {
            self.share.forget(ctx, inode, count);
            if self.share.is_unknown(ctx, inode) {
                self.volumes.forget(inode);
            }
            return self.forget_named(ctx, inode);
        }
        if let Place::Here(own) = self.place(inode)
            && matches!(own.kind, Kind::Linked { .. })
        {
            return self.forget_linked(inode, &own, count);
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
        self.clear();
    }

    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        let entry = self.share.lookup_or(ctx, parent, name, |found| self.find_linked(ctx, parent, name, found))?;
        self.note_mount(ctx, parent, name, entry.inode)?;
        // A container may come at once under the name of one that has gone, whose mounts nothing is opened in any more.
        let entry_timeout = if parent == ROOT_ID { Duration::ZERO } else { entry.entry_timeout };
        Ok(self.told(Entry { entry_timeout, ..entry }))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let kind = mode & libc::S_IFMT;
        // A node of no device is how an overlay marks what is gone.
        let is_device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK) && device != 0;
        if is_device && !self.keeps(ctx, parent)? {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let mode = if kind == libc::S_IFREG || kind == 0 { self.kept_mode(ctx, parent, mode)? } else { mode };
        self.share.mknod(ctx, parent, name, mode, device, umask, extensions).map(|entry| self.told(entry))
    }

    fn rename(&self, ctx: Context, from: Inode, name: &CStr, to: Inode, new_name: &CStr, flags: u32) -> io::Result<()> {
        self.share.rename(ctx, from, name, to, new_name, flags)?;
        self.settle_name(ctx, to, new_name);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.settle_name(ctx, from, name);
        }
        Ok(())
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
        let mode = self.kept_mode(ctx, parent, mode)?;
        let (entry, handle, options) = self.share.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        Ok((self.told(entry), handle, options))
    }

    fn link(&self, ctx: Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        match self.place(inode) {
            Place::Here(own) if matches!(own.kind, Kind::Linked { .. }) => self.link_again(ctx, inode, &own, parent, name),
            Place::Here(unnamed) => self.name(ctx, inode, &unnamed, parent, name),
            Place::Share { inode, .. } => self.share.link(ctx, inode, parent, name).map(|entry| self.told(entry)),
        }
    }

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        match self.place(inode) {
            Place::Here(own) => {
                let file = self.share.descriptors().mind(own.open(&self.rules, flags, kill_priv))?;
                let options = match own.kind {
                    Kind::Unnamed => self.options(),
                    // Others of the host may change one that has names, as they may any file.
                    Kind::Linked { .. } => self.share.keeps(inode, flags, || self.settle(&own)) | self.options_of_share(),
                };
                Ok((Some(self.known_mut().open(inode, file)), options))
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
        let wanted = self.kept_change(ctx, inode, wanted, valid)?;
        match self.place(inode) {
            Place::Here(own) => {
                own.set(&self.rules, &wanted, valid)?;
                let attr = self.settle(&own)?;
                let timeout = self.attr_timeout(&attr);
                Ok((attr, timeout))
            }
            Place::Share { inode, .. } => self.share.setattr(ctx, inode, wanted, handle.filter(|handle| *handle < FIRST), valid),
        }
    }

    fn setxattr(&self, ctx: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()> {
        if name == CAPABILITIES && !self.keeps(ctx, inode)? {
            return Ok(());
        }
        match self.place(inode) {
            Place::Here(own) => {
                own.set_attribute(&self.rules, name, value, flags, extra)?;
                self.settle(&own).map(drop)
            }
            Place::Share { inode, .. } => self.share.setxattr(ctx, inode, name, value, flags, extra),
        }
    }

    fn getxattr(&self, ctx: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let answer = match self.place(inode) {
            Place::Here(own) => own.attribute(&self.rules, name, size),
            Place::Share { inode, .. } => self.share.getxattr(ctx, inode, name, size),
        };
        answer.map_err(|error| match error.raw_os_error() {
            // A file system of the host without access lists has none for this file. To the guest, whose file system has
            // them, anything else is a reason to refuse access.
            Some(libc::EOPNOTSUPP) if ACCESS_LISTS.contains(&name) => io::Error::from_raw_os_error(libc::ENODATA),
            _ => error,
        })
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
        let _user = as_user(ctx)?;
        Ok(copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), length as usize)?)
    }

    of_open_file! {
        fn flush(owner: u64) -> () { |self, _ctx, file| file.try_clone().map(drop) }
        fn fallocate(mode: u32, offset: u64, length: u64) -> () { |self, ctx, file| {
            check_range(offset, length)?;
            let _user = as_user(ctx)?;
            Ok(fallocate(file, FallocateFlags::from_bits_retain(mode), offset, length)?)
        } }
        fn lseek(offset: u64, whence: u32) -> u64 { |self, _ctx, file| find(&file, offset, whence) }
    }

    of_file! {
        fn getattr(handle: Option<Handle>) -> (Attr, Duration) { |self, _ctx, file| {
            let attr = self.attr(&file)?;
            let timeout = self.attr_timeout(&attr);
            Ok((attr, timeout))
        } }
        fn listxattr(size: u32) -> ListxattrReply { |self, _ctx, file| file.attributes(&self.rules, size) }
        fn removexattr(name: &CStr) -> () { |self, _ctx, file| {
            file.remove_attribute(&self.rules, name)?;
            self.settle(&file).map(drop)
        } }
        fn statfs() -> libc::statvfs64 { |self, ctx, file| {
            let its = file.file_system()?;
            // The type has fields that nobody can fill.
            let mut all = self.share.statfs(ctx, ROOT_ID)?;
            (all.f_bsize, all.f_frsize, all.f_blocks, all.f_bfree) = (its.f_bsize, its.f_frsize, its.f_blocks, its.f_bfree);
            (all.f_bavail, all.f_files, all.f_ffree, all.f_favail) = (its.f_bavail, its.f_files, its.f_ffree, its.f_favail);
            all.f_namemax = its.f_namemax;
            Ok(all)
        } }
        fn readlink() -> Vec<u8> { |self, _ctx, file| file.target() }
    }

    tell! {
        fn symlink(ctx: Context, target: &CStr, parent: Inode, name: &CStr, extensions: Extensions);
        fn mkdir(ctx: Context, parent: Inode, name: &CStr, mode: u32, umask: u32, extensions: Extensions);
    }

    pass_on! {
        fn opendir(ctx: Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)>;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64) -> io::Result<DirIter>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn fsyncdir(ctx: Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
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
