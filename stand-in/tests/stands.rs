//! The program in its room, as the shim starts it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use caisson_host::process::End;
use caisson_host::stand_in::{StandIn, start};
use rustix::process::{Signal, getuid};

/// A user whom nobody is.
const USER: u32 = 1_900_000_000;

/// A stand-in that says nothing for so long says nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// The program as a release has it, which needs nothing of the host's: a build for tests needs the C library.
fn program() -> &'static File {
    static PROGRAM: OnceLock<File> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("caisson-stand-in");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/main.rs");
        let mut compiler = Command::new(option_env!("RUSTC").unwrap_or("rustc"));
        compiler.args(["--edition=2024", "-Copt-level=3", "-Cpanic=abort"]);
        compiler.args(["-nostartfiles", "-nostdlib", "-static", "-no-pie"].map(|argument| format!("-Clink-arg={argument}")));
        assert!(compiler.arg("-o").arg(&built).arg(source).status().expect("the compiler").success());
        File::open(built).expect("the program")
    })
}

/// One in a network namespace of its own; only root may have one, and node tests show the same.
fn stand_in() -> Option<StandIn> {
    getuid().is_root().then(|| {
        let started = start(program(), USER, None).expect("what stands for a container");
        started.socket.set_nonblocking(false).expect("a socket that waits");
        started.socket.set_read_timeout(Some(PATIENCE)).expect("a bound");
        started
    })
}

fn status(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    status.lines().find_map(|line| line.strip_prefix(field)).expect("a field").split_whitespace().next().expect("a value").into()
}

#[test]
fn signals_are_passed_on_and_a_code_ends_it() {
    let Some(StandIn { process, mut socket }) = stand_in() else { return };
    let mut byte = [0];
    for signal in [Signal::TERM, Signal::CHILD, Signal::WINCH] {
        process.signal(signal).expect("a signal");
        socket.read_exact(&mut byte).expect("its number");
        assert_eq!(i32::from(byte[0]), signal.as_raw());
    }
    socket.write_all(&[7]).expect("a code");
    assert_eq!(process.collect().expect("its end"), End::Exited(7));
}

#[test]
fn no_signal_is_lost_however_early_it_comes() {
    for _ in 0..50 {
        let Some(StandIn { process, mut socket }) = stand_in() else { return };
        process.signal(Signal::TERM).expect("a signal");
        let mut byte = [0];
        socket.read_exact(&mut byte).expect("its number");
        assert_eq!(i32::from(byte[0]), Signal::TERM.as_raw());
        process.kill();
        process.collect().expect("its end");
    }
}

#[test]
fn it_ends_as_killed_when_nobody_is_left() {
    let Some(StandIn { process, socket }) = stand_in() else { return };
    drop(socket);
    assert_eq!(process.collect().expect("its end"), End::Exited(137));
}

#[test]
fn its_death_is_seen() {
    let Some(StandIn { process, mut socket }) = stand_in() else { return };
    process.kill();
    assert_eq!(socket.read(&mut [0]).expect("the end of the socket"), 0);
    assert_eq!(process.collect().expect("its end"), End::Killed(9));
}

#[test]
fn it_is_in_the_network_that_it_is_given_and_has_no_right() {
    let Some(first) = stand_in() else { return };
    let network = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
    let given = File::open(format!("/proc/{}/ns/net", first.process.id())).expect("a namespace");
    let second = start(program(), USER, Some(given.as_fd())).expect("what stands for a container");
    let (first, second) = (first.process.id(), second.process.id());
    assert_eq!(network(first), network(second));
    assert_ne!(network(first), network(std::process::id()));
    assert_eq!(
        ["Uid:", "CapEff:", "CapBnd:"].map(|field| status(second, field)),
        [USER.to_string().as_str(), "0000000000000000", "0000000000000000"]
    );
}
