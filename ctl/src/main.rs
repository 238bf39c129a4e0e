//! `caisson`: what an operator asks of Caisson on a host.

mod check;
mod list;
mod probe;

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
    Check,
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
    match run(&cli.command, &cli.config) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("caisson: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one command; false when it found something wrong.
fn run(command: &Command, config: &Path) -> Result<bool> {
    match command {
        Command::Version => println!("caisson {}", caisson_protocol::VERSION),
        Command::Config => print!("{}", settings::load(config)?.to_toml()),
        Command::List { json } => list::print(&settings::load(config)?, *json)?,
        Command::Check => return Ok(check::print(config)),
    }
    Ok(true)
}
