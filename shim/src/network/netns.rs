//! Work inside a network namespace: netlink sockets and taps belong to the namespace that they are
//! made in and may be used from anywhere afterwards.
#![expect(unsafe_code, reason = "ioctls of taps have no safe wrapper")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use caisson_protocol::vmm::NIC_HEADER;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF` (linux/if_tun.h): makes the interface.
    tun_set_interface, libc::TUNSETIFF, libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// `TUNSETVNETHDRSZ` (linux/if_tun.h): bytes of the header before each frame.
    tun_set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int
);
/// Any folder serves to mount on, in a thread's own mount namespace; /sys is on every host.
const SCRATCH: &str = "/sys";
const NOTHING: Option<&str> = None;

/// As the kernel reads it.
static HEADER: libc::c_int = NIC_HEADER as libc::c_int;

/// A network namespace that is not the shim's own.
pub struct Netns(File);

impl Netns {
    /// Opens the namespace that a path names; `None` when it is the one that the shim runs in.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let what = || format!("open the network namespace {}", path.display());
        let file = File::open(path).with_context(what)?;
        let (theirs, ours) = (file.metadata().with_context(what)?, std::fs::metadata("/proc/self/ns/net").with_context(what)?);
        Ok(((theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino())).then_some(Self(file)))
    }

    /// What tells it from every other namespace that is there.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.0.metadata().context("look at the network namespace")?.ino())
    }

    /// Runs `work` in the namespace, on a thread that ends with it.
    ///
    /// # Errors
    /// Those of `work`, and when the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, inside).context("start a thread")?;
            thread.join().map_err(|_| anyhow!("the thread in the network namespace ended"))?
        })
    }

    /// Makes a tap of so many queues, each a descriptor, whose frames begin with a virtio header; it goes when the last
    /// descriptor does.
    ///
    /// # Errors
    /// When `/dev/net/tun` is missing or the name is taken.
    pub fn make_tap(&self, name: &str, queues: u32) -> Result<Vec<File>> {
        let device = Path::new("/dev/net/tun");
        self.run(|| {
            (0..queues).map(|_| open_tap(device, name, queues > 1)).collect::<Result<_>>().with_context(|| format!("make the tap {name}"))
        })
    }

    /// Opens a macvtap of the namespace by name and index, as a tap of so many queues.
    ///
    /// Its device is of the namespace, too: only a sysfs that was mounted there tells its number.
    ///
    /// # Errors
    /// When it cannot be found or opened.
    pub fn open_macvtap(&self, name: &str, index: u32, queues: u32) -> Result<Vec<File>> {
        self.run(|| {
            unshare(CloneFlags::CLONE_NEWNS).context("part from the host's mounts")?;
            mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).context("part from the host's mounts")?;
            mount(Some("sysfs"), SCRATCH, Some("sysfs"), MsFlags::MS_NOSUID, NOTHING).context("mount sysfs")?;
            let numbers = Path::new(SCRATCH).join("class/net").join(name).join(format!("tap{index}/dev"));
            let numbers = std::fs::read_to_string(&numbers).context("read the number of its device")?;
            let (major, minor) = numbers.trim().split_once(':').context("its device has no number")?;
            let device =
                makedev(major.parse().context("read the number of its device")?, minor.parse().context("read the number of its device")?);
            mount(Some("tmpfs"), SCRATCH, Some("tmpfs"), MsFlags::MS_NOSUID, NOTHING).context("mount a folder for its device")?;
            let node = Path::new(SCRATCH).join(name);
            mknod(&node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, device).context("make its device")?;
            (0..queues).map(|_| open_tap(&node, name, queues > 1)).collect::<Result<_>>().context("open its device")
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens a tap by its device, or one of that name by the device of all.
fn open_tap(device: &Path, name: &str, several: bool) -> Result<File> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(device)
        .with_context(|| format!("open {} (the kernel's module `tun` or `macvtap`)", device.display()))?;
    // SAFETY: all zeroes is an ifreq without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    anyhow::ensure!(name.len() < libc::IFNAMSIZ, "the name is longer than {} bytes", libc::IFNAMSIZ - 1);
    for (byte, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *byte = source.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | if several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request lives through the call, and has a name that ends within it.
    unsafe { tun_set_interface(tap.as_raw_fd(), &raw const request) }.context("TUNSETIFF")?;
    // SAFETY: the kernel reads one int.
    unsafe { tun_set_header_size(tap.as_raw_fd(), &raw const HEADER) }.context("TUNSETVNETHDRSZ")?;
    Ok(tap)
}
