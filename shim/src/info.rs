//! `-info`: what the runtime supports (containerd `RuntimeInfo`), as a message on standard output.

use std::io::Write;

use anyhow::{Context, Result};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// Prints the message.
///
/// # Errors
/// When it cannot be written.
pub fn print() -> Result<()> {
    let version = RuntimeVersion { version: caisson_protocol::VERSION.into(), ..RuntimeVersion::default() };
    let info = RuntimeInfo { name: "io.containerd.caisson.v2".into(), version: MessageField::some(version), ..RuntimeInfo::default() };
    std::io::stdout().write_all(&info.write_to_bytes()?).context("print the runtime's description")
}
