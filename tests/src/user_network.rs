//! The network of pods that no CNI plugin serves.

use std::process::{Child, Command};

use crate::Test;
use crate::ctr::{NODES_PROGRAMS, Pod, run, run_pod, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};
use crate::isolation::status;
use crate::network::{assert_contains, output};

pub const ALONE: &[Test] = &[
    (
        "a_pod_without_cni_reaches_out_and_is_reached_where_it_is_published",
        a_pod_without_cni_reaches_out_and_is_reached_where_it_is_published,
    ),
    ("a_network_that_cannot_be_made_is_one_clear_sentence", a_network_that_cannot_be_made_is_one_clear_sentence),
    ("a_pod_whose_network_dies_ends_and_says_so", a_pod_whose_network_dies_ends_and_says_so),
    ("however_a_pod_ends_its_network_ends_and_is_not_blamed", however_a_pod_ends_its_network_ends_and_is_not_blamed),
];

/// Settings with which pods have a network without CNI, and an address of the host that is none of its loopback.
struct UserNetwork {
    _settings: Config,
}

impl UserNetwork {
    const HOST: &str = "10.200.0.1";

    fn new(publish: &str) -> Self {
        let add = format!("ip link add user0 type dummy && ip link set user0 up && ip addr add {}/24 dev user0", Self::HOST);
        shell(&format!("{add} && ip route add default via 10.200.0.254 dev user0"));
        Self { _settings: Config::set(&format!("[network]\ndefault = \"user\"\npublish = [{publish}]\n")) }
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        run("ip", &["link", "del", "user0"]);
    }
}

/// A program of the node that listens at an address and ends with this.
struct Listener(Child);

