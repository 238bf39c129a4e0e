//! `caisson`: what an operator asks of Caisson on a host.

mod check;
mod exec;
mod folders;
mod list;
mod owner;
mod probe;
mod rootless;
mod security;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use caisson_host::settings;
use caisson_protocol::config;
use caisson_protocol::owner::Exec;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "caisson", about = "Looks after pods in virtual machines", version)]
struct Cli {
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = config::PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell whether this host can run pods, and what to do about each miss
    Check {
        /// Tell instead what holds the processes of the pods that run, as it is
        #[arg(long)]
        security: bool,
        /// With --security: as JSON, one check a line
        #[arg(long, requires = "security")]
        json: bool,
        /// Tell whether you can run pods without being root
        #[arg(long, conflicts_with = "security")]
        rootless: bool,
    },
    /// Print the effective configuration
    Config,
    /// List the pods of this host
    List {
        /// As JSON, one record a line
        #[arg(long)]
        json: bool,
    },
    /// Run a program in a container
    Exec {
        /// With a terminal
        #[arg(short, long)]
        tty: bool,
        /// The container, by name or id; the pod's only one without
        #[arg(short, long, value_name = "CONTAINER")]
        container: Option<String>,
        /// The folder that it starts in
        #[arg(long, value_name = "DIR")]
        cwd: Option<String>,
        /// A variable of its environment
        #[arg(short, long, value_name = "NAME=VALUE")]
        env: Vec<String>,
        /// The pod's id, or the beginning of it
        pod: String,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Print a container's output, where it is kept in a file
    Logs {
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// The container, by name or id; the pod's only one without
        #[arg(short, long, value_name = "CONTAINER")]
        container: Option<String>,
        /// The pod's id, or the beginning of it
        pod: String,
    },
    /// Print what the guest's kernel has said
    Console {
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// The pod's id, or the beginning of it
        pod: String,
    },
    /// End a pod: SIGTERM to its containers, SIGKILL to those that are left after a time
    Stop {
        /// From one to the other
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        timeout: u64,
        /// The pod's id, or the beginning of it
        pod: String,
    },
    /// Print what pods and containers use, as Prometheus reads it
    Metrics {
        /// The pod's id, or the beginning of it; all that are yours without
        pod: Option<String>,
    },
    /// List the processes of containers, with their users in the pod and on the host
    Top {
        /// The pod's id, or the beginning of it; all that are yours without
        pod: Option<String>,
    },
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command, &cli.config) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("caisson: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one command; returns the exit code: 1 when it found something wrong, that of the program of an exec.
fn run(command: Command, config: &Path) -> Result<u8> {
    let load = || settings::load(config);
    match command {
        Command::Version => println!("caisson {}", caisson_protocol::VERSION),
        Command::Config => print!("{}", load()?.to_toml()),
        Command::List { json } => list::print(&load()?, json)?,
        Command::Check { security: true, json, .. } => return Ok(u8::from(!security::print(&load()?, json)?)),
        Command::Check { rootless, .. } => return Ok(u8::from(!check::print(config, rootless))),
        Command::Exec { tty, container, cwd, env, pod, command } => {
            let program = Exec { container, args: command, cwd, env, terminal: None };
            return exec::run(&load()?, &pod, program, tty);
        }
        Command::Logs { follow, container, pod } => owner::logs(&load()?, &pod, container, follow)?,
        Command::Console { follow, pod } => owner::console(&load()?, &pod, follow)?,
        Command::Stop { timeout, pod } => owner::stop(&load()?, &pod, Duration::from_secs(timeout))?,
        Command::Metrics { pod } => owner::metrics(&load()?, pod.as_deref())?,
        Command::Top { pod } => owner::top(&load()?, pod.as_deref())?,
    }
    Ok(0)
}
