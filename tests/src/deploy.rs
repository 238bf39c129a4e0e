//! What `deploy/` gives to an administrator is what containerd understands.

use crate::Test;
use crate::cri;
use crate::ctr::{self, Output, run, shell};
use crate::faults;

pub const TESTS: &[Test] = &[
    ("containerds_take_the_deployed_configuration", containerds_take_the_deployed_configuration),
    ("the_installer_adds_the_handler_once", the_installer_adds_the_handler_once),
    ("the_installer_leaves_what_it_does_not_understand", the_installer_leaves_what_it_does_not_understand),
];

pub const ALONE: &[Test] = &[(
    "an_upgrade_leaves_running_pods_alone_and_a_removal_waits_for_them",
    an_upgrade_leaves_running_pods_alone_and_a_removal_waits_for_them,
)];

const INSTALLER: &str = include_str!("../../deploy/install.sh");
/// Caisson as the node got it.
const FILES: &str = "/caisson";

const VERSION_1: &str = include_str!("../../deploy/containerd-1.toml");
const VERSION_2: &str = include_str!("../../deploy/containerd-2.toml");

fn containerds_take_the_deployed_configuration() {
    for (version, text) in [("1.6", VERSION_1), ("1.7", VERSION_1), ("2", VERSION_2)] {
        let file = format!("/tmp/deploy-{version}.toml");
        std::fs::write(&file, text).unwrap();
        let dump = run(&format!("/opt/containerd/{version}/bin/containerd"), &["--config", &file, "config", "dump"]);
        assert_eq!(dump.code, 0, "containerd {version}: {dump:?}");
        let settings: Vec<String> = dump.stdout.lines().map(|line| line.trim().replace('\'', "\"")).collect();
        let start = settings.iter().position(|line| line.ends_with(".runtimes.caisson]"));
        let start = start.unwrap_or_else(|| panic!("containerd {version} has no runtime caisson: {dump:?}"));
        let handler = &settings[start..settings.len().min(start + 20)];
        for setting in [
            "runtime_type = \"io.containerd.caisson.v2\"",
            "pod_annotations = [\"io.caisson.*\"]",
            "privileged_without_host_devices = true",
        ] {
            assert!(handler.iter().any(|line| line == setting), "containerd {version}: {setting} is not in {handler:?}");
        }
    }
}

/// Runs the installer on this node, with a containerd of a version and a configuration of our own.
fn installer(containerd: &str, config: &str, restart: &str, word: &str) -> Output {
    std::fs::write("/tmp/install.sh", INSTALLER).unwrap();
    let settings = format!("FILES={FILES} HOST=/ CONTAINERD_CONFIG={config} RESTART='{restart}'");
    run("bash", &["-c", &format!("PATH=/opt/containerd/{containerd}/bin:$PATH {settings} sh /tmp/install.sh {word}")])
}

fn the_installer_adds_the_handler_once() {
    let (config, restart) = ("/tmp/installed/config.toml", "/tmp/installed/restart");
    // None, as packages leave it, and two that an administrator has written.
    for (containerd, before, plugin) in [
        ("1.6", None, "io.containerd.grpc.v1.cri"),
        ("2", None, "io.containerd.cri.v1.runtime"),
        ("1.7", Some("version = 2\n[grpc]\n  max_recv_message_size = 33554432\n"), "io.containerd.grpc.v1.cri"),
        ("2", Some("# mine\nversion = 3\nroot = \"/var/lib/containerd\"\n"), "io.containerd.cri.v1.runtime"),
    ] {
        shell(&format!("rm -rf /tmp/installed; mkdir /tmp/installed; echo 'echo once >>/tmp/installed/restarts' >{restart}"));
        if let Some(text) = before {
            std::fs::write(config, text).unwrap();
        }
        for _ in 0..2 {
            let output = installer(containerd, config, &format!("sh {restart}"), "install");
            assert_eq!(output.code, 0, "containerd {containerd}: {output:?}");
        }
        assert_eq!(std::fs::read_to_string("/tmp/installed/restarts").unwrap(), "once\n", "containerd {containerd}");
        let dump = run(&format!("/opt/containerd/{containerd}/bin/containerd"), &["--config", config, "config", "dump"]);
        let table = format!("{plugin}.containerd.runtimes.caisson]");
        assert!(dump.stdout.replace(['\'', '"'], "").contains(&table), "containerd {containerd}: {dump:?}");
        let text = std::fs::read_to_string(config).unwrap();
        assert!(before.is_none_or(|before| text.starts_with(before)), "{text}");
    }
    shell("rm -rf /tmp/installed /tmp/install.sh");
}

