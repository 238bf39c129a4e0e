//! One file without a name: what the guest asks of it.

use std::ffi::CStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, fgetxattr, fgetxattr_query, flistxattr,
    flistxattr_query, fremovexattr, fsetxattr, futimens, linkat, openat,
};
use virtiofsd::filesystem::{Context, GetxattrReply, ListxattrReply, SetattrValid, SetxattrFlags};
use virtiofsd::fuse::{Attr, CreateIn, SetattrIn};
use virtiofsd::oslib::ScopedUmask;
use virtiofsd::passthrough::credentials::{ScopedCaps, UnixCredentials, drop_effective_cap};
use virtiofsd::passthrough::stat::statx;
use virtiofsd::passthrough::xattrmap::{AppliedRule, XattrMap};
use virtiofsd::soft_idmap::{GuestId, HostGid, HostId, HostUid, Id};

use super::held::Held;
use super::{Inode, Rules};

/// What of a caller's flags is the host's affair. Whether the guest reads or writes is its own: its kernel may read what a
/// program only writes.
const MAKES: i32 = libc::O_EXCL | OPENS;
const OPENS: i32 = libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC;
const ACL: &CStr = c"system.posix_acl_access";

/// The file.
pub struct Unnamed {
    /// As it was opened first.
    pub file: Arc<Held>,
    /// The folder in which it was made, which the guest knows as long as it knows the file.
    pub folder: Inode,
}

fn flags(flags: i32) -> OFlags {
    OFlags::from_bits_retain((flags | libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned())
}

/// Has the kernel take the bits from a file that make others run it as its owner, as it does when the owner is not who
/// writes.
///
/// # Errors
/// When the capability against that cannot be dropped.
pub fn as_another(kill: bool) -> io::Result<Option<ScopedCaps>> {
    if kill { drop_effective_cap("FSETID") } else { Ok(None) }
}

impl Unnamed {
    /// Makes one in a folder, as the user who asks.
    ///
    /// # Errors
    /// Those of open(2), `EPERM` for users that the pod does not have, and `ENFILE` when no descriptor is left.
    pub fn make(rules: &Rules, ctx: Context, folder: (Inode, &File), wanted: &CreateIn) -> io::Result<Self> {
        if [ctx.uid.into_inner(), ctx.gid.into_inner()].iter().any(|id| rules.ids.is_some_and(|ids| *id >= ids)) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // The guest's kernel has seen to it that the user may, by groups that it does not tell of.
        let user = UnixCredentials::new(ctx.uid.id_mapped(), ctx.gid.id_mapped()).supplementary_gid(false, Vec::new());
        let _user = user.set()?;
        let _umask = ScopedUmask::new(wanted.umask);
        let how = flags(wanted.flags.cast_signed() & MAKES | libc::O_TMPFILE);
        let file = openat(folder.1, c".", how, Mode::from_raw_mode(wanted.mode & 0o7777))?;
        Ok(Self { file: rules.room.hold(file)?, folder: folder.0 })
    }

    /// Opens it once more.
    ///
    /// # Errors
    /// Those of open(2), and `ENFILE` when no descriptor is left.
    pub fn open(&self, rules: &Rules, wanted: u32, kill_priv: bool) -> io::Result<Arc<Held>> {
        let _another = as_another(kill_priv)?;
        let how = flags(wanted.cast_signed() & (OPENS | libc::O_TRUNC));
        rules.room.hold(openat(&rules.descriptors, self.file.as_raw_fd().to_string(), how, Mode::empty())?)
    }

    /// Gives it its first name.
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
        let stat = statx(&**self.file, None)?.st;
        Attr::try_from_stat64(stat, |uid: HostUid| Ok(uid.id_mapped()), |gid: HostGid| Ok(gid.id_mapped()))
    }

    /// Changes that.
    ///
    /// # Errors
    /// Those of chmod(2), chown(2), ftruncate(2) and utimensat(2).
    pub fn set(&self, wanted: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        if valid.contains(SetattrValid::MODE) {
            self.file.set_permissions(Permissions::from_mode(wanted.mode & 0o7777))?;
        }
        let id = |flag, id| valid.contains(flag).then_some(id);
        let uid = id(SetattrValid::UID, wanted.uid.into_inner());
        let gid = id(SetattrValid::GID, wanted.gid.into_inner());
        if uid.is_some() || gid.is_some() {
            fchown(&self.file, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _another = as_another(valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.file.set_len(wanted.size)?;
        }
        let time = |set, now, seconds: u64, nanoseconds: u32| match (valid.contains(now), valid.contains(set)) {
            (true, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            (false, true) => Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() },
            (false, false) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let last_access = time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, wanted.atime, wanted.atimensec);
            let last_modification = time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, wanted.mtime, wanted.mtimensec);
            futimens(&self.file, &Timestamps { last_access, last_modification })?;
        }
        Ok(())
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// Those of fsetxattr(2), and of the name.
    pub fn set_attribute(&self, names: &XattrMap, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()> {
        with_host_name(names, name, |name| {
            if extra.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) && name == ACL {
                let mode = self.file.metadata()?.permissions().mode();
                self.file.set_permissions(Permissions::from_mode(mode & 0o7777 & !libc::S_ISGID))?;
            }
            Ok(fsetxattr(&self.file, name, value, XattrFlags::from_bits_retain(flags))?)
        })
    }

    /// Reads an attribute of at most so many bytes; of none it is how many there are.
    ///
    /// # Errors
    /// Those of fgetxattr(2), and of the name.
    pub fn attribute(&self, names: &XattrMap, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut value = vec![0; size as usize];
        let read = with_host_name(names, name, |name| match size {
            0 => Ok(fgetxattr_query(&self.file, name)?),
            _ => Ok(fgetxattr(&self.file, name, value.as_mut_slice())?),
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
    pub fn attributes(&self, names: &XattrMap, size: u32) -> io::Result<ListxattrReply> {
        if size == 0 {
            return Ok(ListxattrReply::Count(flistxattr_query(&self.file)? as u32));
        }
        let mut list = vec![0; size as usize];
        let length = flistxattr(&self.file, list.as_mut_slice())?;
        list.truncate(length);
        let mut list = names.map_server_xattrlist(list).map_err(io::Error::other)?;
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
    pub fn remove_attribute(&self, names: &XattrMap, name: &CStr) -> io::Result<()> {
        with_host_name(names, name, |name| Ok(fremovexattr(&self.file, name)?))
    }
}

/// Does something with an attribute by the name that it has on the host.
fn with_host_name<T>(names: &XattrMap, name: &CStr, act: impl FnOnce(&CStr) -> io::Result<T>) -> io::Result<T> {
    match names.map_client_xattr(name).map_err(io::Error::other)? {
        AppliedRule::Pass(name) => act(&name),
        AppliedRule::Deny => Err(io::Error::from_raw_os_error(libc::EPERM)),
        AppliedRule::Unsupported => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
    }
}
