//! The helper: a single-threaded process that makes one container, or one process in it.
//!
//! ```text
//! agent ──spawn──► helper create ID        ── report pid ──► agent
//!                     │ waits for a byte  ◄── start ──────── agent
//!                     └─ starts the process ── report ─────► agent, and ends
//! agent ──spawn──► helper exec ID EXEC     ── report pid ──► agent, and ends
//! ```
//!
//! Its standard streams are those of the container; it talks to the agent over descriptor 3.
#![expect(unsafe_code, reason = "the report socket arrives as a descriptor by number")]

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};

/// The agent's first argument when it is to be a helper.
pub const WORD: &str = "container";
/// Descriptor of the socket to the agent.
pub const REPORT_FD: i32 = 3;
/// Exit codes of a program that cannot be executed or found, as shells give them.
const EXIT_CANNOT_EXECUTE: i32 = 126;
const EXIT_NOT_FOUND: i32 = 127;

/// Where the library keeps its state.
pub const STATE_DIR: &str = "/run/caisson/state";

/// The folder with a container's `config.json`, and an exec's `EXEC.json`.
pub fn bundle_dir(container: &str) -> PathBuf {
    Path::new("/run/caisson/bundles").join(container)
}

/// Where an exec's process object lies.
pub fn process_file(container: &str, exec: &str) -> PathBuf {
    bundle_dir(container).join(format!("exec-{exec}.json"))
}

/// Where the terminal of a process is handed over.
pub fn console_socket(container: &str, exec: &str) -> PathBuf {
    bundle_dir(container).join(format!("console-{exec}.sock"))
}

/// What the helper tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The process exists and has this id.
    Made(i32),
    /// The container was started.
    Started,
    /// It failed: one sentence.
    Failed(String),
}

/// The helper's main; returns the exit code.
pub fn main(arguments: &[String]) -> i32 {
    // The agent's threads block all signals, and a program keeps the mask that it is started with.
    if SigSet::empty().thread_set_mask().is_err() {
        return 1;
    }
    // SAFETY: the agent started us with the socket at this descriptor, and nothing else owns it.
    let mut agent = unsafe { UnixStream::from_raw_fd(REPORT_FD) };
    // The container must not inherit it.
    if nix::fcntl::fcntl(&agent, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).is_err() {
        return 1;
    }
    match run(arguments, &mut agent) {
        Ok(()) => 0,
        Err(error) => {
            let _ = report(&mut agent, &Report::Failed(sentence(&error)));
            1
        }
    }
}

/// The chain of causes on one line, each cause once.
fn sentence(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if !parts.last().is_some_and(|last| last.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

fn run(arguments: &[String], agent: &mut UnixStream) -> Result<()> {
    match arguments {
        [verb, id, console] if verb == "create" => create(id, (console == "terminal").then(|| console_socket(id, "")), agent),
        [verb, id, exec, console] if verb == "exec" => {
            let console = (console == "terminal").then(|| console_socket(id, exec));
            let pid = builder(id)?
                .with_console_socket(console)
                .as_tenant()
                .with_process(Some(process_file(id, exec)))
                .with_detach(true)
                .build()?;
            report(agent, &Report::Made(pid.as_raw()))
        }
        _ => bail!("the helper was started with arguments that it does not know"),
    }
}

fn builder(id: &str) -> Result<ContainerBuilder> {
    Ok(ContainerBuilder::new(id.to_owned(), SyscallType::default()).with_root_path(STATE_DIR)?.with_executor(Program))
}

fn create(id: &str, console: Option<PathBuf>, agent: &mut UnixStream) -> Result<()> {
    let mut container: Container =
        builder(id)?.with_console_socket(console).as_init(bundle_dir(id)).with_systemd(false).with_detach(true).build()?;
    let pid = container.pid().context("the new container has no process")?;
    report(agent, &Report::Made(pid.as_raw()))?;
    let mut byte = [0];
    if agent.read(&mut byte)? == 0 {
        // The container was deleted before it was started.
        return Ok(());
    }
    container.start()?;
    report(agent, &Report::Started)
}

fn report(agent: &mut UnixStream, report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    agent.write_all(&line).context("report to the agent")
}

/// Executes the container's program as a shell would: what cannot be found or executed is named
/// on the container's standard error, with the exit code that shells use.
#[derive(Clone)]
struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let arguments = spec.process().as_ref().and_then(|process| process.args().as_ref()).ok_or(ExecutorError::InvalidArg)?;
        let arguments: Vec<CString> =
            arguments.iter().map(|text| CString::new(text.as_str())).collect::<Result<_, _>>().map_err(|_| ExecutorError::InvalidArg)?;
        let Some(program) = arguments.first() else { return Err(ExecutorError::InvalidArg) };
        let Err(error) = nix::unistd::execvp(program, &arguments);
        eprintln!("caisson: exec {}: {}", program.to_string_lossy(), error.desc());
        std::process::exit(if error == Errno::ENOENT { EXIT_NOT_FOUND } else { EXIT_CANNOT_EXECUTE });
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // Looking first would only race with what exec itself finds.
        Ok(())
    }
}
