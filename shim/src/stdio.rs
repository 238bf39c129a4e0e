//! A process's standard streams on the host: containerd's FIFOs and log URIs, as descriptors.
//!
//! The VMM writes the guest's output straight into the FIFO, so not a byte passes through the
//! shim. We keep a reading end of each output FIFO open: when containerd restarts, its reader
//! goes away and comes back, and the container must not be killed by SIGPIPE meanwhile.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use caisson_protocol::agent::Stdio as Ports;
use caisson_protocol::guest::FIRST_STREAM_PORT;
use caisson_protocol::vmm::{Ends, Offer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};

/// For a logging program to say that it is ready.
const LOGGER_TIMEOUT: Duration = Duration::from_secs(10);

/// What containerd asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// One terminal instead of three streams.
    pub terminal: bool,
    /// FIFO, or empty.
    pub stdin: String,
    /// FIFO, `binary:`, `file:` or `fifo:` URI, or empty.
    pub stdout: String,
    /// Likewise.
    pub stderr: String,
}

/// Streams that are open on the host and not offered to the guest yet.
pub struct Opened {
    /// What the guest connects to.
    pub ports: Ports,
    /// What the VMM is to be told, with its descriptors.
    pub offers: Vec<(Offer, Vec<OwnedFd>)>,
    /// Reading ends that keep output FIFOs open.
    pub keepers: Vec<OwnedFd>,
    /// A reading end of standard input, to see whether somebody writes to it.
    pub input: Option<OwnedFd>,
}

/// A port for a stream, which no container can guess while it is on offer.
///
/// # Errors
/// When the kernel has no random numbers.
pub fn stream_port() -> Result<u32> {
    // The last number stands for any port (vsock(7)).
    let known = |port: &u32| (FIRST_STREAM_PORT..u32::MAX).contains(port);
    loop {
        if let Some(port) = Some(getrandom::u32().map_err(|error| anyhow!("choose a port: {error}"))?).filter(known) {
            return Ok(port);
        }
    }
}

/// Opens the streams of a process.
///
/// # Errors
/// Which stream could not be opened, and why.
pub fn open(paths: &Paths, container: &str, namespace: &str) -> Result<Opened> {
    let mut opened =
        Opened { ports: Ports { terminal: paths.terminal, ..Ports::default() }, offers: Vec::new(), keepers: Vec::new(), input: None };
    let source = if paths.stdin.is_empty() {
        None
    } else {
        let what = || format!("open standard input {}", paths.stdin);
        let source = open_source(&paths.stdin).with_context(what)?;
        opened.input = Some(source.try_clone().with_context(what)?);
        Some(source)
    };
    let (stdout, stderr) = open_sinks(paths, container, namespace, &mut opened.keepers)?;
    opened.offer(source, stdout, stderr)?;
    Ok(opened)
}

/// The streams of a process whose other ends somebody else has: input and output of a terminal, or the
/// three standard streams. They have to be pipes, which lead nowhere else.
///
/// Each is opened anew: how a descriptor was opened, and whether it blocks, is the caller's to change otherwise.
///
/// # Errors
/// When they are not.
pub fn given(terminal: bool, fds: Vec<OwnedFd>) -> Result<Opened> {
    let expected = if terminal { 2 } else { 3 };
    ensure!(fds.len() == expected, "a program came with {} descriptors instead of {expected}", fds.len());
    let mut own = Vec::new();
    for (index, fd) in fds.iter().enumerate() {
        let mode = fstat(fd).context("look at a descriptor")?.st_mode;
        ensure!(SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFIFO, "a program's streams have to be pipes");
        let mut options = File::options();
        options.read(index == 0).write(index > 0).custom_flags(libc::O_NONBLOCK);
        own.push(options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())).context("open a program's stream")?.into());
    }
    let mut opened = Opened { ports: Ports { terminal, ..Ports::default() }, offers: Vec::new(), keepers: Vec::new(), input: None };
    let mut fds = own.into_iter();
    opened.offer(fds.next(), fds.next(), fds.next())?;
    Ok(opened)
}

impl Opened {
    /// Gives each stream a port.
    fn offer(&mut self, source: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd>) -> Result<()> {
        let offers = &mut self.offers;
        let mut offer = |ends: Ends, fds: Vec<OwnedFd>| -> Result<u32> {
            if fds.is_empty() {
                return Ok(0);
            }
            let port = stream_port()?;
            offers.push((Offer { port, ends }, fds));
            Ok(port)
        };
        if self.ports.terminal {
            let ends = match (&source, &stdout) {
                (Some(_), Some(_)) => Ends::SourceAndSink,
                (Some(_), None) => Ends::Source,
                (None, _) => Ends::Sink,
            };
            self.ports.stdin = offer(ends, source.into_iter().chain(stdout).collect())?;
            return Ok(());
        }
        self.ports.stdin = offer(Ends::Source, source.into_iter().collect())?;
        self.ports.stdout = offer(Ends::Sink, stdout.into_iter().collect())?;
        self.ports.stderr = offer(Ends::Sink, stderr.into_iter().collect())?;
        Ok(())
    }

