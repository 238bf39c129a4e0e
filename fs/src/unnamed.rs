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
//!
//! Files of an overlay that have several names are kept here, too (`linked.rs` says why), from when the guest finds one
//! until it has forgotten it.

mod file;
mod held;
mod names;
mod requests;
mod rights;

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry, FileSystem, OpenOptions};
use virtiofsd::fuse::{Attr, CreateIn};
use virtiofsd::passthrough::xattrmap::XattrMap;

use crate::linked::Linked;
use crate::request::Make;
use crate::seal::check_name;
use crate::share::{Handle, Inode, Share};
use crate::volumes::Volumes;
use file::{Kind, Own};
use held::Held;
pub use held::Room;

type DirIter = <Share as FileSystem>::DirIter;

/// Our numbers, of files and of what the guest has open, are from this on; the library below counts up from one.
pub const FIRST: u64 = 1 << 63;

/// The attributes that hold access lists (acl(5)).
const ACCESS_LISTS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];

/// How such files are made and served.
pub struct Rules {
    /// `/proc/self/fd`.
    pub descriptors: File,
    /// The share's root.
    pub root: File,
    /// Whether all volumes keep what gives a file rights on the host.
    pub set_id: bool,
    /// The names of attributes, as the share has them.
    pub attributes: XattrMap,
    /// The first id that users of a pod with ids of its own do not have.
    pub ids: Option<u32>,
    /// For how long the guest may keep what it has heard of a file.
    pub attr_timeout: Duration,
    /// Whether it may keep what it has read of one while that is open.
    pub caches: bool,
    /// Whether it may keep that for good.
    pub always: bool,
    /// Whether it may collect writes before it makes them.
    pub writeback: bool,
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
    Here(Arc<Own>),
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
    linked: Arc<Linked>,
    volumes: Arc<Volumes>,
    known: Arc<RwLock<Known>>,
}

impl Files {
    /// Those of a share. `linked` tells files of overlays apart that have several names.
    pub fn new(share: Share, rules: Rules, linked: Linked) -> Self {
        let volumes = Arc::new(Volumes::new(rules.set_id));
        Self { share, rules: Arc::new(rules), linked: Arc::new(linked), volumes, known: Arc::default() }
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
        let wanted = &CreateIn { mode: self.kept_mode(ctx, folder, wanted.mode)?, ..*wanted };
        let unnamed = self.share.within(ctx, folder, |open| Own::make(&self.rules, ctx, open, wanted))?;
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
        match self.place(inode) {
            Place::Here(own) if matches!(own.kind, Kind::Linked { .. }) => {
                let flags = if writes { libc::O_RDWR } else { libc::O_RDONLY };
                let file = own.open(&self.rules, flags.cast_unsigned(), false)?;
                self.settle(&own)?;
                file.try_clone()
            }
            Place::Here(_) => self.share.file(ctx, inode, writes),
            Place::Share { inode, .. } => self.share.file(ctx, inode, writes),
        }
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear(&self) {
        *self.known_mut() = Known::default();
        self.linked.clear();
        self.volumes.clear();
    }

    fn attr(&self, own: &Own) -> io::Result<Attr> {
        let mut attr = own.attr()?;
        self.share.mark(&mut attr);
        Ok(attr)
    }

    /// Nobody but the guest changes a file without a name, so it keeps what it has of it.
    fn options(&self) -> OpenOptions {
        if self.rules.caches { OpenOptions::KEEP_CACHE } else { OpenOptions::DIRECT_IO }
    }

    /// What the guest may keep of a file of the host's besides.
    fn options_of_share(&self) -> OpenOptions {
        match (self.rules.caches, self.rules.always) {
            (false, _) => OpenOptions::DIRECT_IO,
            (true, true) => OpenOptions::KEEP_CACHE,
            (true, false) => OpenOptions::empty(),
        }
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
    fn name(&self, ctx: Context, ours: Inode, unnamed: &Own, folder: Inode, name: &CStr) -> io::Result<Entry> {
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
        if self.share.is_unknown(ctx, of_share) {
            let mut known = self.known_mut();
            known.files.remove(&ours);
            known.named.remove(&of_share);
        }
    }
}

#[cfg(test)]
mod tests;
