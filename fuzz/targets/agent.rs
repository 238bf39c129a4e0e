//! What an agent that a guest has taken over may answer the shim: a connection's bytes as they are,
//! and well-formed answers with anything in them.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use caisson_protocol::agent::StatsResponse;
use caisson_shim::agent::Agent;
use caisson_shim::stats;
use libfuzzer_sys::fuzz_target;
use protobuf::Message;

/// A call's answer is there before it is made, so this is never waited for.
const TIMEOUT: Duration = Duration::from_millis(20);

fuzz_target!(|data: &[u8]| {
    if let Ok(answer) = StatsResponse::parse_from_bytes(data) {
        let _ = stats::metrics(&answer);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (socket, mut guest) = UnixStream::pair().expect("a socket");
        guest.set_nonblocking(true).expect("a socket that does not block");
        // The machine's end is known, so that nobody waits to hear of it.
        let (_machine, ended) = tokio::sync::watch::channel(Some("it was a test".to_owned()));
        let agent = Agent::new(socket, ended, TIMEOUT, |_| ()).expect("a runtime that watches it");
        let _ = guest.write(data);
        drop(guest);
        let _ = agent.hello("pod", 0, &[]).await;
        let _ = agent.stats("web").await;
        let _ = agent.wait("web", "").await;
    });
});
