//! Shim to virtio-fs server: one message, then the server serves until its peers close.

use serde::{Deserialize, Serialize};

/// Users and groups of the host by which files of a pod that has some are owned there: so many from
/// `fs.id_base` on, the guest's root being the first.
pub const HOST_IDS: u32 = 1 << 16;

/// How the server serves the share. File descriptors beside it: the share's root, a mount that is attached nowhere; a
/// listening socket to which the VMM's end of the vhost-user conversation is already connected; an inotify instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// The first of [`HOST_IDS`] users and groups of the host that the pod has for its own; without, those of the host are
    /// the pod's.
    pub id_base: Option<u32>,
    /// Whether set-user-id and capabilities of files, and device nodes, are kept in all volumes of the host.
    pub set_id: bool,
    /// How long the guest may trust what it cached.
    pub cache: CachePolicy,
    /// Whether the guest may collect writes before it makes them.
    pub writeback: bool,
    /// Whether the guest has a window into which it may map files (virtio 1.2, 5.11.6.5).
    pub maps: bool,
    /// Threads for requests that wait for disks or for descriptors, 0 to serve them like the others.
    pub threads: usize,
    /// For so long the server looks for the guest's next request before it sleeps, in microseconds.
    pub poll_us: u32,
}

/// How much the guest may cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nothing: every access asks the host.
    Never,
    /// Metadata for a second, data while a file is open.
    #[default]
    Auto,
    /// Everything: fastest, for shares that the host does not change.
    Always,
}

impl CachePolicy {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("never", Self::Never), ("auto", Self::Auto), ("always", Self::Always)];
}

/// What the server answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// It has its namespaces; its id in that of the shim.
    Jailed {
        /// Process id.
        pid: u32,
    },
    /// It has entered its jail. File descriptor beside it: its mount namespace.
    Entered,
    /// The guest remembers so many files that there will be no room for more: it had better forget some.
    Crowded,
    /// It cannot serve: one sentence. The last message.
    Failed(String),
}
