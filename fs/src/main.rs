//! `caisson-fs`: serves one pod's share as a virtio-fs device, over vhost-user.
//!
//! ```text
//! main: receive FsConfig -> jail -> serve until the VMM hangs up
//! ```
//!
//! The file system is that of the virtiofsd project, used as a library, with two layers of ours around it (`share.rs`,
//! `unnamed.rs`) and a device of ours in front (`device.rs`). It runs in a process of its own whose root is the share, without network,
//! without any capability but those that acting for the share's users needs, behind a system call filter.
#![expect(unsafe_code, reason = "the listening socket arrives as a descriptor, which the vhost crate takes by number")]

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use caisson_fs::dax::Dax;
use caisson_fs::descriptors::Descriptors;
use caisson_fs::device::Device;
use caisson_fs::filter;
use caisson_fs::linked::Linked;
use caisson_fs::share::{ATTRIBUTES, Share};
use caisson_fs::unnamed::{Files, Room, Rules};
use caisson_host::control::Control;
use caisson_host::jail::{self, Kept, Side, raise_descriptor_limit};
use caisson_protocol::fs::{CachePolicy, Event, FsConfig, HOST_IDS};
use nix::sys::stat::{Mode, umask};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, PassthroughFs};
use virtiofsd::soft_idmap::cmdline::IdMap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Files that the guest may hold open at once, and inodes that it remembers.
const DESCRIPTOR_LIMIT: u64 = 1 << 20;
/// Descriptors kept back from the guest for the server itself.
const RESERVED_DESCRIPTORS: u64 = 128;
/// This part of them is for files without a name.
const UNNAMED: u64 = 8;

fn main() {
    let Ok(control) = Control::inherited() else {
        eprintln!("caisson-fs is started by containerd-shim-caisson-v2, not by hand");
        std::process::exit(2);
    };
    let control = Arc::new(control);
    let witness = Arc::clone(&control);
    jail::on_panic(move |reason| fail(&witness, reason));
    if let Err(error) = run(&control) {
        fail(&control, format!("{error:#}"));
    }
}

/// Tells the shim why the server ends, and ends it.
fn fail(control: &Control, reason: String) -> ! {
    // When the shim is gone there is nobody left to tell.
    let _ = control.send(&Event::Failed(reason), &[], true);
    std::process::exit(1);
}

fn run(control: &Arc<Control>) -> Result<()> {
    jail::close_inherited()?;
    let Some((config, fds)) = control.receive::<FsConfig>(true).context("receive the configuration")? else {
        bail!("the shim closed the control socket before the configuration");
    };
    let Ok([root, socket, watches]) = <[OwnedFd; 3]>::try_from(fds) else {
        bail!("the configuration came without exactly one root, one socket and one inotify instance");
    };
    let ids = config.id_base.map(|first| first..first.saturating_add(HOST_IDS));
    let inside = match (jail::Share { root, ids }).unshare()? {
        Side::Outside(child) => {
            control.send(&Event::Jailed { pid: child.as_raw().unsigned_abs() }, &[], true).context("report the jailed process")?;
            return Ok(());
        }
        Side::Inside(inside) => inside,
    };
    let Kept { descriptors: proc_self_fd, namespace } = inside.enter()?;
    control.send(&Event::Entered, &[namespace.as_fd()], true).context("hand over the mount namespace")?;
    drop(namespace);
    let proc_self_fd = File::from(proc_self_fd);
    let descriptors = raise_descriptor_limit(DESCRIPTOR_LIMIT).context("raise the limit of open descriptors")?;
    // Files are created with exactly the mode that the guest asks for.
    umask(Mode::empty());
    // The kernel would refuse them, too, but when the server has half become such a user.
    let unknown = config.id_base.map(|_| vec![IdMap::ForbidGuest { from_guest: HOST_IDS, count: u32::MAX - HOST_IDS }]);
    let rules = Rules {
        descriptors: proc_self_fd.try_clone().context("keep /proc/self/fd")?,
        root: File::open("/").context("open the share")?,
        set_id: config.set_id,
        attributes: attributes()?,
        ids: config.id_base.map(|_| HOST_IDS),
        attr_timeout: timeout(config.cache),
        caches: !matches!(config.cache, CachePolicy::Never),
        always: matches!(config.cache, CachePolicy::Always),
        writeback: config.writeback,
        room: Room::new((descriptors / UNNAMED) as usize),
    };
    let fs_config =
        passthrough::Config { uid_map: unknown.clone(), gid_map: unknown, ..passthrough_config(&config, descriptors, proc_self_fd)? };
    let witness = Arc::clone(control);
    let descriptors = Arc::new(Descriptors::new(fs_config.guest_fd_limit, move || {
        // A shim that has this many to hear already has heard of it.
        let _ = witness.send(&Event::Crowded, &[], false);
    }));
    let fs = PassthroughFs::new(fs_config).context("open the share")?;
    let share = Share::new(fs, matches!(config.cache, CachePolicy::Auto), config.maps, Arc::clone(&descriptors));
    let fs = Files::new(share, rules, Linked::new(watches));
    let (make, opener) = (fs.maker(), fs.clone());
    let dax = config.maps.then(|| Dax::new(move |ctx, inode, writes| opener.file(ctx, inode, writes)));
    // Before any thread is started: each has the filter of who starts it.
    filter::install()?;
    let witness = Arc::clone(control);
    // On a single processor the guest cannot ask while somebody looks.
    let alone = std::thread::available_parallelism().is_ok_and(|processors| processors.get() == 1);
    let poll = if alone { Duration::ZERO } else { Duration::from_micros(config.poll_us.into()) };
    serve(socket, Device::new(fs, make, dax, poll, config.threads, descriptors, move |reason| fail(&witness, reason)))
}