    /// The port whose source is standard input, if there is one.
    pub fn input_port(&self) -> Option<u32> {
        self.offers.iter().find(|(offer, _)| matches!(offer.ends, Ends::Source | Ends::SourceAndSink)).map(|(offer, _)| offer.port)
    }

    /// The ports that carry output.
    pub fn output_ports(&self) -> Vec<u32> {
        self.offers
            .iter()
            .filter(|(offer, _)| matches!(offer.ends, Ends::Sink | Ends::SourceAndSink))
            .map(|(offer, _)| offer.port)
            .collect()
    }
}

/// Opens for reading without waiting for a writer.
fn open_source(path: &str) -> Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?.into())
}

/// A writing end that keeps standard input open from the start of a process on: it ends by CloseIO,
/// not with the caller that happens to be attached. `None` when the only writer has gone already,
/// which says CloseIO before it could be heard (as `ctr` with a short input).
pub fn keep_input(path: &str, input: &OwnedFd) -> Option<OwnedFd> {
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let ended = polled.is_err() || fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
    // Without it standard input ends with its writer, which is no reason to fail.
    if ended { None } else { open_writer(path).ok() }
}

/// Opens for writing what somebody reads already.
fn open_writer(path: &str) -> Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?.into())
}

type Sinks = (Option<OwnedFd>, Option<OwnedFd>);

fn open_sinks(paths: &Paths, container: &str, namespace: &str, keepers: &mut Vec<OwnedFd>) -> Result<Sinks> {
    if let Some(uri) = paths.stdout.strip_prefix("binary:") {
        // One program takes both streams.
        let (stdout, stderr) =
            start_logger(uri, container, namespace).with_context(|| format!("start the logging program {}", paths.stdout))?;
        return Ok((Some(stdout), (!paths.terminal).then_some(stderr)));
    }
    let mut sink = |what: &str, path: &str| -> Result<Option<OwnedFd>> {
        if path.is_empty() {
            return Ok(None);
        }
        open_sink(path, keepers).with_context(|| format!("open standard {what} {path}")).map(Some)
    };
    let stdout = sink("output", &paths.stdout)?;
    let stderr = if paths.terminal { None } else { sink("error", &paths.stderr)? };
    Ok((stdout, stderr))
}

fn open_sink(path: &str, keepers: &mut Vec<OwnedFd>) -> Result<OwnedFd> {
    if let Some(path) = path.strip_prefix("file:") {
        return open_file(uri_path(path));
    }
    let path = path.strip_prefix("fifo:").map_or(path, uri_path);
    // A reader first, so that opening for writing does not wait for containerd's.
    let keeper = open_source(path)?;
    let writer = open_writer(path)?;
    keepers.push(keeper);
    Ok(writer)
}

/// The file that an output's URI names, if it names one.
pub fn file_of(uri: &str) -> Option<&Path> {
    uri.strip_prefix("file:").map(|rest| Path::new(uri_path(rest)))
}

/// The path of a URI, without authority and query.
fn uri_path(rest: &str) -> &str {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    path.split('?').next().unwrap_or(path)
}

/// A pipe whose content a thread appends to a file: a file cannot be waited for, so the VMM must
/// not write to one.
fn open_file(path: &str) -> Result<OwnedFd> {
    if let Some(folder) = Path::new(path).parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path)?;
    let (mut reader, writer) = std::io::pipe()?;
    let path = path.to_owned();
    std::thread::Builder::new().name("log-file".into()).spawn(move || {
        if let Err(error) = std::io::copy(&mut reader, &mut file) {
            log::error!("write log file {path}: {error}");
        }
    })?;
    Ok(writer.into())
}

