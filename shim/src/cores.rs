//! Core scheduling: guests of strangers do not run at once on the hardware threads of one core, by whose caches each could
//! learn what the other does.
//!
//! The kernel has threads with the same cookie run beside each other, or idle ones (kernel documentation,
//! admin-guide/hw-vuln/core-scheduling). A monitor has its cookie before its guest runs, and its threads have it by birth.

use std::sync::Arc;

use anyhow::{Context, Result};
use caisson_host::{cores, records};
use caisson_protocol::config::{Config, CoreScheduling};
use caisson_protocol::record::ProcessRecord;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{
    CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie, pull_core_scheduling_cookie, push_core_scheduling_cookie,
};

use crate::store::Store;

/// By which containerd asks for it (containerd's `pkg/schedcore`).
const ASKED: &str = "SCHED_CORE";

/// Who may be on a core at once with a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    All,
    ThePod,
    TheTenant,
}

fn beside(wanted: CoreScheduling, tenant: &str, asked: bool) -> Beside {
    match wanted {
        CoreScheduling::Auto | CoreScheduling::Tenant if !tenant.is_empty() => Beside::TheTenant,
        CoreScheduling::Pod | CoreScheduling::Tenant => Beside::ThePod,
        CoreScheduling::Auto if asked => Beside::ThePod,
        CoreScheduling::Auto | CoreScheduling::Off => Beside::All,
    }
}

/// Parts a monitor, whose guest does not run yet, from others as the configuration says. A host with one thread a core has
/// nothing to part.
///
/// # Errors
/// When the host's kernel cannot, and the configuration asks for it by name.
pub async fn part(config: &Config, store: &Arc<Store>, monitor: u32) -> Result<()> {
    if cores::have_one_thread() {
        return Ok(());
    }
    let asked = std::env::var_os(ASKED).is_some_and(|value| !value.is_empty());
    let parted = match beside(config.core_scheduling, &config.tenant.name, asked) {
        Beside::All => return Ok(()),
        Beside::ThePod => pid_of(monitor).and_then(|pid| Ok(create_core_scheduling_cookie(pid, CoreSchedulingScope::ThreadGroup)?)),
        Beside::TheTenant => {
            let store = Arc::clone(store);
            tokio::task::spawn_blocking(move || join_tenant(&store, monitor)).await.context("wait for other pods")?
        }
    };
    match parted.map_err(|error| (error.downcast_ref().copied(), error)) {
        // They have had it turned off meanwhile.
        Ok(()) | Err((Some(Errno::NODEV), _)) => Ok(()),
        Err((Some(Errno::INVAL), _)) if config.core_scheduling == CoreScheduling::Auto => {
            log::warn!(
                "the host's kernel has no core scheduling (Linux 5.14, CONFIG_SCHED_CORE): other guests may run on this one's cores"
            );
            Ok(())
        }
        Err((_, error)) => Err(error
            .context("have the host's kernel keep other guests from this one's cores (vm.core_scheduling; it needs CONFIG_SCHED_CORE)")),
    }
}

/// Gives a monitor the cookie that its tenant's others have, or a new one where there are none.
fn join_tenant(store: &Store, monitor: u32) -> Result<()> {
    let monitor = pid_of(monitor)?;
    // Else two pods that start at once would each find none.
    let _alone = store.lock_host()?;
    let others = store.monitors_of_tenant()?;
    // A cookie goes by way of the calling thread. One that has it ends here.
    let by_way_of_a_thread = move || -> Result<()> {
        if others.iter().any(has_taken_from) {
            Ok(push_core_scheduling_cookie(monitor, CoreSchedulingScope::ThreadGroup)?)
        } else {
            Ok(create_core_scheduling_cookie(monitor, CoreSchedulingScope::ThreadGroup)?)
        }
    };
    std::thread::spawn(by_way_of_a_thread).join().map_err(|_| anyhow::anyhow!("a thread ended without a word"))?
}

/// Whether the calling thread has the cookie of a process now.
fn has_taken_from(process: &ProcessRecord) -> bool {
    let Ok(pid) = pid_of(process.pid) else { return false };
    let has_one = core_scheduling_cookie(pid, CoreSchedulingScope::Thread).is_ok_and(|cookie| cookie != 0);
    // What is alive after that is what the cookie was of.
    has_one && pull_core_scheduling_cookie(pid, CoreSchedulingScope::Thread).is_ok() && records::is_alive(process)
}

fn pid_of(pid: u32) -> Result<Pid> {
    Pid::from_raw(pid.cast_signed()).context("a process id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_beside_whom_the_configuration_says() {
        use CoreScheduling::{Auto, Off, Pod, Tenant};
        let expected = [
            (Auto, "", false, Beside::All),
            (Auto, "", true, Beside::ThePod),
            (Auto, "acme", false, Beside::TheTenant),
            (Auto, "acme", true, Beside::TheTenant),
            (Pod, "acme", false, Beside::ThePod),
            (Tenant, "", false, Beside::ThePod),
            (Tenant, "acme", false, Beside::TheTenant),
            (Off, "acme", true, Beside::All),
        ];
        for (wanted, tenant, asked, who) in expected {
            assert_eq!(beside(wanted, tenant, asked), who, "{wanted:?} {tenant:?} {asked}");
        }
    }
}
