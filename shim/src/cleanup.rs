//! `delete`: undoes what the record of a pod names whose shim is dead or never answered.
//!
//! containerd runs it after a kill -9 of the shim, after a crash, and after a start that failed.
//! It may find anything from nothing to all of a pod, and may run twice.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use caisson_host::{records, settings};
use caisson_protocol::config;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};

use crate::agent::Exit;
use crate::bootstrap::socket_path;
use crate::events::timestamp;
use crate::flags::Flags;
use crate::{spec, store};

/// Undoes the pod and prints the exit that containerd reports for its tasks.
///
/// # Errors
/// What could not be undone.
pub fn delete(flags: &Flags) -> Result<()> {
    let bundle = if flags.bundle.is_empty() { std::env::current_dir().context("find the bundle")? } else { PathBuf::from(&flags.bundle) };
    // A bundle that is gone or broken belongs to no other pod.
    let pod = spec::pod_of(&bundle.join("config.json")).ok().flatten().unwrap_or_else(|| flags.id.clone());
    let socket = socket_path(&flags.address, &flags.namespace, &pod);
    let config = settings::load(Path::new(config::PATH)).unwrap_or_default();
    // A container of a pod that lives is the business of the pod's shim; so are the others when the
    // sandbox's own container was deleted first.
    let alive = UnixStream::connect(&socket).is_ok();
    if !(alive && (pod != flags.id || has_others(&config.run_dir, flags))) {
        let undone = store::undo(&config.run_dir, &flags.namespace, &pod);
        // Nobody listens there any more, whatever else stays.
        let _ = std::fs::remove_file(&socket);
        undone?;
    }
    let exit = Exit::killed();
    let response = DeleteResponse {
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?).context("print the answer")
}

/// Whether the pod's record names containers besides the one that this call is about.
fn has_others(run_dir: &Path, flags: &Flags) -> bool {
    let record = records::read(&records::pod_dir(run_dir, &flags.namespace, &flags.id));
    record.ok().flatten().is_some_and(|record| record.containers.iter().any(|container| *container != flags.id))
}