/// Starts a logging program (containerd `core/runtime/v2/README.md`, "Logging"): descriptors 3
/// and 4 are the container's output, 5 is closed by the program when it is ready.
#[expect(unsafe_code, reason = "the program's descriptors have fixed numbers")]
fn start_logger(uri: &str, container: &str, namespace: &str) -> Result<(OwnedFd, OwnedFd)> {
    let (stdout_reader, stdout) = std::io::pipe()?;
    let (stderr_reader, stderr) = std::io::pipe()?;
    let (mut ready, ready_writer) = std::io::pipe()?;
    let mut command = Command::new(uri_path(uri));
    if let Some((_, query)) = uri.split_once('?') {
        for pair in query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            command.arg(key).arg(value);
        }
    }
    command.env("CONTAINER_ID", container).env("CONTAINER_NAMESPACE", namespace).stdin(Stdio::null());
    let fds = [stdout_reader.as_raw_fd(), stderr_reader.as_raw_fd(), ready_writer.as_raw_fd()];
    // SAFETY: only async-signal-safe calls; the descriptors live until the child has been started.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first: a target number may be one of the sources.
            let mut high = [0; 3];
            for (slot, fd) in high.iter_mut().zip(fds) {
                *slot = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10);
            }
            for (target, fd) in (3..).zip(high) {
                if libc::dup2(fd, target) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    drop(ready_writer);
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::try_from(LOGGER_TIMEOUT).unwrap_or(PollTimeout::MAX))? == 0 {
        let _ = child.kill();
        bail!("it was not ready within {} s", LOGGER_TIMEOUT.as_secs());
    }
    let mut byte = [0];
    let _ = ready.read(&mut byte)?;
    // It ends when its pipes do; somebody has to collect it.
    std::thread::Builder::new().name("logger".into()).spawn(move || child.wait())?;
    Ok((File::from(OwnedFd::from(stdout)).into(), File::from(OwnedFd::from(stderr)).into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_string_lossy().into_owned()
    }

    #[test]
    fn opening_does_not_wait_for_the_other_side() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { terminal: false, stdin: fifo(dir.path(), "in"), stdout: fifo(dir.path(), "out"), stderr: String::new() };
        let opened = open(&paths, "c", "n").unwrap();
        let Ports { stdin, stdout, stderr, .. } = opened.ports;
        assert!(stdin >= FIRST_STREAM_PORT && stdout >= FIRST_STREAM_PORT && stderr == 0);
        assert!(stdin.abs_diff(stdout) > 1, "who knows one knows the next");
        assert_eq!((opened.input_port(), opened.output_ports()), (Some(stdin), vec![stdout]));
    }

    #[test]
    fn input_is_kept_open_for_a_writer_that_is_there_or_may_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let reader = open_source(&path).unwrap();
        assert!(keep_input(&path, &reader).is_some());
        drop(reader);
        let reader = open_source(&path).unwrap();
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"short").unwrap();
        assert!(keep_input(&path, &reader).is_some());
        drop(writer);
        assert!(keep_input(&path, &reader).is_none());
    }

    #[test]
    fn a_terminal_is_one_stream() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { terminal: true, stdin: fifo(dir.path(), "in"), stdout: fifo(dir.path(), "out"), stderr: String::new() };
        let opened = open(&paths, "c", "n").unwrap();
        assert_eq!(opened.offers.len(), 1);
        assert_eq!((opened.offers[0].0.ends, opened.offers[0].1.len()), (Ends::SourceAndSink, 2));
    }

    #[test]
    fn what_an_owner_gives_has_to_be_pipes() {
        let pipes = || std::io::pipe().map(|(reader, writer)| [OwnedFd::from(reader), OwnedFd::from(writer)]).unwrap();
        assert_eq!(given(true, pipes().into()).unwrap().offers.len(), 1);
        assert!(given(false, pipes().into()).is_err());
        let folder = OwnedFd::from(File::open("/").unwrap());
        let [input, output] = pipes();
        assert!(given(false, vec![input, output, folder]).is_err());
    }

    #[test]
    fn a_missing_fifo_is_named() {
        let paths = Paths { stdout: "/no/such/fifo".into(), ..Paths::default() };
        let Err(error) = open(&paths, "c", "n") else { panic!("opened what is not there") };
        assert!(error.to_string().contains("/no/such/fifo"));
    }

    #[test]
    fn a_file_uri_appends_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/c.log");
        let paths = Paths { stdout: format!("file://{}", path.display()), ..Paths::default() };
        let mut opened = open(&paths, "c", "n").unwrap();
        let mut writer = File::from(opened.offers.remove(0).1.remove(0));
        writer.write_all(b"line\n").unwrap();
        drop(writer);
        for _ in 0..500 {
            if std::fs::read(&path).unwrap() == b"line\n" {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the line did not reach the file");
    }

    #[test]
    fn a_logging_program_gets_output_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let (script, out) = (dir.path().join("logger"), dir.path().join("out"));
        std::fs::write(&script, "#!/bin/sh\nexec 5>&-\necho $CONTAINER_NAMESPACE/$CONTAINER_ID $1=$2 > \"$2\"; cat <&3 >> \"$2\"\n")
            .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let (stdout, stderr) = start_logger(&format!("//{}?out={}", script.display(), out.display()), "c", "n").unwrap();
        drop(stderr);
        File::from(stdout).write_all(b"hello\n").unwrap();
        for _ in 0..500 {
            if std::fs::read_to_string(&out).is_ok_and(|text| text == format!("n/c out={}\nhello\n", out.display())) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the logger did not get the line");
    }
}
