//! The pod's share: the files of the host that its guest sees, in a mount namespace of the pod's own.
//!
//! ```text
//!  shim, in the host's namespace                        file server, in the pod's
//!    a tmpfs that is attached nowhere, writable           / the same tmpfs, read-only
//!      c/rootfs   an empty folder                           c/rootfs   what was mounted on it
//! ```
//!
//! What a pod sees is prepared in the host's namespace as a mount that is attached nowhere, and attached by a thread that
//! has joined the pod's. So nothing of a pod is in the host's table of mounts, and nothing of the host is in the pod's but
//! what was put there. The pod's namespace goes, with all mounts, when the file server and the shim are gone.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use caisson_sys::mounts::{self, Attributes};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::store::{MAX_STACKED, remove_empty_tree};

/// Options of the tmpfs. It holds a few folders and empty files for each mount of a container.
const TREE_OPTIONS: &str = "size=16m,mode=755";
/// The folder of a workshop in which something is mounted before it is shared.
const ROOT: &str = "root";

/// The share of a pod.
pub struct Share {
    /// Its root as the shim writes it.
    root: OwnedFd,
    /// The mount namespace of the file server.
    namespace: OwnedFd,
}

/// A share that no file server has yet.
pub struct Unserved(OwnedFd);

impl Unserved {
    /// Makes an empty share, and the mount that is to become its server's root. `folder` is one of the pod's.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn make(folder: &Path) -> Result<(Self, OwnedFd)> {
        workshop(folder, |place| {
            let copy = || mounts::open_tree(AT_FDCWD, place, false).context("take the share's root");
            let (ours, theirs) = (copy()?, copy()?);
            let read_only = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
            mounts::set_attributes(&theirs, Attributes::set(read_only), false)
                .context("make the share's root read-only (Linux 5.12 is needed)")?;
            Ok((Self(ours), theirs))
        })
    }

    /// The share, once its server has entered its mount namespace.
    pub fn served_in(self, namespace: OwnedFd) -> Share {
        Share { root: self.0, namespace }
    }
}

impl Share {
    /// A path in the share as the shim finds it: what is mounted on it does not show.
    fn path(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd())).join(path)
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// When the share is full.
    pub fn make_folder(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(self.path(path)).with_context(|| format!("create {} in the share", path.display()))
    }

    /// Attaches a mount on a new folder, or on a new file when it is of one.
    ///
    /// # Errors
    /// When something is there already, or the kernel refuses.
    pub fn attach(&self, mount: &OwnedFd, path: &Path, is_folder: bool) -> Result<()> {
        if is_folder {
            self.make_folder(path)?;
        } else {
            path.parent().map_or(Ok(()), |parent| self.make_folder(parent))?;
            std::fs::File::create_new(self.path(path)).with_context(|| format!("create {} in the share", path.display()))?;
        }
        let point = Path::new("/").join(path);
        self.joined(|| mounts::move_mount(mount, &point)).and_then(|moved| Ok(moved?)).with_context(|| format!("mount {}", path.display()))
    }

    /// Takes a folder out of the share, with what is mounted on what is in it.
    ///
    /// # Errors
    /// What could not be unmounted or removed.
    pub fn remove(&self, folder: &Path) -> Result<()> {
        let mut points = Vec::new();
        list(&self.path(folder), Path::new("/").join(folder), &mut points);
        self.joined(|| points.iter().try_for_each(|point| unmount(point)))??;
        remove_empty_tree(&self.path(folder))
    }

    /// Does something on a thread in the pod's mount namespace.
    fn joined<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_FS).context("part a thread from the shim's folders")?;
            setns(&self.namespace, CloneFlags::CLONE_NEWNS).context("join the pod's mount namespace")?;
            Ok(act())
        })
    }
}

/// Lists what may be mounted on below a folder, the innermost first.
fn list(folder: &Path, point: PathBuf, points: &mut Vec<PathBuf>) {
    // What cannot be read is not there.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        list(&entry.path(), point.join(entry.file_name()), points);
    }
    points.push(point);
}

/// Takes off all that is mounted at a place, with what is mounted within.
fn unmount(point: &Path) -> Result<()> {
    for _ in 0..MAX_STACKED {
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there any more.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("unmount {}", point.display())),
        }
    }
    bail!("unmount {}: something is mounted there again and again", point.display())
}

/// Has `make` mount things in the empty folder that it is given, unseen by the host: it sees the host's mounts, and the
/// host sees none of its. All of them go with it but those that it takes out.
///
/// `folder` is a folder of the pod, over which the empty one lies meanwhile.
///
/// # Errors
/// Those of `make`, and what the kernel refused.
pub fn workshop<T: Send>(folder: &Path, make: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
        // What the host unmounts meanwhile is not held here.
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("part the mount namespace from the host's")?;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("share"), folder, Some("tmpfs"), flags, Some(TREE_OPTIONS)).context("mount an empty folder")?;
        make(folder)
    })
}

/// Has `mount` make a root file system in a workshop, and takes it out. `mount` gets the folder that it is to mount on, and
/// one for what it needs besides.
///
/// # Errors
/// Those of `mount`, and what the kernel refused.
pub fn made_in_workshop(folder: &Path, mount: impl FnOnce(&Path, &Path) -> Result<()> + Send) -> Result<OwnedFd> {
    workshop(folder, |place| {
        let (root, scratch) = (place.join(ROOT), place.join("scratch"));
        for folder in [&root, &scratch] {
            std::fs::create_dir(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        mount(&root, &scratch)?;
        mounts::open_tree(AT_FDCWD, &root, true).context("take out what was mounted")
    })
}

/// Does something on a thread of its own, whose namespaces nobody has after it.
fn on_thread<T: Send>(act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mounts".into()).spawn_scoped(scope, act).context("start a thread")?;
        thread.join().unwrap_or_else(|_| bail!("the thread that mounts has ended"))
    })
}
