//! What containerd's subscribers hear of a pod.

use std::fs::File;
use std::process::{Child, Command};

use crate::Test;
use crate::ctr::{Pod, ctr, ctr_ok, id};
use crate::host::eventually;

pub const TESTS: &[Test] = &[("every_event_of_a_task_is_told_in_order", every_event_of_a_task_is_told_in_order)];

/// What containerd tells its subscribers meanwhile.
pub struct Events {
    child: Child,
    file: String,
}

impl Events {
    /// Returns once it is subscribed.
    pub fn listen() -> Self {
        let file = format!("/tmp/{}", id("events"));
        let child = Command::new("ctr").arg("events").stdout(File::create(&file).unwrap()).spawn().unwrap();
        let events = Self { child, file };
        // It is subscribed once something that happens is heard.
        let namespace = id("heard");
        eventually(
            || {
                ctr(&["namespaces", "create", &namespace]);
                ctr(&["namespaces", "remove", &namespace]);
                !events.so_far().is_empty()
            },
            "ctr hears of nothing",
        );
        events
    }

    /// A line for each, with its topic and what it says as JSON.
    pub fn so_far(&self) -> String {
        std::fs::read_to_string(&self.file).unwrap()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

fn every_event_of_a_task_is_told_in_order() {
    let events = Events::listen();
    let pod = Pod::start("told", &[], "sleep 1000");
    assert_eq!(pod.exec(&[], &["sh", "-c", "exit 7"]).code, 7);
    for call in ["pause", "resume"] {
        ctr_ok(&["task", call, &pod.id]);
    }
    ctr_ok(&["task", "kill", "--signal", "SIGKILL", &pod.id]);
    pod.wait_for("STOPPED");
    assert_eq!(pod.delete(), 137);
    let told = || {
        let lines = events.so_far();
        let own = lines.lines().filter(|line| line.contains(&format!("\"{}\"", pod.id)) || line.contains(&format!("/{}\"", pod.id)));
        let topics = own.filter_map(|line| line.split_whitespace().find_map(|word| word.strip_prefix("/tasks/")).map(str::to_owned));
        topics.collect::<Vec<_>>()
    };
    eventually(|| told().last().is_some_and(|topic| topic == "delete"), "the deletion is not told");
    assert_eq!(
        told(),
        ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"],
        "{}",
        events.so_far()
    );
}
