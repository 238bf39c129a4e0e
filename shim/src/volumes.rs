//! Volumes that the host replaces as a whole: Kubernetes' ConfigMaps, Secrets, projected volumes, tokens.
//!
//! kubelet writes each state of such a volume into a folder of its own, and has the link `..data` name
//! that folder. A program in the guest that looks again sees the new state through the share, but no
//! inotify watcher would hear of it: virtio-fs has no notifications. So the guest's agent keeps a copy
//! of the volume, and the shim tells it when the link has changed.
//!
//! The link is read from time to time. Watchers would see it sooner, but a host has few of those
//! (`fs.inotify.max_user_instances`, 128 by default) and needs them itself, while kubelet takes up to a
//! minute to bring a change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::guest::{VOLUME_STATE, VOLUMES_DIR, shared_mount};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::container::Container;
use crate::errors::Error;
use crate::machine::Machine;
use crate::mounts::ReadOnly;
use crate::spec::Bind;

/// Between two looks at a container's volumes.
const INTERVAL: Duration = Duration::from_secs(2);

/// A volume of which the guest has a copy.
struct Volume {
    /// On the host.
    source: PathBuf,
    /// Among the container's bind mounts.
    name: String,
    /// The folder that its link named when the guest was last told.
    state: String,
}

/// Those of a container.
pub struct Volumes(Vec<Volume>);

impl Volumes {
    /// Has the guest copy the volumes among a container's bind mounts, and points its specification
    /// at the copies.
    ///
    /// One that the guest cannot copy, for its size say, stays as the share has it.
    pub async fn publish(agent: &Agent, container: &str, binds: &[Bind], spec: &mut Value) -> Self {
        let mut volumes = Vec::new();
        // What a container may write is no copy.
        for bind in binds.iter().filter(|bind| bind.how.read_only != ReadOnly::No) {
            let Some(state) = state(&bind.source) else { continue };
            if let Err(error) = agent.publish_volume(container, &bind.name, &state).await {
                log::warn!("container {container}: changes of {} have no notifications: {error}", bind.source.display());
                continue;
            }
            let shared = shared_mount(container, &bind.name);
            for mount in spec["mounts"].as_array_mut().into_iter().flatten().filter(|mount| mount["source"] == shared) {
                mount["source"] = json!(format!("{VOLUMES_DIR}/{container}/{}", bind.name));
            }
            volumes.push(Volume { source: bind.source.clone(), name: bind.name.clone(), state });
        }
        Self(volumes)
    }

    /// Tells the guest of each change for as long as the container runs.
    pub fn follow(mut self, machine: &Arc<Machine>, container: &Arc<Container>) {
        if self.0.is_empty() {
            return;
        }
        let (machine, container) = (Arc::clone(machine), Arc::clone(container));
        tokio::spawn(async move {
            while tokio::time::timeout(INTERVAL, container.init.wait()).await.is_err() {
                for volume in &mut self.0 {
                    volume.follow(&machine.sandbox.agent, &container.id).await;
                }
            }
        });
    }
}

impl Volume {
    async fn follow(&mut self, agent: &Agent, container: &str) {
        // Without a link the volume is about to go.
        let Some(state) = state(&self.source).filter(|state| *state != self.state) else { return };
        match agent.publish_volume(container, &self.name, &state).await {
            Ok(()) => self.state = state,
            // Of a pod that ends nothing needs to be said.
            Err(Error::Gone(_)) => {}
            // Tried again: kubelet may have gone on to the next state.
            Err(error) => log::warn!("container {container}: changes of {} were not taken over: {error}", self.source.display()),
        }
    }
}

/// The folder that the link of a volume names; `None` when it is not such a volume.
fn state(source: &Path) -> Option<String> {
    let target = std::fs::read_link(source.join(VOLUME_STATE)).ok()?;
    let name = target.to_str()?;
    (name.starts_with("..") && name.len() > 2 && !name.contains('/')).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_that_kubelet_has_written_has_a_state() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join(VOLUME_STATE);
        assert_eq!(state(folder.path()), None);
        for (target, expected) in [("..2026_11_23", Some("..2026_11_23")), ("..", None), ("../other", None), ("plain", None)] {
            std::os::unix::fs::symlink(target, &link).unwrap();
            assert_eq!(state(folder.path()).as_deref(), expected, "{target}");
            std::fs::remove_file(&link).unwrap();
        }
    }
}