impl Listener {
    fn new(address: &str, answer: &str) -> Self {
        Self(Command::new("socat").args([&format!("{address},reuseaddr,fork"), &format!("EXEC:{answer}")]).spawn().unwrap())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_pod_without_cni_reaches_out_and_is_reached_where_it_is_published() {
    let before = Inventory::take();
    {
        let network = UserNetwork::new("\"127.0.0.1:18080:80\", \"18053:53/udp\"");
        let script = "socat TCP-LISTEN:80,fork EXEC:'echo from the pod' & exec socat UDP-LISTEN:53,fork EXEC:cat";
        let pod = Pod::start("user", &NODES_PROGRAMS, script);
        assert!(output(&pod, "ip addr show dev eth0").contains("inet 10.0.2.15/24"));
        // From the pod to the host, and back, also what does not fit into the wire at once.
        let host = UserNetwork::HOST;
        let outside = Listener::new(&format!("TCP-LISTEN:19000,bind={host}"), "head -c 8388608 /dev/zero");
        let read = format!("socat -u TCP:{host}:19000 - | wc -c");
        eventually(|| output(&pod, &format!("{read}; :")) == "8388608\n", "the host is not reached");
        let counted = Listener::new(&format!("TCP-LISTEN:19002,bind={host}"), "wc -c");
        let write = format!("head -c 8388608 /dev/zero | socat -t 20 - TCP:{host}:19002");
        eventually(|| output(&pod, &format!("{write}; :")) == "8388608\n", "the host does not get what is sent");
        drop((outside, counted));
        // What is published is reached, at the addresses that it is published at.
        let ask = |address: &str| shell(&format!("echo there and back | timeout 10 socat -t 2 - {address} 2> /dev/null; :"));
        eventually(|| ask("TCP:127.0.0.1:18080") == "from the pod", "the published port is not reached");
        assert_eq!(ask(&format!("TCP:{host}:18080")), "");
        eventually(|| ask(&format!("UDP:{host}:18053")) == "there and back", "the published port is not reached by UDP");
        // Its program is nobody's but the pod's, and goes with it.
        let program = pod.host_pid("network");
        assert_eq!(status(program, "Uid"), status(pod.host_pid("vmm"), "Uid"));
        let security = run("caisson", &["check", "--security"]);
        assert!(security.code == 0 && security.stdout.contains(" network "), "{security:?}");
        // The host's own ports that are for itself alone are not the pod's.
        let secret = Listener::new("TCP-LISTEN:19001,bind=127.0.0.1", "echo secret");
        eventually(|| ask("TCP:127.0.0.1:19001") == "secret", "nobody listens");
        for address in ["10.0.2.2", "127.0.0.1", host] {
            assert_eq!(
                output(&pod, &format!("socat -T 3 - TCP:{address}:19001,connect-timeout=3 < /dev/null 2> /dev/null; :")),
                "",
                "{address}"
            );
        }
        drop((secret, pod, network));
    }
    assert_nothing_left(&before);
}

fn a_network_that_cannot_be_made_is_one_clear_sentence() {
    let before = Inventory::take();
    {
        let _network = UserNetwork::new("\"18081:80\"");
        let taken = Listener::new("TCP-LISTEN:18081", "true");
        eventually(|| !shell("ss -Hltn sport = :18081").is_empty(), "nobody listens");
        let output = run_pod(&[], &["true"]);
        drop(taken);
        assert_eq!(output.code, 1, "{output:?}");
        assert_contains(&output.stderr, &["network.default", "18081", "in use"]);
    }
    {
        let _settings = Config::set("[network]\ndefault = \"user\"\npasst = \"/usr/bin/missing\"\n");
        let output = run_pod(&[], &["true"]);
        assert_contains(&output.stderr, &["/usr/bin/missing does not exist; install the package passt or set network.passt"]);
    }
    {
        let _network = UserNetwork::new("");
        let output = run_pod(&["--cni"], &["true"]);
        assert_contains(&output.stderr, &["a CNI plugin made the pod a network, but it has one already (network.default)"]);
    }
    {
        // One that starts and serves nobody.
        let _settings = Config::set("[network]\ndefault = \"user\"\npasst = \"/usr/bin/yes\"\n");
        let output = run_pod(&[], &["true"]);
        assert_contains(&output.stderr, &["/usr/bin/yes says:"]);
    }
    assert_nothing_left(&before);
}

fn a_pod_whose_network_dies_ends_and_says_so() {
    let before = Inventory::take();
    {
        let _network = UserNetwork::new("");
        let pod = Pod::start("user", &[], "sleep 1000");
        shell(&format!("kill -9 {}", pod.host_pid("network")));
        pod.wait_for("STOPPED");
        let list = run("caisson", &["list"]);
        assert!(list.stdout.contains("the program of its network ended"), "{list:?}");
        assert_eq!(pod.delete(), 137);
    }
    assert_nothing_left(&before);
}

fn however_a_pod_ends_its_network_ends_and_is_not_blamed() {
    let before = Inventory::take();
    let _network = UserNetwork::new("");
    for (role, signal, says) in
        [("vmm", "KILL", "the virtual machine monitor was killed by SIGKILL"), ("shim", "KILL", ""), ("network", "STOP", "")]
    {
        {
            let pod = Pod::start("user", &[], "sleep 1000");
            shell(&format!("kill -{signal} {}", pod.host_pid(role)));
            if signal == "KILL" {
                eventually(|| pod.status().is_none_or(|status| status != "RUNNING"), "the task still runs");
            }
            if !says.is_empty() {
                let list = run("caisson", &["list"]);
                assert!(list.stdout.contains(says), "{list:?}");
            }
        }
        assert_nothing_left(&before);
    }
    {
        let pod = Pod::start("user", &["--privileged"], "sleep 1000");
        // A privileged container may tell its own kernel to panic when memory runs out.
        let script = "mkdir /m; mount -t tmpfs -o size=2g none /m; echo 1 > /proc/sys/vm/panic_on_oom; dd if=/dev/zero of=/m/fill bs=1M";
        pod.exec(&[], &["sh", "-c", script]);
        pod.wait_for("STOPPED");
        let list = run("caisson", &["list"]);
        assert!(list.stdout.contains("the guest kernel panicked"), "{list:?}");
    }
    assert_nothing_left(&before);
}
