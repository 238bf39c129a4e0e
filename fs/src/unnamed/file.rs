//! One file that we keep ourselves: what the guest asks of it.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat, fgetxattr,
    fgetxattr_query, flistxattr, flistxattr_query, fremovexattr, fsetxattr, fstatvfs, ftruncate, linkat, openat, readlinkat, utimensat,
};
use virtiofsd::filesystem::{Context, GetxattrReply, ListxattrReply, SetattrValid, SetxattrFlags};
use virtiofsd::fuse::{Attr, CreateIn, SetattrIn};
use virtiofsd::oslib::ScopedUmask;
use virtiofsd::passthrough::credentials::UnixCredentials;
use virtiofsd::passthrough::stat::statx;
use virtiofsd::passthrough::xattrmap::{AppliedRule, XattrMap};
use virtiofsd::soft_idmap::{GuestId, HostGid, HostId, HostUid, Id};

use super::Rules;
use super::held::Held;
use crate::linked::{Found, Identity};
use crate::volumes::as_another;

/// What of a caller's flags is the host's affair. Whether the guest reads or writes is its own: its kernel may read what a
/// program only writes.
const MAKES: i32 = libc::O_EXCL | OPENS;
const OPENS: i32 = libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC;
const ACL: &CStr = c"system.posix_acl_access";

/// The file.
pub struct Own {
    /// As it was opened first; one that has names with `O_PATH`.
    pub file: Arc<Held>,
    /// What we keep it for.
    pub kind: Kind,
}

/// Why a file is ours.
pub enum Kind {
    /// It has no name.
    Unnamed,
    /// It has several (`linked.rs`).
    Linked {
        /// By which it is known.
        identity: Identity,
        /// Whether it may be opened: it is no device, pipe, socket or link.
        regular: bool,
        /// How often the guest was told of it.
        told: AtomicU64,
        /// Its inode number of the host when it was last looked at.
        number: AtomicU64,
    },
}

/// A file's attributes that have no `*at` call are asked through a descriptor of their own.
enum Opened<'a> {
    Kept(&'a File),
    Anew(OwnedFd),
}

impl AsFd for Opened<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kept(file) => file.as_fd(),
            Self::Anew(file) => file.as_fd(),
        }
    }
}

