//! The developer's commands. `cargo xtask help` lists them.

mod bench;
mod build;
mod cache;
mod coverage;
mod demo;
mod fuzz;
mod install;
mod interrupt;
mod node;
mod packages;
mod progress;
mod sanitize;
mod test;
mod tidy;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tries, tests and measures Caisson")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the release artefacts into target/caisson
    Build,
    /// Run a command in a container in a virtual machine, through containerd
    Demo {
        /// The command and its arguments
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Download and build what the other commands need, so that they start at once
    Prepare,
    /// Run a command as root on a node, where KVM works and Caisson is installed
    Node(node::NodeArgs),
    /// Run the unit, property and node tests
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
        /// Also what takes long: longer floods, more pods, longer sequences and fuzzing, and tests for a node of their own
        #[arg(long)]
        long: bool,
    },
    /// Measure, and print the figures as a table and as JSON
    Bench(bench::BenchArgs),
    /// Feed the parsers of hostile bytes with what breaks them, if anything does
    Fuzz(fuzz::FuzzArgs),
    /// Run the unit tests of VMM, file server, agent and what they share under AddressSanitizer
    Sanitize,
    /// Check the house rules
    Tidy,
    /// Install Caisson below a root folder
    Install {
        /// The folder to install below
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
    },
}

fn main() -> std::process::ExitCode {
    let command = Cli::parse().command;
    match interrupt::catch().and_then(|()| run(command)) {
        Ok(code) => std::process::ExitCode::from(u8::try_from(code).unwrap_or(1)),
        // What ended by it has no other reason worth reading.
        Err(_) if interrupt::seen() => std::process::ExitCode::from(interrupt::EXIT_CODE as u8),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Runs one command and returns the exit code.
fn run(command: Command) -> Result<i32> {
    match command {
        Command::Build => build::all().map(|dir| {
            println!("{}", dir.display());
            0
        }),
        Command::Demo { command } => demo::run(&command),
        Command::Prepare => {
            build::all()?;
            node::prepare()?;
            Ok(0)
        }
        Command::Node(args) => node::run(&args),
        Command::Test { filter, long } => test::run(filter.as_deref(), long),
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Sanitize => sanitize::run(),
        Command::Tidy => tidy::run(),
        Command::Install { root } => {
            install::into(&build::all()?, &root)?;
            Ok(0)
        }
    }
}
