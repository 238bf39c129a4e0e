//! The node: a QEMU virtual machine in which KVM works, containerd runs and Caisson is installed.
//!
//! A node boots once a machine to "containerd answers, the image is imported", and its state is
//! saved; every later node starts from that state in about two seconds. Three 9p shares carry the
//! build, the command and the caller's folder; three virtio console ports carry control, stdout
//! and stderr. The shares are mounted after the state is restored because a mounted 9p share
//! cannot be saved.

mod image;
mod mend;
mod qemu;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use self::image::{NodeImage, node_image};
pub use self::qemu::Machine;
use self::qemu::{Qemu, Start};
use crate::{build, cache, progress};

/// How long a node may take from power-on to ready, under software emulation on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// A node says every ten seconds that it is alive.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(120);

/// A node's usual shape.
const DEFAULT_MEMORY_MIB: u32 = 6144;
const DEFAULT_CPUS: u32 = 2;
const HOST_SCRIPT: &str = include_str!("host.sh");

/// What `cargo xtask node` was asked for.
#[derive(clap::Args, Clone, Debug)]
pub struct NodeArgs {
    /// A folder of this machine that appears read-write at /share
    #[arg(long, value_name = "DIR")]
    pub share: Option<PathBuf>,
    /// A folder with containerd, ctr and containerd-shim-runc-v2 to use instead of the node's own
    #[arg(long, value_name = "PATH-TO-BIN-DIR")]
    pub containerd: Option<PathBuf>,
    /// The node's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = DEFAULT_MEMORY_MIB)]
    pub memory: u32,
    /// The node's CPUs
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS)]
    pub cpus: u32,
    /// Run on the instruction clock: slower, but repeatable to about 2 %
    #[arg(long, conflicts_with = "host")]
    pub counted: bool,
    /// With the hierarchies of cgroup v1 instead of v2's
    #[arg(long, conflicts_with = "host")]
    pub cgroup_v1: bool,
    /// With two hardware threads in each core
    #[arg(long, conflicts_with_all = ["host", "counted"])]
    pub threads: bool,
    /// Run on this machine instead of in a virtual machine
    #[arg(long)]
    pub host: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

impl NodeArgs {
    /// A node of the usual shape with a shared folder.
    pub fn usual(share: &Path, command: Vec<String>) -> Self {
        Self {
            share: Some(share.to_owned()),
            containerd: None,
            memory: DEFAULT_MEMORY_MIB,
            cpus: DEFAULT_CPUS,
            counted: false,
            cgroup_v1: false,
            threads: false,
            host: false,
            command,
        }
    }
}

/// Runs a command on a node and returns its exit code.
pub fn run(args: &NodeArgs) -> Result<i32> {
    let built = build::all()?;
    if args.host && !nix::unistd::geteuid().is_root() {
        bail!("run on this machine: root is needed; run the command under sudo or leave out --host");
    }
    let image = node_image()?;
    let work = tempfile::Builder::new().prefix("caisson-node-").tempdir()?;
    let mut script = String::new();
    if let Some(bin) = &args.containerd {
        let bin = bin.canonicalize().with_context(|| format!("containerd folder {}", bin.display()))?;
        let copy = work.path().join("root/opt/containerd/given");
        copy_dir(&bin, &copy)?;
        script.push_str("ln -sfn /opt/containerd/given/* /usr/bin/ && /usr/lib/node/containerd.sh /opt/containerd/given || exit 125\n");
    }
    script.push_str(&shell_line(&args.command));
    std::fs::write(work.path().join("command"), script)?;
    let share = match &args.share {
        Some(dir) => dir.canonicalize().with_context(|| format!("--share {}", dir.display()))?,
        None => {
            let dir = work.path().join("share");
            std::fs::create_dir(&dir)?;
            dir
        }
    };
    let root = work.path().join("root");
    crate::install::into(&built, &root)?;
    if args.host {
        return run_on_host(&image, work.path(), &share);
    }
    let (counted, cgroup_v1, threads) = (args.counted, args.cgroup_v1, args.threads);
    let machine = Machine { cpus: args.cpus, memory_mib: args.memory, counted, cgroup_v1, threads };
    // The instruction clock does not go on from a state, and the other shapes are not wanted often enough for one.
    let state = if counted || cgroup_v1 || threads { None } else { Some(saved_state(&image, &machine)?) };
    let folders = Folders { caisson: &root, node: work.path(), share: &share };
    start_and_run(&image, &machine, state.as_deref(), &folders)
}

/// Makes the node's image and the saved state of its usual shape.
pub fn prepare() -> Result<()> {
    let machine = Machine { cpus: DEFAULT_CPUS, memory_mib: DEFAULT_MEMORY_MIB, counted: false, cgroup_v1: false, threads: false };
    saved_state(&node_image()?, &machine).map(drop)
}

