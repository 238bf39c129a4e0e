//! What attacks Caisson from inside: a guest kernel that does nothing but harm, a monitor that was taken over, an agent that
//! lies. Each attack ends in a refusal or in the pod's end, with one sentence that says why; a neighbour lives on, and
//! nothing stays.
//!
//! * `guest.rs` is the kernel: a few instructions that do what a table says. `attacks.rs` has the tables.
//! * `peers.rs` is the monitor: this program itself, started by the shim in the place of the real one.
//! * `agent/examples/hostile-agent.rs` is the agent, in an initramfs of its own.

mod attacks;
mod guest;
pub mod peers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Test;
use crate::ctr::{Pod, run_pod, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left};

pub const ALONE: &[Test] = &[
    ("a_guest_kernel_that_attacks_its_devices_harms_nobody_else", a_guest_kernel_that_attacks_its_devices_harms_nobody_else),
    ("a_monitor_that_was_taken_over_harms_nobody_else", a_monitor_that_was_taken_over_harms_nobody_else),
    ("an_agent_that_lies_harms_nobody_else", an_agent_that_lies_harms_nobody_else),
];

/// What any of a pod's processes may hold of their own memory, whatever its guest does, in KiB.
const MOST_MEMORY: u64 = 64 << 10;
/// Longer than any attack takes under emulation.
const MOST_TIME: Duration = Duration::from_secs(120);

fn a_guest_kernel_that_attacks_its_devices_harms_nobody_else() {
    let neighbour = Pod::start("neighbour", &[], "sleep 1000");
    let before = Inventory::take();
    let kernel = "/tmp/hostile-kernel";
    for attack in attacks::all() {
        std::fs::write(kernel, attack.program.kernel()).unwrap();
        let _settings = Config::set(&format!("[kernel]\npath = \"{kernel}\"\n[timeouts]\nboot_ms = {}\n", attack.boot_ms));
        let (said, memory) = watched(attack.name, || run_pod(&[], &["true"]).stderr);
        assert!(attack.ends.iter().any(|end| said.contains(end)), "{}: {said}", attack.name);
        assert!(memory < MOST_MEMORY, "{}: {memory} KiB", attack.name);
        assert_eq!(neighbour.exec(&[], &["echo", "alive"]).stdout, "alive\n", "{}", attack.name);
        assert_nothing_left(&before);
    }
    std::fs::remove_file(kernel).unwrap();
}

fn a_monitor_that_was_taken_over_harms_nobody_else() {
    let neighbour = Pod::start("neighbour", &[], "sleep 1000");
    let before = Inventory::take();
    let program = "/tmp/hostile-monitor";
    std::fs::copy("/proc/self/exe", program).unwrap();
    for (attack, ends) in peers::MONITORS {
        std::fs::write(peers::ATTACK, attack).unwrap();
        let _settings = Config::set(&format!("[vmm]\npath = \"{program}\"\n[timeouts]\nboot_ms = 5000\n"));
        let (said, memory) = watched(attack, || run_pod(&[], &["true"]).stderr);
        assert!(ends.iter().any(|end| said.contains(end)), "{attack}: {said}");
        assert!(memory < MOST_MEMORY, "{attack}: {memory} KiB");
        assert_eq!(neighbour.exec(&[], &["echo", "alive"]).stdout, "alive\n", "{attack}");
        assert_nothing_left(&before);
    }
    shell(&format!("rm {program} {}", peers::ATTACK));
}

/// Attacks of the agent by their names, and what the caller of the pod may read of each.
const AGENTS: &[(&str, &[&str])] = &[
    ("silence", &["waiting for the agent, which connected but did not answer"]),
    ("garbage", &["the guest's agent does not keep to the protocol: it sent a frame of 2779096485 bytes, over the limit"]),
    ("a long frame", &["does not keep to the protocol: it sent a frame of 4294967295 bytes, over the limit"]),
    ("answers that are none", &["does not keep to the protocol: its answer cannot be read"]),
    ("data", &["does not keep to the protocol: it sent a frame of kind 3, which is no answer"]),
    ("another version", &["the agent in the initramfs is version 9 [2J xxx"]),
    ("long words", &["one line [2J of many xxx"]),
    ("a flood", &["does not keep to the protocol: it answered call 1000001, which was not made"]),
    ("lies", &[""]),
];

fn an_agent_that_lies_harms_nobody_else() {
    let neighbour = Pod::start("neighbour", &[], "sleep 1000");
    let before = Inventory::take();
    for (attack, ends) in AGENTS {
        let _settings = Config::set(&format!(
            "[image]\ninitramfs = \"/share/hostile-initramfs\"\n[kernel]\nargs = 'hostile=\"{attack}\"'\n\
             [timeouts]\nboot_ms = 8000\nagent_ms = 5000\nhealth_interval_ms = 2000\ndrain_ms = 2000\n"
        ));
        let (output, memory) = watched(attack, || run_pod(&[], &["true"]));
        assert!(output.code != 0 && ends.iter().any(|end| output.stderr.contains(end)), "{attack}: {output:?}");
        assert!(output.stderr.len() < 8192, "{attack}: {output:?}");
        assert!(memory < MOST_MEMORY, "{attack}: {memory} KiB");
        assert_eq!(neighbour.exec(&[], &["echo", "alive"]).stdout, "alive\n", "{attack}");
        assert_nothing_left(&before);
    }
}

/// What comes of `attack`, and the most of its own memory that any process of any pod held meanwhile, in KiB.
fn watched<T>(name: &str, attack: impl FnOnce() -> T) -> (T, u64) {
    let (done, most, begin) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                most.fetch_max(own_memory(), Ordering::AcqRel);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let result = attack();
        done.store(true, Ordering::Release);
        result
    });
    assert!(begin.elapsed() < MOST_TIME, "{name} took {:?}", begin.elapsed());
    (result, most.into_inner())
}

/// The most memory of its own that a process of a pod has, in KiB.
fn own_memory() -> u64 {
    let of = |process: std::fs::DirEntry| {
        let name = std::fs::read_to_string(process.path().join("comm")).ok()?;
        let ours = ["containerd-shim", "caisson"].iter().any(|part| name.contains(part));
        let status = ours.then(|| std::fs::read_to_string(process.path().join("status")).ok())??;
        status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(of).max().unwrap_or(0)
}
