//! What a pod's owners ask of its shim: JSON messages with file descriptors over a socket in the pod's
//! folder, which file permissions keep from everybody else (`pod.owners`).
//!
//! A connection is one request and its answer; an exec goes on until the program has ended.

use serde::{Deserialize, Serialize};

/// Name of the socket in a pod's folder.
pub const SOCKET: &str = "owner.sock";
/// The longest time that a stopped pod may have for its end, in milliseconds.
pub const MAX_STOP_MS: u32 = 3_600_000;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a program in a container. Three descriptors come with it, which it has as standard input, output
    /// and error; with a terminal two, for what goes into it and what comes out.
    Exec(Exec),
    /// The terminal of the program that runs has another size.
    Resize(Size),
    /// The file that a container's output is in.
    Log {
        /// Which container; the only one when it is not said.
        container: Option<String>,
    },
    /// What the guest's kernel said from message `after` on.
    Console {
        /// As the last answer said, or 0.
        after: u64,
    },
    /// End all containers, and the machine.
    Stop {
        /// From SIGTERM to SIGKILL, at most [`MAX_STOP_MS`].
        timeout_ms: u32,
    },
    /// What the pod and its containers use: [`Usage`].
    Metrics,
    /// The processes of all containers: a list of [`PodProcess`].
    Top,
}

/// A program to be run as the container's own process is, but for what is said here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Which container; the only one when it is not said.
    pub container: Option<String>,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The folder that it starts in.
    pub cwd: Option<String>,
    /// Variables of its environment beside the container's, as NAME=VALUE.
    pub env: Vec<String>,
    /// The size of its terminal, when it is to have one.
    pub terminal: Option<Size>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The program runs.
    Started,
    /// It has ended, and its output is where it belongs.
    Exited {
        /// 0-255; 128 + signal for a killed program.
        status: u32,
    },
    /// What was asked for is in the file that comes with it.
    File {
        /// What to ask for next, where something may follow.
        next: u64,
    },
    /// It is done.
    Done,
    /// It could not be done: one sentence.
    Failed(String),
}

/// What a pod uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// vCPUs of its machine.
    pub vcpus: u32,
    /// Memory of its machine in MiB.
    pub memory_mib: u64,
    /// Of each container.
    pub containers: Vec<ContainerUsage>,
}

/// What a container uses, as its cgroup in the guest counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUsage {
    /// Its id.
    pub container: String,
    /// Time on processors in microseconds.
    pub cpu_us: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes that it may use; 0 for no limit.
    pub memory_limit: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Processes that were killed for want of memory.
    pub oom_kills: u64,
}

/// A process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodProcess {
    /// Its container.
    pub container: String,
    /// Its id in the guest.
    pub pid: u32,
    /// The user that it is in its container.
    pub user: u32,
    /// The user of the host that owns what it writes.
    pub host_user: u32,
    /// Its command line, as it says itself.
    pub command: String,
}