fn the_installer_leaves_what_it_does_not_understand() {
    let config = "/tmp/foreign.toml";
    for (text, says) in [
        ("[grpc]\n  address = \"/run/x.sock\"\n", "is of version 1; bring it to version 2 or 3"),
        ("version = 2\n[plugins\n", "containerd would not take the changed /tmp/foreign.toml, which stays as it was"),
    ] {
        std::fs::write(config, text).unwrap();
        let output = installer("2", config, "false", "install");
        assert!(output.code == 1 && output.stderr.contains(says), "{output:?}");
        assert_eq!(std::fs::read_to_string(config).unwrap(), text);
    }
    shell(&format!("rm {config} /tmp/install.sh"));
}

const CONFIG: &str = "/etc/containerd/config.toml";
const RESTART: &str = "/usr/lib/node/containerd.sh";

/// The node as it was, which comes back however a test ends.
struct Whole {
    config: String,
}

impl Drop for Whole {
    fn drop(&mut self) {
        std::fs::write(CONFIG, &self.config).unwrap();
        let restored = run("sh", &["-c", &format!("rm -rf /tmp/bare /tmp/install.sh; cp -a {FILES}/. / && {RESTART}")]);
        assert!(restored.code == 0 || std::thread::panicking(), "{restored:?}");
        // The first pod of a host makes the folders that all share, which the removal took.
        ctr::run_pod(&[], &["true"]);
    }
}

fn an_upgrade_leaves_running_pods_alone_and_a_removal_waits_for_them() {
    let whole = Whole { config: std::fs::read_to_string(CONFIG).unwrap() };
    // What the node has of Caisson in its configuration is at the end.
    let end = whole.config.find("    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.caisson]").unwrap();
    std::fs::write(CONFIG, &whole.config[..end]).unwrap();
    let settings = faults::Config::set("[vm]\nmemory_mib = 192\n");
    // An older release, which the pod runs with.
    shell("echo old >> /usr/libexec/caisson/caisson-vmm");
    let pod = ctr::Pod::start("upgraded", &[], "sleep 1000");
    let output = installer("2", CONFIG, RESTART, "install");
    assert!(output.code == 0 && output.stdout.contains("installed /usr/libexec/caisson/caisson-vmm"), "{output:?}");
    assert_eq!(pod.exec(&[], &["echo", "still here"]).stdout, "still here\n");
    drop(cri::Pod::start(|_| ()));

    let output = installer("2", CONFIG, RESTART, "remove");
    assert!(output.code == 1 && output.stderr.contains("1 pods still run with Caisson"), "{output:?}");
    drop(pod);
    let output = installer("2", CONFIG, RESTART, "remove");
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(std::fs::read_to_string(CONFIG).unwrap(), whole.config[..end]);
    // Nothing is left but the administrator's own settings.
    let left = "find / -xdev -name '*caisson*' -not -path '/proc/*' -not -path '/caisson*' -not -path '/tmp/*' -print -prune | head";
    assert_eq!(shell(left), "/etc/caisson");
    drop(settings);

    // A machine that had no configuration has none again.
    shell(&format!("mkdir /tmp/bare; cp -a {FILES}/. /"));
    for word in ["install", "remove"] {
        let output = installer("2", "/tmp/bare/config.toml", "true", word);
        assert_eq!(output.code, 0, "{output:?}");
    }
    shell("rmdir /tmp/bare");
}
