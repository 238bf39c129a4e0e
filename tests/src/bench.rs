//! Figures of pods through the CRI, beside runc's: `node-tests bench RUNS` prints lines of NAME and
//! milliseconds, for `cargo xtask bench`.

use std::time::Instant;

use k8s_cri::v1::ListContainerStatsRequest;

use crate::cri::{Pod, SLEEP, SOCKET};

const HANDLERS: [&str; 2] = ["runc", "caisson"];
/// Of which one is measured as a whole.
const EXECS: usize = 100;
const CONTAINERS: usize = 50;

/// Takes the figures; the first round, which warms caches, does not count.
pub fn run(rounds: usize) {
    for round in 0..=rounds {
        for handler in HANDLERS {
            let note = |figure: &str, begin: Instant| {
                if round > 0 {
                    println!("cri-{figure}.{handler} {}", begin.elapsed().as_millis());
                }
            };
            let begin = Instant::now();
            let mut pod = Pod::start_with(SOCKET, handler, |_| ()).unwrap();
            let first = pod.run("first", SLEEP, |_| ());
            note("pod", begin);
            let begin = Instant::now();
            pod.run("second", SLEEP, |_| ());
            note("second", begin);
            // The first exec of a container finds nothing in any cache.
            pod.output(&first, "true");
            let begin = Instant::now();
            pod.output(&first, "true");
            note("exec", begin);
        }
    }
    for handler in HANDLERS {
        let mut pod = Pod::start_with(SOCKET, handler, |_| ()).unwrap();
        let first = pod.run("first", SLEEP, |_| ());
        let begin = Instant::now();
        (0..EXECS).for_each(|_| assert_eq!(pod.exec(&first, "true").exit_code, 0));
        println!("cri-execs.{handler} {}", begin.elapsed().as_millis());
        (1..CONTAINERS).for_each(|number| drop(pod.run(&format!("c{number}"), SLEEP, |_| ())));
        let begin = Instant::now();
        let stats = pod.cri.call(|client| client.list_container_stats(ListContainerStatsRequest::default())).unwrap().stats;
        println!("cri-stats.{handler} {}", begin.elapsed().as_millis());
        assert!(stats.len() >= CONTAINERS, "{}", stats.len());
    }
}
