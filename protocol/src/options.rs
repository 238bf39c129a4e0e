//! What containerd writes to a shim that it starts, generated from `options.proto`.
#![allow(missing_docs, reason = "generated from options.proto, whose names are containerd's")]
#![allow(unsafe_code, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used, reason = "generated code")]

mod options {
    include!(concat!(env!("OUT_DIR"), "/options.rs"));
}

pub use options::*;
