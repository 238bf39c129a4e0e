//! `caisson`: what an operator asks of Caisson on a host.

mod check;
mod list;
mod probe;
mod security;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use caisson_host::settings;
use caisson_protocol::config;
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
    },
    /// Print the effective configuration
    Config,
    /// List the pods of this host
    List {
        /// As JSON, one record a line
        #[arg(long)]
        json: bool,
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

/// Runs one command; returns the exit code: 1 when it found something wrong.
fn run(command: Command, config: &Path) -> Result<u8> {
    let load = || settings::load(config);
    match command {
        Command::Version => println!("caisson {}", caisson_protocol::VERSION),
        Command::Config => print!("{}", load()?.to_toml()),
        Command::List { json } => list::print(&load()?, json)?,
        Command::Check { security: true, json } => return Ok(u8::from(!security::print(&load()?, json)?)),
        Command::Check { .. } => return Ok(u8::from(!check::print(config))),
    }
    Ok(0)
}
