//! Statistics in the shape that containerd's clients read: `io.containerd.cgroups.v2.Metrics`.

use std::collections::HashMap;

use caisson_protocol::agent::StatsResponse;
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::errors::{Error, Result};

/// As containerd registers the message.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The agent's counters as containerd's message.
///
/// # Errors
/// When the message cannot be written, which its types rule out.
pub fn metrics(stats: &StatsResponse) -> Result<Any> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat { current: stats.pids_current, limit: stats.pids_limit, ..PidsStat::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled,
            throttled_usec: stats.cpu_throttled_us,
            ..CPUStat::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(memory_events(&stats.memory_events)),
        io: MessageField::some(IOStat {
            usage: stats
                .io
                .iter()
                .map(|io| IOEntry {
                    major: io.major,
                    minor: io.minor,
                    rbytes: io.read_bytes,
                    wbytes: io.write_bytes,
                    rios: io.read_ios,
                    wios: io.write_ios,
                    ..IOEntry::default()
                })
                .collect(),
            ..IOStat::default()
        }),
        ..Metrics::default()
    };
    let value = metrics.write_to_bytes().map_err(|error| Error::Failed(error.into()))?;
    Ok(Any { type_url: TYPE_URL.into(), value, ..Any::default() })
}

fn memory(stats: &StatsResponse) -> MemoryStat {
    let of = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_file"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.memory_usage,
        usage_limit: stats.memory_limit,
        swap_usage: stats.swap_usage,
        swap_limit: stats.swap_limit,
        ..MemoryStat::default()
    }
}

fn memory_events(events: &HashMap<String, u64>) -> MemoryEvents {
    let of = |name: &str| events.get(name).copied().unwrap_or(0);
    MemoryEvents { low: of("low"), high: of("high"), max: of("max"), oom: of("oom"), oom_kill: of("oom_kill"), ..MemoryEvents::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_reach_containerds_message() {
        let mut stats = StatsResponse { cpu_usage_us: 5, memory_usage: 7, ..StatsResponse::default() };
        stats.memory_stat.insert("anon".into(), 3);
        let any = metrics(&stats).unwrap();
        let read = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((any.type_url.as_str(), read.cpu.usage_usec, read.memory.usage, read.memory.anon), (TYPE_URL, 5, 7, 3));
    }
}
