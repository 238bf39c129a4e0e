//! `containerd-shim-caisson-v2`: what containerd starts for each pod.
//!
//! ```text
//! start   containerd runs it in the bundle; it leaves a daemon and prints the daemon's address
//! (none)  the daemon: serves the task service until containerd shuts it down
//! delete  containerd runs it for a shim that died; it undoes what the pod's record names
//! -info   prints what the runtime supports; -v prints the version
//! ```

use std::process::ExitCode;

use caisson_shim::flags::{Action, Flags};
use caisson_shim::{bootstrap, cleanup, daemon, idmap, info};

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|argument| argument == idmap::HOLDER) {
        // Who started it hears of a failure by its end.
        return idmap::hold().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let flags = match Flags::parse(std::env::args().skip(1)) {
        Ok(flags) => flags,
        Err(problem) => {
            eprintln!("containerd-shim-caisson-v2: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = match flags.action {
        Action::Version => {
            println!("containerd-shim-caisson-v2 {}", caisson_protocol::VERSION);
            Ok(())
        }
        Action::Info => info::print(),
        Action::Start => bootstrap::start(&flags),
        Action::Delete => cleanup::delete(&flags),
        Action::Serve => daemon::serve(flags),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-caisson-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
