//! What Caisson's processes may do of all that root may, and how they give up the rest.

use std::io;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// What the shim needs, and for what; programs that it starts can have no more.
pub const SHIM: &[Capability] = &[
    // Mounts, namespaces, and the owners that are mapped in them.
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_CHOWN,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETFCAP,
    // The bundle and its snapshot, whoever owns them.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    // An overlay writes its upper layer with the rights of who mounted it.
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    // Taps, their queueing disciplines, and the program that steers connections.
    Capability::CAP_NET_ADMIN,
    Capability::CAP_BPF,
    // The jailed processes, which are other users': to end them, to find their network namespace, and to set
    // when the host may kill them for want of memory.
    Capability::CAP_KILL,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SYS_RESOURCE,
    // For them to give up the rest of these.
    Capability::CAP_SETPCAP,
];

/// What a file server needs to act for any user of the share.
pub const FILE_SERVER: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// Rights as the kernel writes them (proc(5), `CapEff`).
pub fn mask(rights: &[Capability]) -> u64 {
    rights.iter().fold(0, |mask, right| mask | right.bitmask())
}

/// Gives up everything else, for the calling thread and those that it starts, and for what they run.
///
/// # Errors
/// When the kernel refuses.
pub fn keep_only(rights: &[Capability]) -> io::Result<()> {
    bound(rights)?;
    drop_all_but(rights).map_err(io::Error::other)
}

/// Has nobody who runs a program from here on get more. Without the right to say so nothing is changed.
///
/// # Errors
/// When the kernel refuses.
pub fn bound(rights: &[Capability]) -> io::Result<()> {
    let lower = || -> Result<(), CapsError> {
        if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
            return Ok(());
        }
        let all = caps::runtime::thread_all_supported();
        all.into_iter().filter(|right| !rights.contains(right)).try_for_each(|right| caps::drop(None, CapSet::Bounding, right))
    };
    lower().map_err(io::Error::other)
}

fn drop_all_but(rights: &[Capability]) -> Result<(), CapsError> {
    let has = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = rights.iter().copied().filter(|right| has.contains(right)).collect();
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
