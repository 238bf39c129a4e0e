//! Kubelet's description of a pod in the fields that the shim reads, generated from `cri.proto`.
#![allow(missing_docs, reason = "generated from cri.proto, whose names are those of the CRI")]
#![allow(unsafe_code, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used, reason = "generated code")]

mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

pub use cri::*;
