//! How a pod ends: its containers first, then what their disks have not got yet, then its machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agent::DISK_TIMEOUT;
use crate::container::Container;
use crate::machine::Machine;
use crate::pod::{Pod, SIGKILL, lock};

impl Pod {
    /// Takes a container back that was created for nobody.
    pub async fn discard(&self, id: &str) {
        log::warn!("container {id}: containerd did not wait for it; it is deleted");
        if let Err(error) = self.delete(id, "").await {
            log::error!("container {id}: {error}");
        }
        self.shutdown(false).await;
    }

    /// Kills all containers, within a time, and the machine.
    pub async fn stop(&self, timeout: Duration) {
        let Ok(machine) = self.machine() else { return };
        let containers: Vec<_> = self.containers().values().cloned().collect();
        let kill = async {
            for container in containers.iter().filter(|container| container.init.exited().is_none()) {
                // It may die by itself meanwhile.
                let _ = machine.sandbox.agent.signal(&container.id, "", SIGKILL, false).await;
            }
            for container in &containers {
                container.init.wait().await;
            }
        };
        if tokio::time::timeout(timeout, kill).await.is_err() {
            log::warn!("pod {}: its containers did not die within {timeout:?}", self.id());
        }
        write_out(&machine, &containers).await;
        machine.stop("the pod was stopped");
    }

    /// Ends the pod when no container is left (or `now`); returns whether it ended.
    pub async fn shutdown(&self, now: bool) -> bool {
        let containers: Vec<_> = self.containers().values().cloned().collect();
        if !now && !containers.is_empty() {
            return false;
        }
        let begin = Instant::now();
        // A boot that is under way has its own time-out.
        let _booting = self.booting.lock().await;
        let machine = lock(&self.machine).take();
        if let Some(machine) = machine {
            write_out(&machine, &containers).await;
            machine.end("the pod was shut down");
            log::info!("pod was taken apart: teardown {} ms", begin.elapsed().as_millis());
        }
        self.events.flush().await;
        true
    }
}

/// Has the guest write out the disks of the containers that have exited.
async fn write_out(machine: &Machine, containers: &[Arc<Container>]) {
    let all = async {
        for container in containers.iter().filter(|container| container.init.exited().is_some()) {
            machine.disks.write_out(&machine.sandbox, &container.id).await;
        }
    };
    if tokio::time::timeout(DISK_TIMEOUT, all).await.is_err() {
        log::error!("the disks of the pod were not written out within {DISK_TIMEOUT:?}");
    }
}