fn flags(flags: i32) -> OFlags {
    OFlags::from_bits_retain((flags | libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned())
}

impl Own {
    /// Makes one without a name in a folder, as the user who asks.
    ///
    /// # Errors
    /// Those of open(2), `EPERM` for users that the pod does not have, and `ENFILE` when no descriptor is left.
    pub fn make(rules: &Rules, ctx: Context, folder: &File, wanted: &CreateIn) -> io::Result<Self> {
        if [ctx.uid.into_inner(), ctx.gid.into_inner()].iter().any(|id| rules.ids.is_some_and(|ids| *id >= ids)) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // The guest's kernel has seen to it that the user may, by groups that it does not tell of.
        let user = UnixCredentials::new(ctx.uid.id_mapped(), ctx.gid.id_mapped()).supplementary_gid(false, Vec::new());
        let _user = user.set()?;
        let _umask = ScopedUmask::new(wanted.umask);
        let how = flags(wanted.flags.cast_signed() & MAKES | libc::O_TMPFILE);
        let file = openat(folder, c".", how, Mode::from_raw_mode(wanted.mode & 0o7777))?;
        Ok(Self { file: rules.room.hold(file)?, kind: Kind::Unnamed })
    }

    /// Keeps one that was found.
    ///
    /// # Errors
    /// `ENFILE` when no descriptor is left.
    pub fn linked(rules: &Rules, found: Found) -> io::Result<Self> {
        let Found { file, stat, identity } = found;
        let regular = stat.st.st_mode & libc::S_IFMT == libc::S_IFREG;
        let (told, number) = (AtomicU64::new(0), AtomicU64::new(stat.st.st_ino));
        Ok(Self { file: rules.room.hold(file)?, kind: Kind::Linked { identity, regular, told, number } })
    }

    /// Opens it once more.
    ///
    /// # Errors
    /// Those of open(2), and `ENFILE` when no descriptor is left.
    pub fn open(&self, rules: &Rules, wanted: u32, kill_priv: bool) -> io::Result<Arc<Held>> {
        let _another = as_another(kill_priv)?;
        let wanted = wanted.cast_signed();
        let shared = wanted & (OPENS | libc::O_TRUNC);
        rules.room.hold(match self.kind {
            Kind::Unnamed => self.reopen(rules, flags(shared))?,
            // To open it for writing copies it up. A guest that collects writes reads what it only writes.
            Kind::Linked { .. } => {
                let access = match wanted & libc::O_ACCMODE {
                    libc::O_WRONLY if rules.writeback => libc::O_RDWR,
                    access => access,
                };
                self.reopen(rules, OFlags::from_bits_retain((shared | access | libc::O_CLOEXEC).cast_unsigned()))?
            }
        })
    }

    fn reopen(&self, rules: &Rules, how: OFlags) -> io::Result<OwnedFd> {
        if matches!(self.kind, Kind::Linked { regular: false, .. }) {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        Ok(openat(&rules.descriptors, self.file.as_raw_fd().to_string(), how, Mode::empty())?)
    }

    /// The file, for attributes. A link, device or pipe has none that the guest may see.
    fn opened(&self, rules: &Rules) -> io::Result<Opened<'_>> {
        match self.kind {
            Kind::Unnamed => Ok(Opened::Kept(&self.file)),
            Kind::Linked { regular: false, .. } => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
            Kind::Linked { .. } => Ok(Opened::Anew(self.reopen(rules, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC)?)),
        }
    }

    /// Where a link leads.
    ///
    /// # Errors
    /// Those of readlink(2).
    pub fn target(&self) -> io::Result<Vec<u8>> {
        Ok(readlinkat(&self.file, c"", Vec::new())?.into_bytes())
    }

    /// Its file system.
    ///
    /// # Errors
    /// Those of statvfs(2).
    pub fn file_system(&self) -> io::Result<StatVfs> {
        Ok(fstatvfs(&self.file)?)
    }

    /// Gives it a name.
    ///
    /// # Errors
    /// Those of linkat(2).
    pub fn link(&self, rules: &Rules, folder: &File, name: &CStr) -> io::Result<()> {
        Ok(linkat(&rules.descriptors, self.file.as_raw_fd().to_string(), folder, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// What it is like.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn attr(&self) -> io::Result<Attr> {
        attr_of(self.stat()?)
    }

    /// The id of its mount.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn mount(&self) -> io::Result<u64> {
        Ok(statx(&**self.file, None)?.mnt_id)
    }

    /// What it is like on the host.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn stat(&self) -> io::Result<libc::stat64> {
        Ok(statx(&**self.file, None)?.st)
    }

    /// Changes that.
    ///
    /// # Errors
    /// Those of chmod(2), chown(2), ftruncate(2) and utimensat(2).
    pub fn set(&self, rules: &Rules, wanted: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        if valid.contains(SetattrValid::MODE) {
            self.set_mode(rules, wanted.mode)?;
        }
        let id = |flag, id| valid.contains(flag).then_some(id);
        let uid = id(SetattrValid::UID, wanted.uid.into_inner());
        let gid = id(SetattrValid::GID, wanted.gid.into_inner());
        if uid.is_some() || gid.is_some() {
            chownat(&self.file, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _another = as_another(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match self.kind {
                Kind::Unnamed => self.file.set_len(wanted.size)?,
                Kind::Linked { .. } => ftruncate(self.reopen(rules, flags(libc::O_NONBLOCK))?, wanted.size)?,
            }
        }
        let time = |set, now, seconds: u64, nanoseconds: u32| match (valid.contains(now), valid.contains(set)) {
            (true, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            (false, true) => Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() },
            (false, false) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let last_access = time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, wanted.atime, wanted.atimensec);
            let last_modification = time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, wanted.mtime, wanted.mtimensec);
            utimensat(&self.file, c"", &Timestamps { last_access, last_modification }, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }

    fn set_mode(&self, rules: &Rules, mode: u32) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(chmodat(&rules.descriptors, self.file.as_raw_fd().to_string(), mode, AtFlags::empty())?)
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// Those of fsetxattr(2), and of the name.
    pub fn set_attribute(&self, rules: &Rules, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()> {
        let file = self.opened(rules)?;
        with_host_name(&rules.attributes, name, |name| {
            if extra.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) && name == ACL {
                self.set_mode(rules, self.attr()?.mode & !libc::S_ISGID)?;
            }
            Ok(fsetxattr(&file, name, value, XattrFlags::from_bits_retain(flags))?)
        })
    }

    /// Reads an attribute of at most so many bytes; of none it is how many there are.
    ///
    /// # Errors
    /// Those of fgetxattr(2), and of the name.
    pub fn attribute(&self, rules: &Rules, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut value = vec![0; size as usize];
        let file = self.opened(rules)?;
        let read = with_host_name(&rules.attributes, name, |name| match size {
            0 => Ok(fgetxattr_query(&file, name)?),
            _ => Ok(fgetxattr(&file, name, value.as_mut_slice())?),
        });
        let length = read.map_err(|error| match error.raw_os_error() {
            // What may not be set is not there.
            Some(libc::EPERM) => io::Error::from_raw_os_error(libc::ENODATA),
            _ => error,
        })?;
        value.truncate(length);
        Ok(if size == 0 { GetxattrReply::Count(length as u32) } else { GetxattrReply::Value(value) })
    }

    /// Lists the names of attributes, in at most so many bytes; of none it is how many they take.
    ///
    /// # Errors
    /// Those of flistxattr(2).
    pub fn attributes(&self, rules: &Rules, size: u32) -> io::Result<ListxattrReply> {
        let file = self.opened(rules)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(flistxattr_query(&file)? as u32));
        }
        let mut list = vec![0; size as usize];
        let length = flistxattr(&file, list.as_mut_slice())?;
        list.truncate(length);
        let mut list = rules.attributes.map_server_xattrlist(list).map_err(io::Error::other)?;
        // Of no names it makes one that is empty.
        if list == [0] {
            list.clear();
        }
        Ok(ListxattrReply::Names(list))
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// Those of fremovexattr(2), and of the name.
    pub fn remove_attribute(&self, rules: &Rules, name: &CStr) -> io::Result<()> {
        let file = self.opened(rules)?;
        with_host_name(&rules.attributes, name, |name| Ok(fremovexattr(&file, name)?))
    }
}

/// What the guest hears of a file.
///
/// # Errors
/// None that the host's kernel could cause.
pub fn attr_of(stat: libc::stat64) -> io::Result<Attr> {
    Attr::try_from_stat64(stat, |uid: HostUid| Ok(uid.id_mapped()), |gid: HostGid| Ok(gid.id_mapped()))
}

/// Does something with an attribute by the name that it has on the host.
fn with_host_name<T>(names: &XattrMap, name: &CStr, act: impl FnOnce(&CStr) -> io::Result<T>) -> io::Result<T> {
    match names.map_client_xattr(name).map_err(io::Error::other)? {
        AppliedRule::Pass(name) => act(&name),
        AppliedRule::Deny => Err(io::Error::from_raw_os_error(libc::EPERM)),
        AppliedRule::Unsupported => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
    }
}
