//! Who may run at once with a guest on a core of the host.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use caisson_host::cores::have_one_thread;
use caisson_protocol::config::CoreScheduling;
use caisson_protocol::record::PodRecord;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use super::{Found, Subject, Verdict};

/// Who may run at once with the guest on a core of the host (`vm.core_scheduling`).
pub fn look(subject: &Subject<'_>) -> Result<Found> {
    if have_one_thread() {
        return Ok((Verdict::Ok, "one thread a core".into()));
    }
    let cookie = |pid: u32| {
        let pid = Pid::from_raw(pid.cast_signed()).ok_or(Errno::SRCH)?;
        core_scheduling_cookie(pid, CoreSchedulingScope::Thread)
    };
    let cookies: BTreeSet<Result<u64, i32>> =
        subject.threads.iter().map(|thread| cookie(thread.pid.cast_unsigned()).map_err(Errno::raw_os_error)).collect();
    let tenant = &subject.record.tenant;
    let meant = match subject.config.core_scheduling {
        CoreScheduling::Auto => !tenant.is_empty(),
        CoreScheduling::Pod | CoreScheduling::Tenant => true,
        CoreScheduling::Off => false,
    };
    let shared = if meant { Verdict::Wrong } else { Verdict::Weak };
    let [first] = cookies.into_iter().collect::<Vec<_>>()[..] else {
        return Ok((Verdict::Wrong, "its threads run beside different ones".into()));
    };
    Ok(match first.map_err(Errno::from_raw_os_error) {
        Err(Errno::INVAL) => (shared, "shared with other guests: the host's kernel has no core scheduling".into()),
        Err(error) => return Err(error).context("ask whom its threads run beside"),
        Ok(0) => (shared, "shared with other guests at once; set vm.core_scheduling, or turn the processor's second threads off".into()),
        Ok(own) => match of_other_tenants(subject).find(|pid| cookie(*pid) == Ok(own)) {
            Some(pid) => (Verdict::Wrong, format!("shared at once with process {pid}, of another tenant")),
            None if tenant.is_empty() => (Verdict::Ok, "the pod's own while it runs".into()),
            None => (Verdict::Ok, format!("the pod's own while it runs, or those of tenant {tenant}")),
        },
    })
}

/// The monitors of pods with which this one has no tenant in common.
fn of_other_tenants(subject: &Subject<'_>) -> impl Iterator<Item = u32> {
    let record = subject.record;
    let same = |other: &PodRecord| {
        (&other.namespace, &other.pod) == (&record.namespace, &record.pod) || (!record.tenant.is_empty() && other.tenant == record.tenant)
    };
    subject.host.monitors.iter().filter(move |(_, other)| !same(other)).map(|(pid, _)| *pid)
}
