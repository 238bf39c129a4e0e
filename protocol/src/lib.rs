//! What Caisson's programs say to each other, and the configuration they share.
//!
//! This crate holds data and pure functions: no file, no socket, no clock. Everything else
//! depends on it, and it depends on nothing of ours.
//!
//! * [`agent`]: shim to agent, by ttrpc over vsock (`agent.proto`);
//! * [`vmm`]: shim to VMM, by JSON messages with file descriptors over a control socket;
//! * [`fs`]: shim to virtio-fs server, likewise;
//! * [`config`]: `/etc/caisson/config.toml` and the `io.caisson.*` annotations;
//! * [`cri`]: kubelet's description of a pod, as far as the shim reads it (`cri.proto`);
//! * [`options`]: what containerd writes to a shim that it starts (`options.proto`);
//! * [`guest`]: what host and guest agree on without saying it: ports, paths, tags;
//! * [`owner`]: a pod's owners to its shim, by JSON messages with file descriptors;
//! * [`record`]: what a pod keeps on disk so that it can be listed and undone.

pub mod agent;
pub mod config;
pub mod cri;
pub mod fs;
pub mod guest;
pub mod options;
pub mod owner;
pub mod publish;
pub mod record;
pub mod vmm;

/// Version of this build, with a digest of what host and guest have to have in common. Shim and agent
/// must carry the same one.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+", env!("PROTOCOL_DIGEST"));
