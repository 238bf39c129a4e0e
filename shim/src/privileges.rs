//! What the daemon may do, of all that root may: it is the pod's only process with rights on the host.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

/// What is needed, and for what; programs that it starts can have no more.
const NEEDED: [Capability; 16] = [
    // Mounts, namespaces, and the owners that are mapped in them.
    Capability::CAP_SYS_ADMIN,
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

/// Gives up everything else, for the calling thread and those that it starts.
///
/// # Errors
/// When the kernel refuses.
pub fn narrow() -> Result<()> {
    let has = caps::read(None, CapSet::Permitted).context("read the process's capabilities")?;
    let keeps: CapsHashSet = NEEDED.into_iter().filter(|needed| has.contains(needed)).collect();
    if has.contains(&Capability::CAP_SETPCAP) {
        for dropped in caps::runtime::thread_all_supported().difference(&keeps) {
            caps::drop(None, CapSet::Bounding, *dropped).with_context(|| format!("drop the bounding capability {dropped}"))?;
        }
    }
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).context("drop inheritable capabilities")?;
    caps::set(None, CapSet::Effective, &keeps).context("drop effective capabilities")?;
    caps::set(None, CapSet::Permitted, &keeps).context("drop permitted capabilities")
}