/// The folders of this machine that a node sees.
struct Folders<'a> {
    caisson: &'a Path,
    node: &'a Path,
    share: &'a Path,
}

/// A state file of a node that waits for its command, made when there is none for this shape.
fn saved_state(image: &NodeImage, machine: &Machine) -> Result<PathBuf> {
    let shape = format!("{machine:?} {}", qemu::accelerator(machine));
    let key = cache::key([image.key.as_bytes(), shape.as_bytes(), include_bytes!("qemu.rs").as_slice()]);
    let dir = cache::entry("node-state", &key, |dir| {
        progress::step("booting a node to save its state (once for each shape, about 30 s)", || {
            let empty = tempfile::tempdir()?;
            let folders = Folders { caisson: empty.path(), node: empty.path(), share: empty.path() };
            let mut qemu = Qemu::start(image, machine, &Start::Boot, folders.caisson, folders.node, folders.share)?;
            let mut control = Control::connect(&qemu, BOOT_TIMEOUT)?;
            control.expect_ready(&qemu)?;
            qemu.save(&dir.join("state"))
        })
    })?;
    Ok(dir.join("state"))
}

fn start_and_run(image: &NodeImage, machine: &Machine, state: Option<&Path>, folders: &Folders<'_>) -> Result<i32> {
    let start = match state {
        Some(state) => Start::Restore(state.to_owned()),
        None => Start::Boot,
    };
    let mut qemu = Qemu::start(image, machine, &start, folders.caisson, folders.node, folders.share)?;
    let out = pump(qemu.connect("out", BOOT_TIMEOUT)?, std::io::stdout());
    let err = pump(qemu.connect("err", BOOT_TIMEOUT)?, std::io::stderr());
    let mut control = Control::connect(&qemu, BOOT_TIMEOUT)?;
    if state.is_none() {
        control.expect_ready(&qemu)?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    control.send(&format!("GO {}.{:03}", now.as_secs(), now.subsec_millis()))?;
    // The instruction clock has seconds of its own.
    let verdict = control.verdict((!machine.counted).then_some(ALIVE_TIMEOUT))?;
    let code = match verdict.split_once(' ') {
        Some(("EXIT", code)) => code.trim().parse().context("read the command's exit code")?,
        _ => {
            // The console's last lines arrive with the power-off.
            qemu.has_ended(Duration::from_secs(5));
            bail!("node ended without an exit code ({}); its console:\n{}", verdict.trim(), qemu.console_tail())
        }
    };
    qemu.wait(Duration::from_secs(20))?;
    for pump in [out, err] {
        pump.join().map_err(|_| anyhow::anyhow!("copy the node's output"))??;
    }
    Ok(code)
}

/// The node's control port: lines both ways.
struct Control {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Control {
    fn connect(qemu: &Qemu, timeout: Duration) -> Result<Self> {
        let stream = qemu.connect("control", timeout)?;
        Ok(Self { writer: stream.try_clone()?, reader: BufReader::new(stream) })
    }

    fn expect_ready(&mut self, qemu: &Qemu) -> Result<()> {
        let line = self.line(Some(BOOT_TIMEOUT)).with_context(|| format!("wait for the node; its console:\n{}", qemu.console_tail()))?;
        if line.trim() != "READY" {
            bail!("start a node: {}; its console:\n{}", line.trim(), qemu.console_tail());
        }
        Ok(())
    }

    fn line(&mut self, timeout: Option<Duration>) -> Result<String> {
        self.writer.set_read_timeout(timeout)?;
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line)
    }

    /// What the node says when its command has ended.
    fn verdict(&mut self, timeout: Option<Duration>) -> Result<String> {
        loop {
            let line = self.line(timeout).context("the node has died: it says nothing any more")?;
            if line.trim() != "ALIVE" {
                return Ok(line);
            }
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.writer, "{line}").context("send the command to the node")
    }
}

/// Copies a port to `target` as it comes.
fn pump(mut from: UnixStream, mut target: impl Write + Send + 'static) -> std::thread::JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            target.write_all(&buffer[..n])?;
            target.flush()?;
        }
    })
}

/// The command as one line of shell, each word quoted.
fn shell_line(words: &[String]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect();
    quoted.join(" ") + "\n"
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Runs the command in `work` on this machine's own kernel (see `host.sh`).
fn run_on_host(image: &NodeImage, work: &Path, share: &Path) -> Result<i32> {
    let script = work.join("host.sh");
    std::fs::write(&script, HOST_SCRIPT)?;
    let status = std::process::Command::new("bash").arg(&script).args([&image.tree(), work, share]).status();
    Ok(status.context("run bash")?.code().unwrap_or(1))
}

/// Waits until `ready` yields something, at most `timeout`.
fn poll_until<T>(timeout: Duration, what: &str, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if start.elapsed() > timeout {
            bail!("{what}: nothing after {} s", timeout.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
