//! `cargo xtask demo`: a command in a container in a virtual machine, through containerd.

use anyhow::Result;

use crate::node::{self, NodeArgs};

/// What runs when no command is named.
const DEFAULT: &[&str] = &["sh", "-c", "echo Hello from a container in a virtual machine of its own."];

/// Runs the demo on the node; returns the container's exit code.
///
/// The node's script notes when `ctr` starts and when the first byte of output arrives.
const SCRIPT: &str = r#"
start=$(date +%s%N)
ctr run --rm --runtime io.containerd.caisson.v2 docker.io/library/busybox:latest demo "$@" > >(
	IFS= read -r -d '' -n 1 first && { date +%s%N >/tmp/first; if [ -z "$first" ]; then printf '\n'; else printf '%s' "$first"; fi; }
	cat
)
code=$?
wait
end=$(cat /tmp/first 2>/dev/null || date +%s%N)
guest=$(ctr run --rm --runtime io.containerd.caisson.v2 docker.io/library/busybox:latest demo-kernel uname -r)
echo "guest kernel: $guest"
echo "host kernel: $(uname -r)"
echo "time from ctr run to first output: $(( (end - start) / 1000000 )) ms"
exit $code
"#;

/// Runs `command` (or a greeting) and returns its exit code.
pub fn run(command: &[String]) -> Result<i32> {
    let share = tempfile::tempdir()?;
    let mut line: Vec<String> = ["bash", "-c", SCRIPT, "demo"].map(str::to_owned).to_vec();
    if command.is_empty() {
        line.extend(DEFAULT.iter().map(|word| (*word).to_owned()));
    } else {
        line.extend_from_slice(command);
    }
    node::run(&NodeArgs::usual(share.path(), line))
}
