//! A containerd beside the node's own: another version, other settings.

use std::path::Path;

use crate::ctr::{Output, run};

/// It ends with the value, and what it kept is gone.
pub struct Containerd {
    bin: String,
    folder: String,
}

impl Containerd {
    /// Starts one of a version, with settings besides those of where it keeps its state: it reads no
    /// other version's database. `prepare` are shell commands that run in its folder before.
    pub fn start(version: &str, settings: &str, prepare: &str) -> Self {
        let bin = format!("/opt/containerd/{version}/bin");
        assert!(Path::new(&bin).join("containerd").exists(), "the node has no containerd {version}");
        let folder = format!("/tmp/c{version}");
        std::fs::create_dir_all(&folder).unwrap();
        let mounted = run("mount", &["-t", "tmpfs", "containerd", &folder]);
        assert_eq!(mounted.code, 0, "{mounted:?}");
        let containerd = Self { bin, folder };
        let Self { bin, folder } = &containerd;
        let config = format!(
            "version = 2\nroot = \"{folder}/root\"\nstate = \"{folder}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{folder}/sock\"\n{settings}"
        );
        std::fs::write(format!("{folder}/config.toml"), config).unwrap();
        let script = format!(
            "set -e; cd {folder}; {prepare}\n\
             PATH={bin}:$PATH setsid {bin}/containerd --config {folder}/config.toml > {folder}/log 2>&1 &\n\
             n=0; until {bin}/ctr -a {folder}/sock version > /dev/null 2>&1; do sleep 0.2; n=$((n+1)); [ $n -lt 200 ]; done"
        );
        let started = run("bash", &["-c", &script]);
        assert_eq!(started.code, 0, "containerd {version}: {started:?}");
        containerd
    }

    /// Its `ctr ARGUMENTS`.
    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let address = format!("{}/sock", self.folder);
        run(&format!("{}/ctr", self.bin), &[&["-a", &address], arguments].concat())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let folder = &self.folder;
        run("bash", &["-c", &format!("pkill -f 'config {folder}/config.toml'; sleep 1; umount -l {folder}; rmdir {folder}")]);
    }
}

/// A containerd beside the node's own with its CRI; that of containerd 2 has a handler with `sandboxer = "shim"`. One at a time.
pub struct CriContainerd;

impl CriContainerd {
    /// Of its gRPC services.
    pub const SOCKET: &str = "/tmp/c2s/sock";

    /// Starts one of a version, with the node's configuration.
    pub fn start(version: &str) -> Self {
        Self::start_with(version, "")
    }

    /// Starts one that has more handlers, as tables of its configuration.
    pub fn start_with(version: &str, handlers: &str) -> Self {
        std::fs::write("/tmp/handlers.toml", handlers).unwrap();
        let script = "set -e; mkdir -p /tmp/c2s; mount -t tmpfs t /tmp/c2s; cd /tmp/c2s; \
            (echo 'root = \"/tmp/c2s/root\"'; echo 'state = \"/tmp/c2s/state\"'; cat /etc/containerd/config.toml; \
            printf '[grpc]\\n  address = \"/tmp/c2s/sock\"\\n'; cat /tmp/handlers.toml) > config.toml; \
            PATH=$bin:$PATH setsid $bin/containerd --config config.toml > log 2>&1 & \
            cd /tmp/c2s; ctr=\"$bin/ctr -a /tmp/c2s/sock -n k8s.io\"; \
            n=0; until $ctr version > /dev/null 2>&1; do sleep 0.2; n=$((n+1)); [ $n -lt 300 ]; done; \
            $ctr images import /usr/lib/node/busybox.tar > /dev/null";
        let started = run("bash", &["-c", &format!("bin=/opt/containerd/{version}/bin; {script}")]);
        assert_eq!(started.code, 0, "containerd {version}: {started:?}");
        Self
    }
}

impl Drop for CriContainerd {
    fn drop(&mut self) {
        run("bash", &["-c", "pkill -f '[c]onfig config.toml'; sleep 1; umount -l /tmp/c2s; rm -f /tmp/handlers.toml"]);
    }
}
