//! The shim: what `containerd-shim-caisson-v2` is made of, and what a fuzz target tries.
//!
//! [`bootstrap`] starts the daemon of a pod, [`daemon`] serves it, [`cleanup`] undoes it.

pub mod agent;
mod agent_client;
pub mod bootstrap;
mod calls;
mod cgroup;
mod channel;
pub mod cleanup;
mod console;
mod container;
mod cores;
mod cri;
pub mod daemon;
mod disks;
mod ending;
pub mod errors;
mod events;
mod exits;
mod file_server;
mod filter;
pub mod flags;
pub mod idmap;
pub mod info;
mod logger;
mod machine;
mod memory_volumes;
mod mounts;
mod network;
mod owners;
mod pod;
mod process;
mod room;
mod sandbox;
mod sandboxer;
mod service;
mod share;
mod size;
mod snapshot;
mod sockets;
mod spec;
mod stand_in;
pub mod stats;
mod stdio;
mod store;
pub mod vmm;
mod volumes;