fn attributes() -> Result<XattrMap> {
    XattrMap::try_from(ATTRIBUTES).map_err(|error| anyhow::anyhow!("read the map of attributes: {error}"))
}

/// For how long the guest may keep what it has heard of a file.
const fn timeout(cache: CachePolicy) -> Duration {
    Duration::from_secs(match cache {
        CachePolicy::Never => 0,
        CachePolicy::Auto => 1,
        CachePolicy::Always => 86_400,
    })
}

/// What the guest may do and cache.
fn passthrough_config(config: &FsConfig, descriptors: u64, proc_self_fd: File) -> Result<passthrough::Config> {
    let cache_policy = match config.cache {
        CachePolicy::Never => passthrough::CachePolicy::Never,
        CachePolicy::Auto => passthrough::CachePolicy::Auto,
        CachePolicy::Always => passthrough::CachePolicy::Always,
    };
    let timeout = timeout(config.cache);
    Ok(passthrough::Config {
        root_dir: "/".into(),
        cache_policy,
        writeback: config.writeback,
        entry_timeout: timeout,
        attr_timeout: timeout,
        xattr: true,
        xattrmap: Some(attributes()?),
        posix_acl: passthrough::NegotiationMode::Auto,
        // Each mount below the share is a file system of its own in the guest, with its own
        // device number; unmounting it there drops every inode of it here.
        announce_submounts: true,
        proc_sfd_rawfd: Some(proc_self_fd),
        allow_direct_io: true,
        killpriv_v2: true,
        guest_fd_limit: (descriptors - descriptors / UNNAMED).saturating_sub(RESERVED_DESCRIPTORS),
        ..passthrough::Config::default()
    })
}

/// Serves the one conversation on `socket` until the VMM hangs up.
fn serve(socket: OwnedFd, device: Device<Files>) -> Result<()> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("caisson-fs".into(), Arc::new(device), memory)
        .map_err(|error| anyhow::anyhow!("create the vhost-user server: {error}"))?;
    // SAFETY: the descriptor is ours and given up here; Listener owns it from now on.
    let mut listener = unsafe { Listener::from_raw_fd(socket.into_raw_fd()) };
    daemon.start(&mut listener).map_err(|error| anyhow::anyhow!("take the VMM's connection: {error}"))?;
    drop(listener);
    // However the conversation ends, the VMM is gone and so is the reason to live.
    let _ = daemon.wait();
    std::process::exit(0);
}
