//! One process of a container as containerd sees it: the container's own, or an exec.
//!
//! ```text
//! Created -> Running -> Stopped        (an exec, or a container's own process)
//!     Created -> Stopped               (killed before it was started, or its machine died)
//! ```

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::agent::Exit;
use crate::errors::{Error, Result};
use crate::sandbox::Sandbox;
use crate::stdio::{self, Opened, Paths};
use crate::vmm::StreamState;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Not started.
    Created,
    /// Started.
    Running,
    /// Exited.
    Stopped,
}

impl Status {
    /// Whether Start may be called.
    pub const fn can_start(self) -> bool {
        matches!(self, Self::Created)
    }

    /// Whether Delete may be called.
    pub const fn can_delete(self) -> bool {
        matches!(self, Self::Created | Self::Stopped)
    }
}

/// A stream that carries output, and the reading end that keeps its FIFO open.
struct Output {
    port: u32,
    state: watch::Receiver<StreamState>,
}

struct State {
    status: Status,
    keepers: Vec<OwnedFd>,
    input: Option<OwnedFd>,
    input_keeper: Option<OwnedFd>,
}

/// A process.
pub struct Process {
    /// Empty for the container's own.
    pub exec: String,
    /// What containerd asked for.
    pub paths: Paths,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    input: Option<u32>,
    outputs: Vec<Output>,
    all_ports: Vec<u32>,
    /// Held from the start of a Start to its event, so that the exit's event comes after it.
    pub starting: tokio::sync::Mutex<()>,
}

impl Process {
    /// A process whose streams are offered to the guest; it does not exist in the guest yet.
    ///
    /// # Errors
    /// When the machine is gone.
    pub async fn new(sandbox: &Sandbox, exec: &str, paths: Paths, opened: Opened) -> Result<Arc<Self>> {
        let (input, output_ports) = (opened.input_port(), opened.output_ports());
        let mut outputs = Vec::new();
        let mut all_ports = Vec::new();
        for (offer, fds) in &opened.offers {
            let state = sandbox.vmm.offer(*offer, fds).await.map_err(Error::Failed)?;
            all_ports.push(offer.port);
            if output_ports.contains(&offer.port) {
                outputs.push(Output { port: offer.port, state });
            }
        }
        Ok(Arc::new(Self {
            exec: exec.to_owned(),
            paths,
            state: Mutex::new(State { status: Status::Created, keepers: opened.keepers, input: opened.input, input_keeper: None }),
            exit: watch::Sender::new(None),
            input,
            outputs,
            all_ports,
            starting: tokio::sync::Mutex::new(()),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.state().status
    }

    /// Keeps standard input open from now on; to be called before the process is started.
    pub fn keep_input(&self) {
        let mut state = self.state();
        // Closed before the start: nothing is to be kept.
        if let Some(input) = state.input.take() {
            state.input_keeper = stdio::keep_input(&self.paths.stdin, &input);
        }
    }

    /// Marks it started, unless it has exited meanwhile.
    pub fn set_running(&self) {
        let mut state = self.state();
        if state.status == Status::Created {
            state.status = Status::Running;
        }
    }

    /// Records its exit; the first one counts. Returns whether this was it.
    pub fn set_exited(&self, exit: Exit) -> bool {
        self.state().status = Status::Stopped;
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(exit);
            }
            first
        })
    }

    /// Its exit, if it has exited.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its exit.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in self, so there is always a value in the end.
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).unwrap_or_else(Exit::killed)
    }

    /// Ends standard input once what the FIFO holds has been sent.
    pub async fn close_input(&self, sandbox: &Sandbox) {
        {
            let mut state = self.state();
            (state.input, state.input_keeper) = (None, None);
        }
        if let Some(port) = self.input {
            sandbox.vmm.close_source(port).await;
        }
    }

    /// Waits until every byte of output is where its reader finds it, or until `limit`.
    ///
    /// An exit that is told before loses output of callers that stop reading when they hear of it.
    pub async fn settle(&self, limit: Duration) {
        let closed = async {
            for output in &self.outputs {
                let mut state = output.state.clone();
                if *state.borrow() != StreamState::Offered {
                    let _ = state.wait_for(|state| *state == StreamState::Closed).await;
                }
            }
        };
        // Later than that the exit is more important; Delete waits for the output again.
        let _ = tokio::time::timeout(limit, closed).await;
    }

    /// Waits until every byte of output has reached its reader.
    ///
    /// A reader that is gone ends the wait at once; one that is there but takes nothing ends it
    /// after `timeout` without any progress, and the rest is lost, which is said in the log.
    pub async fn drain(&self, sandbox: &Sandbox, container: &str, timeout: Duration) {
        // Without our reading end a FIFO that nobody reads breaks, and the stream with it.
        self.state().keepers.clear();
        for output in &self.outputs {
            let mut state = output.state.clone();
            if *state.borrow() == StreamState::Offered {
                // The process never came to life.
                continue;
            }
            if tokio::time::timeout(timeout, state.wait_for(|state| *state == StreamState::Closed)).await.is_err() {
                log::warn!(
                    "container {container}: output was not read for {} ms after the process had exited; the rest of it is lost",
                    timeout.as_millis()
                );
                sandbox.vmm.withdraw(output.port).await;
            }
        }
    }

    /// Takes back what the guest never connected to, and breaks what is left.
    pub async fn close_streams(&self, sandbox: &Sandbox) {
        {
            let mut state = self.state();
            state.keepers.clear();
            (state.input, state.input_keeper) = (None, None);
        }
        for port in &self.all_ports {
            sandbox.vmm.withdraw(*port).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_status_allows() {
        let table = [(Status::Created, true, true), (Status::Running, false, false), (Status::Stopped, false, true)];
        for (status, start, delete) in table {
            assert_eq!((status.can_start(), status.can_delete()), (start, delete), "{status:?}");
        }
    }
}
