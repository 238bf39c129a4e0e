//! What a pod keeps on disk, so that `caisson list` can show it and `delete` can undo it.
//!
//! The record is written before what it names is acquired: a killed shim leaves a record that
//! names at least all that exists.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `<run dir>/<namespace>/<pod>/record.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the pod: of its sandbox, or of the one task.
    pub pod: String,
    /// The tenant that it belongs to; empty for none.
    #[serde(default)]
    pub tenant: String,
    /// Version of the shim that made it.
    pub version: String,
    /// Seconds since 1970 when it was created.
    pub created: u64,
    /// Process ids of the pod, each with its start time (field 22 of `/proc/PID/stat`), so that
    /// a reused id is not mistaken for it.
    pub processes: Vec<ProcessRecord>,
    /// Path of the pod's cgroup below the cgroup file system.
    pub cgroup: Option<String>,
    /// User id that the VMM runs as, reserved in `<run dir>/uids`.
    pub uid: Option<u32>,
    /// The shim's socket.
    pub socket: String,
    /// Containers of the pod.
    pub containers: Vec<String>,
    /// Folders of the snapshots that containers write to by themselves, by container.
    #[serde(default)]
    pub snapshots: BTreeMap<String, PathBuf>,
    /// vCPUs and memory of the VM.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The network namespace that the pod's interfaces are in, when it was given one.
    pub network: Option<NetworkRecord>,
    /// Why the pod died, when it did not end in order.
    pub failure: Option<String>,
}

/// What a pod's network puts into a namespace that may outlive it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The namespace's file.
    pub path: PathBuf,
    /// Its inode, so that another namespace at the same path is not mistaken for it.
    pub inode: u64,
    /// Indexes of the interfaces that were given an ingress queueing discipline.
    pub interfaces: Vec<u32>,
}

/// One process of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// `shim`, `vmm` or `fs`.
    pub role: String,
    /// Process id on the host.
    pub pid: u32,
    /// Clock ticks after boot at which it started.
    pub start_time: u64,
}
