//! The agent's messages and service, generated from `agent.proto`.
#![allow(missing_docs, reason = "generated from agent.proto, which documents every item")]
#![allow(unsafe_code, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used, reason = "generated code")]

mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}
mod service {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use agent::*;
pub use service::*;
