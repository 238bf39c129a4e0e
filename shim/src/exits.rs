//! How processes end, told to containerd: exits, and kills for want of memory before them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use protobuf::MessageField;

use crate::agent::Exit;
use crate::container::Container;
use crate::events::timestamp;
use crate::machine::Machine;
use crate::pod::Pod;
use crate::process::Process;

/// How long an exit is kept back while its output is on its way to a slow reader.
const SETTLE: Duration = Duration::from_secs(5);
/// The same for an exec, which may leave a process that keeps the output open.
const SETTLE_EXEC: Duration = Duration::from_millis(200);

/// Between two reports that a container ran out of memory.
const OOM_PAUSE: Duration = Duration::from_secs(1);

impl Pod {
    /// Publishes a process's exit when it comes, or 137 when the machine dies first.
    pub fn watch_exit(self: &Arc<Self>, machine: &Arc<Machine>, container: &Arc<Container>, process: Arc<Process>) {
        let (pod, machine, container) = (Arc::clone(self), Arc::clone(machine), Arc::clone(container));
        tokio::spawn(async move {
            let exit = match machine.sandbox.agent.wait(&container.id, &process.exec).await {
                Ok(exit) => {
                    process.settle(if process.exec.is_empty() { SETTLE } else { SETTLE_EXEC }).await;
                    exit
                }
                Err(error) => {
                    log::debug!("container {}: {error}", container.id);
                    // However the agent failed, the process is not to outlive what is said of it.
                    machine.sandbox.kill(&error.to_string());
                    machine.note_failure();
                    Exit::killed()
                }
            };
            let _started = process.starting.lock().await;
            // The reason is known before the exit is.
            pod.note_oom(&container, exit.oom_kills);
            if process.exec.is_empty() {
                pod.leave_room(&container.id);
            }
            if process.exec.is_empty() {
                // Whoever hears that nothing of the pod runs any more may kill what is left in its cgroup.
                if pod.runs_nothing_but(&container.id) {
                    machine.sandbox.leave();
                }
                container.task.end(exit.status);
            }
            if process.set_exited(exit) {
                let id = if process.exec.is_empty() { container.id.clone() } else { process.exec.clone() };
                pod.publish(
                    &container.id,
                    &TaskExit {
                        container_id: container.id.clone(),
                        id,
                        pid: container.task.pid(),
                        exit_status: exit.status,
                        exited_at: MessageField::some(timestamp(exit.at)),
                        ..TaskExit::default()
                    },
                );
            }
        });
    }

    /// Publishes that the kernel killed a process of a container for want of memory, each time.
    pub fn watch_oom(self: &Arc<Self>, machine: &Arc<Machine>, container: &Arc<Container>) {
        let (pod, agent, container) = (Arc::clone(self), machine.sandbox.agent.clone(), Arc::clone(container));
        tokio::spawn(async move {
            // Ends with the container or the machine, or with an answer that is none.
            loop {
                let known = container.oom_kills.load(Ordering::Acquire);
                let Ok(kills) = agent.wait_oom(&container.id, known).await else { return };
                if kills <= known {
                    return;
                }
                pod.note_oom(&container, kills);
                // However fast the guest counts, containerd hears of it at a bearable rate.
                tokio::time::sleep(OOM_PAUSE).await;
            }
        });
    }

    /// Tells containerd when more of a container's processes were killed for want of memory than it knows of.
    fn note_oom(&self, container: &Container, kills: u64) {
        if container.oom_kills.fetch_max(kills, Ordering::AcqRel) < kills {
            self.publish(&container.id, &TaskOOM { container_id: container.id.clone(), ..TaskOOM::default() });
        }
    }
}
