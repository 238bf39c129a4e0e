//! Node tests: each runs `ctr` against a real containerd on a node and looks at what a user sees.
//!
//! Run by `cargo xtask test [FILTER]`. A test is named for its outcome; a failed assertion says
//! what was seen. Tests that disturb the whole node (they restart containerd, or count what is on
//! the host) run alone, after the others. On a node with cgroup v1, or with
//! two threads a core, those run that look at what is different there.

mod bench;
mod cgroup_v1;
mod containerd;
mod cores;
mod cri;
mod ctr;
mod deploy;
mod disks;
mod events;
mod exercise;
mod faults;
mod files;
mod fire;
mod host;
mod hostile;
mod io;
mod isolation;
mod layers;
mod leaks;
mod network;
mod owners;
mod pods;
mod process;
mod replays;
mod resize;
mod rootless;
mod sequences;
mod stand_ins;
mod streaming;
mod tenants;
mod tools;
mod user_network;
mod volumes;

use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

type Test = (&'static str, fn());

/// A test that has not ended after this time never does.
const PATIENCE: Duration = Duration::from_secs(600);
/// The exit code when a test did not end; `cargo xtask test` goes on in another node.
const HUNG: i32 = 102;

/// How many seconds each test took.
static TIMES: Mutex<Vec<(u64, &str)>> = Mutex::new(Vec::new());

/// Tests that leave the node as the others need it.
const SHARED: &[&[Test]] = &[
    process::TESTS,
    events::TESTS,
    io::TESTS,
    isolation::TESTS,
    network::TESTS,
    cri::TESTS,
    pods::TESTS,
    streaming::TESTS,
    tools::TESTS,
    resize::TESTS,
    volumes::TESTS,
    disks::TESTS,
    deploy::TESTS,
    faults::TESTS,
    files::TESTS,
    stand_ins::TESTS,
    replays::TESTS,
];
/// Tests that disturb or count.
const ALONE: &[&[Test]] = &[
    leaks::TESTS,
    isolation::ALONE,
    hostile::ALONE,
    faults::ALONE,
    owners::ALONE,
    tenants::ALONE,
    rootless::ALONE,
    tools::ALONE,
    pods::ALONE,
    user_network::ALONE,
    volumes::ALONE,
    disks::ALONE,
    layers::ALONE,
    deploy::ALONE,
    fire::ALONE,
    sequences::ALONE,
];

/// What takes long for what it shows, and changes seldom: run by `cargo xtask test --long`, or when asked for by name.
const LONG: &[&str] = &["what_a_monitor_may_ask_of_the_kernel_is_what_it_asks"];

fn trials(tests: &[Test], all: bool) -> Vec<Trial> {
    tests
        .iter()
        .filter(|(name, _)| all || !LONG.contains(name))
        .map(|&(name, test)| {
            Trial::test(name, move || {
                let (start, begin) = (host::uptime(), Instant::now());
                let (_running, end) = mpsc::channel::<()>();
                std::thread::spawn(move || give_up_late(&end, start));
                // A panic's message is the failure's; libtest-mimic catches it as well, but would print a backtrace.
                let outcome = std::panic::catch_unwind(test);
                TIMES.lock().unwrap().push((begin.elapsed().as_secs(), name));
                outcome.map_err(|panic| {
                    let text =
                        panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                    Failed::from(format!(
                        "{}\n{}\n{}",
                        text.unwrap_or_else(|| "panicked".into()),
                        host::shim_log(),
                        host::kernel_log(start)
                    ))
                })
            })
        })
        .collect()
}

/// Ends this program, with what is known, when a test does not end in time.
fn give_up_late(end: &mpsc::Receiver<()>, start: f64) {
    if end.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
        println!("no end after {} s\n{}\n{}\nFAILED", PATIENCE.as_secs(), host::shim_log(), host::kernel_log(start));
        std::process::exit(HUNG);
    }
}

fn main() {
    if std::env::args().next().is_some_and(|name| name.ends_with(hostile::peers::MONITOR)) {
        return hostile::peers::monitor();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["bench", rounds] => return bench::run(rounds.parse().expect("a number of rounds")),
        ["exercise", folder, seed, steps] => {
            return exercise::run(folder, seed.parse().expect("a seed"), steps.parse().expect("a number of steps"));
        }
        _ => {}
    }
    let mut arguments = Arguments::from_args();
    let all = arguments.filter.is_some() || host::number("CAISSON_TEST_LONG", 0) == 1;
    // One at a time: what a test sees on the node is its own.
    arguments.test_threads = Some(1);
    let (mut passed, mut failed) = (0, 0);
    let mut run = |tests: &[&[Test]]| {
        let outcome = libtest_mimic::run(&arguments, trials(&tests.concat(), all));
        (passed, failed) = (passed + outcome.num_passed, failed + outcome.num_failed);
    };
    // The first pod of a host makes the folders that all share: what is compared comes after it.
    let first_pod = || ctr::run_pod(&[], &["true"]);
    if cgroup_v1::is_here() {
        first_pod();
        run(&[cgroup_v1::TESTS]);
    } else if cores::have_threads() {
        first_pod();
        run(&[cores::TESTS]);
    } else {
        run(SHARED);
        first_pod();
        run(ALONE);
    }
    let mut times = TIMES.lock().unwrap();
    times.sort_unstable();
    let slowest: Vec<String> = times.iter().rev().take(20).map(|(seconds, name)| format!("{name} {seconds} s")).collect();
    println!("of {} s most took {}", times.iter().map(|(seconds, _)| seconds).sum::<u64>(), slowest.join(", "));
    println!("{passed} passed, {failed} failed");
    if failed > 0 {
        std::process::exit(101);
    }
}
