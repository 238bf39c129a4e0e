//! What `deploy/` gives to an administrator is what containerd understands.

use crate::Test;
use crate::ctr::run;

pub const TESTS: &[Test] = &[("containerds_take_the_deployed_configuration", containerds_take_the_deployed_configuration)];

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
