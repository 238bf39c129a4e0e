//! The program itself: found, given its environment, executed.

use std::ffi::CString;
use std::path::Path;

use anyhow::{Context, Result, bail};
use caisson_protocol::guest::{PAUSE, POD_ANNOTATIONS};
use nix::errno::Errno;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{execve, fchdir};
use oci_spec::runtime::{Process, Spec};

use super::inside;
use crate::sys;

/// Exit codes of a program that cannot be executed or found, as shells give them.
const EXIT_CANNOT_EXECUTE: i32 = 126;
const EXIT_NOT_FOUND: i32 = 127;
/// Where programs are looked for when the environment does not say (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// What of a program is read before it starts, in bytes, and how much the kernel reads ahead at a time.
const READ_AHEAD: i64 = 2 << 20;
const READ_AT_ONCE: usize = 128 << 10;
/// A larger /etc/passwd is not read for a home folder.
const MAX_PASSWD: u64 = 1 << 20;

/// The process's environment, with HOME where it is missing, as other runtimes have it.
///
/// # Errors
/// When a variable holds a zero byte.
pub fn environment(process: &Process) -> Result<Vec<CString>> {
    let mut variables = process.env().clone().unwrap_or_default();
    if !variables.iter().any(|variable| variable.starts_with("HOME=")) {
        variables.push(format!("HOME={}", home_of(process.user().uid())));
    }
    c_strings(&variables).context("the environment holds a zero byte")
}

/// The home folder that the image's user database gives a user.
fn home_of(uid: u32) -> String {
    const PASSWD: &str = "/etc/passwd";
    let readable = std::fs::metadata(PASSWD).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_PASSWD);
    let text = if readable { std::fs::read_to_string(PASSWD).unwrap_or_default() } else { String::new() };
    find_home(&text, uid).unwrap_or("/").to_owned()
}

fn find_home(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).copied())?.filter(|home| !home.is_empty())
    })
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>> {
    Ok(texts.iter().map(|text| CString::new(text.as_str())).collect::<Result<_, _>>()?)
}

/// Whether the container is one of a pod's, and not a pod of its own.
pub fn is_of_a_pod(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    POD_ANNOTATIONS.iter().any(|(kind, _)| annotations.is_some_and(|annotations| annotations.contains_key(*kind)))
}

/// Whether the process is the one that only holds a pod's namespaces.
pub fn is_pause(process: &Process, spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    let is_sandbox = POD_ANNOTATIONS
        .iter()
        .any(|(kind, _)| annotations.and_then(|annotations| annotations.get(*kind)).is_some_and(|kind| kind == "sandbox"));
    is_sandbox && process.args().as_deref() == Some(&[PAUSE.to_owned()])
}

/// Holds the pod's namespaces until it is told to end, and collects what dies in them.
///
/// The image's own program does just that; not running it saves reading it from the share, and any
/// image will do.
///
/// # Errors
/// When signals cannot be waited for.
pub fn pause() -> Result<()> {
    let _ = prctl::set_name(c"pause");
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().context("block signals")?;
    loop {
        if signals.wait().context("wait for a signal")? != Signal::SIGCHLD {
            return Ok(());
        }
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
    }
}

/// Enters the process's working folder, which no link of the image leads out of the root, nor to what this process has open.
///
/// # Errors
/// When it cannot be entered.
pub fn enter_folder(process: &Process) -> Result<()> {
    let cwd = process.cwd();
    let folder = inside::open(&Path::new("/").join(cwd));
    folder.and_then(|folder| fchdir(&folder)).with_context(|| format!("enter the working folder {}", cwd.display()))
}

/// Has the kernel read the program's beginning from the share while nobody waits for it.
pub fn read_ahead(process: &Process) {
    let path = process.env().iter().flatten().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let name = process.args().iter().flatten().next().and_then(|name| CString::new(name.as_str()).ok());
    let candidates = name.map(|name| candidates(&name, path)).unwrap_or_default();
    // What is at the path may be anything, and whether it is there is for its start to say.
    let open =
        |path: &CString| nix::fcntl::open(path.as_c_str(), OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty()).ok();
    let Some(program) = candidates.iter().find_map(open) else { return };
    for start in (0..READ_AHEAD).step_by(READ_AT_ONCE) {
        let _ = posix_fadvise(&program, start, READ_AT_ONCE as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }
}

/// Becomes the process's program.
///
/// What becomes of one that cannot be found or executed is for the caller to say: `as_shell`
/// names it on standard error and exits with the code that shells use, as if the process had
/// started and failed.
///
/// # Errors
/// When the process names no program, or one that cannot be found or executed.
pub fn execute(process: &Process, environment: &[CString], as_shell: bool) -> Result<()> {
    let arguments = c_strings(process.args().as_deref().unwrap_or_default()).context("the arguments hold a zero byte")?;
    let program = arguments.first().context("the process has no arguments")?;
    let path = environment.iter().find_map(|variable| variable.to_str().ok()?.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    sys::restore_sigpipe();
    let errno = try_each(&candidates(program, path), &arguments, environment);
    let name = program.to_string_lossy();
    let sentence = match errno {
        Errno::ENOENT if !name.contains('/') => format!("exec {name}: executable file not found in $PATH"),
        errno => format!("exec {name}: {}", errno.desc()),
    };
    if !as_shell {
        bail!("{sentence}");
    }
    eprintln!("caisson: {sentence}");
    std::process::exit(if errno == Errno::ENOENT { EXIT_NOT_FOUND } else { EXIT_CANNOT_EXECUTE });
}

/// Where a program may be.
fn candidates(program: &CString, path: &str) -> Vec<CString> {
    if program.as_bytes().contains(&b'/') || program.is_empty() {
        return vec![program.clone()];
    }
    path.split(':')
        .filter_map(|folder| {
            let folder = if folder.is_empty() { "." } else { folder };
            CString::new([folder.as_bytes(), b"/", program.as_bytes()].concat()).ok()
        })
        .collect()
}

/// Executes the first candidate that can be; returns why none could.
fn try_each(candidates: &[CString], arguments: &[CString], environment: &[CString]) -> Errno {
    let mut reason = Errno::ENOENT;
    for candidate in candidates {
        let Err(errno) = execve(candidate, arguments, environment);
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {}
            // Another one may be executable.
            Errno::EACCES => reason = errno,
            errno => return errno,
        }
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_looked_for_along_the_path() {
        let found = |program: &str| candidates(&CString::new(program).unwrap(), "/bin::/usr/bin");
        assert_eq!(found("sh"), [c"/bin/sh".to_owned(), c"./sh".to_owned(), c"/usr/bin/sh".to_owned()]);
        assert_eq!(found("./sh"), [c"./sh".to_owned()]);
    }

    #[test]
    fn home_is_that_of_the_user_database() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:\nnone:x:34:34:::\n";
        assert_eq!((find_home(passwd, 33), find_home(passwd, 34), find_home(passwd, 5)), (Some("/var/www"), None, None));
    }
}
