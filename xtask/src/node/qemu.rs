//! One QEMU process that is a node.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::image::{NodeImage, tree_command};
use super::poll_until;

/// The shape of a node.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Run on the instruction clock.
    pub counted: bool,
    /// The hierarchies of cgroup v1 instead of v2's.
    pub cgroup_v1: bool,
    /// Two hardware threads in each core.
    pub threads: bool,
}

/// How a node comes up.
pub enum Start {
    /// From power-on.
    Boot,
    /// From a state file.
    Restore(PathBuf),
}

/// The accelerator and CPU options: the host's KVM where it can nest, else emulation with SVM.
pub fn accelerator(machine: &Machine) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let nested = ["kvm_amd", "kvm_intel"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    });
    let hardware = cpu.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
    let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if machine.counted {
        "-accel tcg,thread=single,tb-size=512 -icount shift=1,sleep=off -rtc base=2026-01-01,clock=vm -cpu EPYC-Rome,+svm,-xsaves".into()
    } else if hardware && nested && usable {
        "-accel kvm -cpu host".into()
    } else {
        "-accel tcg,thread=multi,tb-size=512 -cpu EPYC-Rome,+svm,-xsaves".into()
    }
}

/// A running node; killed when dropped.
pub struct Qemu {
    child: Child,
    sockets: tempfile::TempDir,
}

impl Qemu {
    /// Starts QEMU out of the node's own tree.
    pub fn start(image: &NodeImage, machine: &Machine, start: &Start, caisson: &Path, node: &Path, share: &Path) -> Result<Self> {
        let sockets = tempfile::Builder::new().prefix("caisson-qemu-").tempdir()?;
        let tree = image.tree();
        let inner = tree_command(&tree, "usr/bin/qemu-system-x86_64", &[]);
        // The node dies with this process, however that dies.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(inner.get_program()).args(inner.get_args());
        command.args(["-M", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(accelerator(machine).split(' '));
        let cpus = if machine.counted { 1 } else { machine.cpus };
        let threads = if machine.threads { ",threads=2" } else { "" };
        command.args(["-smp", &format!("{cpus}{threads}"), "-m", &machine.memory_mib.to_string()]);
        command.arg("-L").arg(tree.join("usr/share/seabios")).arg("-L").arg(tree.join("usr/share/qemu"));
        command.arg("-kernel").arg(image.kernel()).arg("-initrd").arg(image.initramfs());
        let cgroups = if machine.cgroup_v1 { "v1" } else { "v2" };
        let line = format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on tsc=reliable clocksource=tsc node.cgroup={cgroups}");
        command.args(["-append", &line]);
        command.arg("-drive").arg(format!("file={},if=none,id=root,format=raw,readonly=on,cache=unsafe", image.disk().display()));
        command.args([
            "-device",
            "virtio-blk-pci,drive=root",
            "-object",
            "rng-random,id=rng,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng",
        ]);
        command.arg("-serial").arg(format!("file:{}", sockets.path().join("console").display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", sockets.path().join("qmp").display()));
        command.args(["-device", "virtio-serial-pci"]);
        for name in ["control", "out", "err"] {
            command.arg("-chardev").arg(format!("socket,id={name},path={},server=on,wait=off", sockets.path().join(name).display()));
            command.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
        }
        for (tag, dir) in [("caisson", caisson), ("node", node), ("share", share)] {
            command.arg("-fsdev").arg(format!("local,id={tag},path={},security_model=none,multidevs=remap", dir.display()));
            command.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        if let Start::Restore(state) = start {
            command.arg("-incoming").arg(format!("file:{}", state.display()));
        }
        let log = std::fs::File::create(sockets.path().join("qemu.log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start QEMU (setpriv is needed, of package util-linux)")?;
        Ok(Self { child, sockets })
    }

    /// Connects to one of the node's ports.
    pub fn connect(&self, name: &str, timeout: Duration) -> Result<UnixStream> {
        let path = self.sockets.path().join(name);
        poll_until(timeout, "connect to QEMU", || match UnixStream::connect(&path) {
            Ok(stream) => Ok(Some(stream)),
            Err(_) if self.gone() => {
                bail!("QEMU ended: {}", std::fs::read_to_string(self.sockets.path().join("qemu.log")).unwrap_or_default().trim())
            }
            Err(_) => Ok(None),
        })
    }

    fn gone(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.is_empty() || stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    /// The end of the node's console, for an error's text.
    pub fn console_tail(&self) -> String {
        let text = std::fs::read(self.sockets.path().join("console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let log = std::fs::read_to_string(self.sockets.path().join("qemu.log")).unwrap_or_default();
        let warnings = |line: &&str| !line.contains("TCG doesn't support requested feature");
        let lines: Vec<&str> = text.lines().chain(log.lines().filter(warnings)).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Saves the machine's state to a file and ends it.
    pub fn save(&mut self, file: &Path) -> Result<()> {
        let stream = self.connect("qmp", Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut qmp = Qmp { reader: BufReader::new(stream.try_clone()?), writer: stream };
        qmp.next()?;
        qmp.call(r#"{"execute":"qmp_capabilities"}"#)?;
        qmp.call(r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":8589934592}}"#)?;
        qmp.call(&serde_json::json!({"execute": "migrate", "arguments": {"uri": format!("file:{}", file.display())}}).to_string())?;
        poll_until(Duration::from_secs(120), "save the node's state", || {
            let info = qmp.call(r#"{"execute":"query-migrate"}"#)?;
            match info["return"]["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed") => bail!("save the node's state: {info}"),
                _ => Ok(None),
            }
        })?;
        qmp.call(r#"{"execute":"quit"}"#)?;
        self.child.wait()?;
        Ok(())
    }

    /// Whether the node has powered off, or does so within `timeout`.
    pub fn has_ended(&mut self, timeout: Duration) -> bool {
        poll_until(timeout, "wait for the node to power off", || Ok(self.child.try_wait()?)).is_ok()
    }

    /// Waits for the node to power off; it is killed when that takes longer than `timeout`.
    pub fn wait(mut self, timeout: Duration) -> Result<()> {
        poll_until(timeout, "wait for the node to power off", || Ok(self.child.try_wait()?))?;
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when the process is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    fn next(&mut self) -> Result<serde_json::Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("read from QEMU's monitor")?;
        serde_json::from_str(&line).with_context(|| format!("parse QEMU's answer {line:?}"))
    }

    fn call(&mut self, request: &str) -> Result<serde_json::Value> {
        writeln!(self.writer, "{request}")?;
        loop {
            let answer = self.next()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU's monitor refused {request}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer);
            }
        }
    }
}
