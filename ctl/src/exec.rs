//! `caisson exec`: a program in a container, with the caller's streams or terminal.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use caisson_host::control::Control;
use caisson_protocol::config::Config;
use caisson_protocol::owner::{Answer, Exec, Request, Size};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::owner;

/// What is copied at a time.
const CHUNK: usize = 64 << 10;

/// Runs a program; returns its exit code.
///
/// # Errors
/// When it cannot be run, or the pod ends before it.
pub fn run(config: &Config, pod: &str, mut program: Exec, terminal: bool) -> Result<u8> {
    ensure!(!terminal || io::stdin().is_terminal(), "standard input is no terminal; leave --tty out");
    program.terminal = if terminal { Some(size()) } else { None };
    let shim = owner::connect(config, &owner::find(config, pod)?)?;
    let (input, to_program) = io::pipe().context("make a pipe")?;
    let (from_program, output) = io::pipe().context("make a pipe")?;
    let (from_errors, errors) = io::pipe().context("make a pipe")?;
    let mut theirs: Vec<OwnedFd> = vec![input.into(), output.into()];
    if !terminal {
        theirs.push(errors.into());
    }
    let lent: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
    shim.send(&Request::Exec(program), &lent, true).context("ask the pod's shim")?;
    drop(theirs);
    match owner::hear(&shim)? {
        (Answer::Started, _) => {}
        (Answer::Exited { status }, _) => return Ok(status as u8),
        (answer, _) => bail!("the pod's shim answered {answer:?}"),
    }
    let raw = if terminal { Some(Raw::enter()?) } else { None };
    let shim = Arc::new(shim);
    if terminal {
        tell_sizes(Arc::clone(&shim))?;
    }
    // It ends with this process: nobody can tell when a terminal has no more to say.
    thread::spawn(move || copy(io::stdin(), to_program));
    let output = thread::spawn(move || copy(from_program, io::stdout()));
    let errors = (!terminal).then(|| thread::spawn(move || copy(from_errors, io::stderr())));
    let outcome = owner::hear(&shim);
    // The shim answers when all output is in the pipes, and their other ends are closed.
    for copying in [Some(output), errors].into_iter().flatten() {
        // A thread that panicked has said so.
        let _ = copying.join();
    }
    drop(raw);
    match outcome? {
        (Answer::Exited { status }, _) => Ok(status as u8),
        (answer, _) => bail!("the pod's shim answered {answer:?}"),
    }
}

/// Copies until either side has ended, what there is at once.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if to.write_all(&chunk[..length]).and_then(|()| to.flush()).is_err() {
                    return;
                }
            }
        }
    }
}

/// The caller's terminal, which passes every key on as it is; set back when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("ask how the terminal is set")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).context("set the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// Tells the shim of each change of the terminal's size.
fn tell_sizes(shim: Arc<Control>) -> Result<()> {
    let mut signals = Signals::new([SIGWINCH]).context("watch the terminal's size")?;
    thread::spawn(move || {
        for _ in signals.forever() {
            // A shim that is gone is seen by who waits for its answer.
            let _ = shim.send(&Request::Resize(size()), &[], true);
        }
    });
    Ok(())
}

/// The size of the caller's terminal.
fn size() -> Size {
    let size = rustix::termios::tcgetwinsize(io::stdin());
    size.map_or(Size { columns: 80, rows: 24 }, |size| Size { columns: size.ws_col, rows: size.ws_row })
}
