//! What stays behind on the host: nothing.

use std::process::Command;

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr, id, run_pod};
use crate::host::{Inventory, assert_nothing_left, number};

pub const TESTS: &[Test] = &[
    ("pods_at_once_work_and_leave_nothing", pods_at_once_work_and_leave_nothing),
    ("pods_one_after_another_leave_nothing", pods_one_after_another_leave_nothing),
    ("a_detached_pod_with_execs_leaves_nothing", a_detached_pod_with_execs_leaves_nothing),
];

/// Twenty with `CAISSON_TEST_AT_ONCE=20`.
fn pods_at_once_work_and_leave_nothing() {
    // Emulated machines that boot together take long.
    let _config = crate::faults::Config::set("[timeouts]\nboot_ms = 600000\nagent_ms = 300000\n");
    let before = Inventory::take();
    let children: Vec<_> = (0..number("CAISSON_TEST_AT_ONCE", 2))
        .map(|number| {
            let id = id("many");
            let child = Command::new("ctr")
                .args(["run", "--rm", "--runtime", RUNTIME, IMAGE, &id, "sh", "-c", &format!("exit {number}")])
                .spawn()
                .unwrap();
            (number, child)
        })
        .collect();
    for (number, mut child) in children {
        assert_eq!(child.wait().unwrap().code(), Some(number));
    }
    assert_nothing_left(&before);
}

/// Two hundred with `CAISSON_TEST_PODS=200`.
fn pods_one_after_another_leave_nothing() {
    let count = number("CAISSON_TEST_PODS", 5);
    let before = Inventory::take();
    for _ in 0..count {
        let output = run_pod(&[], &["true"]);
        assert_eq!(output.code, 0, "{output:?}");
    }
    assert_nothing_left(&before);
}

fn a_detached_pod_with_execs_leaves_nothing() {
    let before = Inventory::take();
    {
        let pod = Pod::start("leak", &[], "sleep 1000");
        for _ in 0..5 {
            assert_eq!(pod.exec(&[], &["true"]).code, 0);
        }
        ctr(&["task", "kill", "--signal", "SIGKILL", &pod.id]);
        pod.wait_for("STOPPED");
        assert_eq!(pod.delete(), 137);
    }
    assert_nothing_left(&before);
}
