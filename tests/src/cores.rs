//! Pods on a node whose cores have two threads, which is a node of its own (`cargo xtask node --threads`).

use std::collections::BTreeSet;

use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use crate::Test;
use crate::ctr::{Pod, run, run_pod, shell};
use crate::faults::Config;
use crate::host::shim_log;

pub const TESTS: &[Test] = &[(
    "two_threads_a_core_run_one_tenants_guests_at_a_time_or_are_said_to_be_shared",
    two_threads_a_core_run_one_tenants_guests_at_a_time_or_are_said_to_be_shared,
)];

/// Whether this node has them.
pub fn have_threads() -> bool {
    std::fs::read_to_string("/sys/devices/system/cpu/smt/active").is_ok_and(|active| active.trim() == "1")
}

/// What all threads of a pod's monitor have in common; 0 for who runs beside anybody.
fn cookie(pod: &Pod) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", pod.host_pid("vmm"))).unwrap();
    let ids = threads.map(|thread| thread.unwrap().file_name().to_string_lossy().parse().unwrap());
    let of = |id| core_scheduling_cookie(Pid::from_raw(id).unwrap(), CoreSchedulingScope::Thread).unwrap();
    let cookies: BTreeSet<u64> = ids.map(of).collect();
    assert_eq!(cookies.len(), 1, "{cookies:?}");
    cookies.into_iter().next().unwrap()
}

/// A pod that the configuration has belong to a tenant.
fn of(tenant: &str, name: &str) -> Pod {
    let _config = Config::set(&format!("[tenant]\nname = \"{tenant}\"\n"));
    let file = format!("/etc/caisson/tenants/{tenant}.toml");
    shell(&format!("mkdir -p /etc/caisson/tenants; touch {file}"));
    let pod = Pod::start(name, &[], "sleep 1000");
    shell("rm -r /etc/caisson/tenants");
    pod
}

/// What `caisson check --security` says of the cores of each monitor.
fn said() -> Vec<(String, String)> {
    let lines = run("caisson", &["check", "--security", "--json"]).stdout;
    let findings = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap().to_owned();
    findings.filter(|finding| finding["check"] == "cores").map(|finding| (text(&finding, "verdict"), text(&finding, "found"))).collect()
}

/// Whether the node's kernel has core scheduling; Debian's has not (CONFIG_SCHED_CORE).
fn kernel_has_it() -> bool {
    std::fs::read_to_string("/proc/kallsyms").unwrap().contains(" sched_core_share_pid")
}

fn two_threads_a_core_run_one_tenants_guests_at_a_time_or_are_said_to_be_shared() {
    if kernel_has_it() { cores_are_parted() } else { cores_are_said_to_be_shared() }
}

fn cores_are_said_to_be_shared() {
    let (_anybodys, _acmes) = (Pod::start("anybodys", &[], "sleep 1000"), of("acme", "acmes"));
    assert!(shim_log().contains("the host's kernel has no core scheduling"), "{}", shim_log());
    let said = said();
    let verdicts: Vec<&str> = said.iter().map(|(verdict, _)| verdict.as_str()).collect();
    assert_eq!(verdicts, ["wrong", "weak"], "{said:?}");
    assert!(said.iter().all(|(_, found)| found.contains("the host's kernel has no core scheduling")), "{said:?}");
    let _config = Config::set("[vm]\ncore_scheduling = \"pod\"\n");
    let refused = run_pod(&[], &["true"]);
    assert!(refused.code != 0 && refused.stderr.contains("vm.core_scheduling"), "{refused:?}");
}

fn cores_are_parted() {
    {
        let anybodys = Pod::start("anybodys", &[], "sleep 1000");
        assert_eq!(cookie(&anybodys), 0);
        let said = said();
        assert!(said.len() == 1 && said[0].0 == "weak" && said[0].1.contains("set vm.core_scheduling"), "{said:?}");
    }
    let (first, stranger) = (of("acme", "first"), of("umbra", "stranger"));
    let second = of("acme", "second");
    let acme = cookie(&first);
    assert!(acme != 0 && cookie(&second) == acme, "{acme:#x} {:#x}", cookie(&second));
    assert!(![0, acme].contains(&cookie(&stranger)), "{acme:#x} {:#x}", cookie(&stranger));
    // It is handed on from any that lives.
    drop(first);
    let third = of("acme", "third");
    assert_eq!(cookie(&third), acme);
    let own = {
        let _config = Config::set("[vm]\ncore_scheduling = \"pod\"\n[tenant]\nname = \"acme\"\n");
        Pod::start("own", &[], "sleep 1000")
    };
    assert!(![0, acme, cookie(&stranger)].contains(&cookie(&own)));
    assert!(said().iter().all(|(verdict, _)| verdict == "ok"), "{:?}", said());
    // The guests run.
    assert_eq!(third.exec(&[], &["echo", "runs"]).stdout, "runs\n");
}
