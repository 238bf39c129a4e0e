//! The pod's network: what is in its network namespace is in the guest, and works.

use std::process::{Child, Command};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crate::Test;
use crate::ctr::{IMAGE, Pod, RUNTIME, ctr, id, run, run_pod, shell};
use crate::faults::Config;
use crate::host::eventually;

pub const TESTS: &[Test] = &[
    ("interfaces_of_a_namespace_are_the_guests", interfaces_of_a_namespace_are_the_guests),
    ("a_file_crosses_the_network_both_ways", a_file_crosses_the_network_both_ways),
    ("an_interface_has_queues_for_each_vcpu_that_runs", an_interface_has_queues_for_each_vcpu_that_runs),
    ("changes_of_a_network_are_followed", changes_of_a_network_are_followed),
    ("interfaces_change_and_go_and_come_again", interfaces_change_and_go_and_come_again),
    ("interfaces_have_the_names_and_routes_that_they_have_on_the_host", interfaces_have_the_names_and_routes_that_they_have_on_the_host),
    ("a_network_made_before_the_start_is_found", a_network_made_before_the_start_is_found),
    ("a_pod_without_a_network_has_loopback_alone", a_pod_without_a_network_has_loopback_alone),
    ("connections_within_the_namespace_reach_the_guest", connections_within_the_namespace_reach_the_guest),
    ("the_hosts_own_network_is_refused", the_hosts_own_network_is_refused),
    ("an_interface_keeps_to_its_limit", an_interface_keeps_to_its_limit),
    ("nothing_stays_in_a_network_namespace", nothing_stays_in_a_network_namespace),
    ("a_macvtap_is_where_it_can_be_and_goes_with_its_interface", a_macvtap_is_where_it_can_be_and_goes_with_its_interface),
    ("a_container_reaches_no_port_of_the_host", a_container_reaches_no_port_of_the_host),
];

/// A network namespace with an interface `eth7`, whose other end is the node's.
struct Network {
    name: String,
    outside: String,
    /// Third byte of its addresses: 10.9.N.1 is the node, 10.9.N.2 is inside.
    subnet: u8,
}

impl Network {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let subnet = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Self { name: id("net"), outside: format!("v{subnet}"), subnet };
        let Self { name, outside, subnet } = &network;
        shell(&format!(
            "set -e; ip netns add {name}; ip link add {outside} type veth peer name eth7 netns {name}
             ip addr add 10.9.{subnet}.1/24 dev {outside}; ip addr add fd00:{subnet}::1/64 dev {outside} nodad; ip link set {outside} mtu 1400 up
             ip -n {name} link set lo up; ip -n {name} link set eth7 mtu 1400 up
             ip -n {name} addr add 10.9.{subnet}.2/24 dev eth7; ip -n {name} addr add fd00:{subnet}::2/64 dev eth7 nodad
             ip -n {name} route add default via 10.9.{subnet}.1; ip -n {name} route add unreachable 10.66.0.0/16
             ip -n {name} rule add from 10.99.0.0/16 table 77 priority 100; ip -n {name} neigh add 10.9.{subnet}.9 lladdr 02:00:00:00:00:09 dev eth7"
        ));
        network
    }

    fn option(&self) -> String {
        format!("network:/run/netns/{}", self.name)
    }

    /// A pod in it.
    fn pod(&self) -> Pod {
        Pod::start("net", &["--with-ns", &self.option()], "sleep 1000")
    }

    fn ip(&self, arguments: &str) -> String {
        shell(&format!("ip -n {} {arguments}", self.name))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        run("ip", &["link", "del", &self.outside]);
        run("ip", &["netns", "del", &self.name]);
    }
}

/// Standard output of a command in a pod that must succeed.
pub fn output(pod: &Pod, script: &str) -> String {
    let output = pod.exec(&[], &["sh", "-c", script]);
    assert_eq!(output.code, 0, "{script}: {output:?}");
    output.stdout
}

pub fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

fn interfaces_of_a_namespace_are_the_guests() {
    let network = Network::new();
    let mac = network.ip("-json link show eth7 | jq -r .[0].address");
    let pod = network.pod();
    let n = network.subnet;
    let interfaces = output(&pod, "ip addr; ip route; ip neigh; ip rule");
    let address = format!("inet 10.9.{n}.2/24");
    let expected = ["mtu 1400", &mac, &address, &format!("fd00:{n}::2/64"), &format!("default via 10.9.{n}.1 dev eth7")];
    assert_contains(&interfaces, &expected);
    assert_contains(&interfaces, &["02:00:00:00:00:09", "from 10.99.0.0/16", "unreachable 10.66.0.0/16"]);
    assert!(!interfaces.contains("dummy0"), "{interfaces}");
    output(&pod, &format!("ping -c 2 10.9.{n}.1; ping -6 -c 2 fd00:{n}::1"));
    shell(&format!("ping -c 2 10.9.{n}.2; ping -6 -c 2 fd00:{n}::2"));
    // Larger than a packet may be: fragments, both ways.
    output(&pod, &format!("ping -c 1 -s 5000 10.9.{n}.1"));
    shell(&format!("ping -c 1 -s 5000 10.9.{n}.2"));
}

fn an_interface_has_queues_for_each_vcpu_that_runs() {
    // A guest that starts fewer CPUs than it has uses fewer of the pairs that there are.
    for (settings, queues, tap) in [
        ("[vm]\nvcpus = 2\n", "rx-0\nrx-1\ntx-0\ntx-1\n", "numqueues 2 numdisabled 0"),
        ("[vm]\nvcpus = 2\n[kernel]\nargs = \"maxcpus=1\"\n", "rx-0\ntx-0\n", "numqueues 1 numdisabled 1"),
        ("[vm]\nvcpus = 2\n[network]\nvhost = false\n", "rx-0\ntx-0\n", ""),
        ("[vm]\nvcpus = 2\n[network]\njoin = \"macvtap\"\n", "rx-0\nrx-1\ntx-0\ntx-1\n", "macvtap"),
    ] {
        let _settings = Config::set(settings);
        let network = Network::new();
        let pod = network.pod();
        assert_eq!(output(&pod, "ls /sys/class/net/eth7/queues"), queues, "{settings}");
        let found = network.ip("-d link show caisson0");
        // Of a tap with a single queue nothing is said.
        assert!(found.contains(tap) || (tap.is_empty() && !found.contains("numqueues")), "{settings}: {found}");
        let _server = Background::socat(&[&format!("TCP-LISTEN:{},fork,reuseaddr", 7000 + u16::from(network.subnet)), "EXEC:cat"]);
        let talk = format!(
            "for i in $(seq 16); do echo $i | nc -w 20 10.9.{0}.1 {1} & done; wait",
            network.subnet,
            7000 + u16::from(network.subnet)
        );
        let mut answers: Vec<u32> = output(&pod, &format!("sleep 1; {talk}")).lines().map(|line| line.parse().unwrap()).collect();
        answers.sort_unstable();
        assert_eq!(answers, (1..=16).collect::<Vec<_>>(), "{settings}");
    }
}

const FILE: &str = "/usr/share/caisson/vmlinux";

/// A program that is killed when its test ends.
struct Background(Child);

impl Background {
    fn socat(arguments: &[&str]) -> Self {
        Self(Command::new("socat").args(arguments).spawn().unwrap())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_file_crosses_the_network_both_ways() {
    for (vhost, join) in [(true, "redirect"), (false, "redirect"), (true, "macvtap"), (false, "macvtap")] {
        let _settings = Config::set(&format!("[network]\nvhost = {vhost}\njoin = \"{join}\"\n"));
        let network = Network::new();
        let mount = "type=bind,src=/usr/share/caisson,dst=/usr/share/caisson,options=rbind:ro";
        let pod = Pod::start("net", &["--mount", mount, "--with-ns", &network.option()], "sleep 1000");
        // By the host's kernel or by the monitor.
        let served = shell(&format!("ls -l /proc/{}/fd | grep -c /dev/vhost-net; true", pod.host_pid("vmm")));
        assert_eq!(served, u8::from(vhost).to_string());
        assert_eq!(network.ip("-d link show caisson0").contains("macvtap mode passthru"), join == "macvtap");
        a_file_crosses(&network, &pod);
    }
}

fn a_file_crosses(network: &Network, pod: &Pod) {
    let n = network.subnet;
    let sum = shell(&format!("md5sum < {FILE}"));
    let _server = Background::socat(&["-u", &format!("FILE:{FILE}"), "TCP-LISTEN:5001,reuseaddr"]);
    assert_eq!(output(pod, &format!("nc 10.9.{n}.1 5001 | md5sum")).trim(), sum);
    let received = format!("/tmp/{}", network.name);
    let sink = Background::socat(&["-u", "TCP-LISTEN:5003,reuseaddr", &format!("CREATE:{received}")]);
    output(pod, &format!("nc 10.9.{n}.1 5003 < {FILE}"));
    eventually(|| shell(&format!("md5sum < {received}")) == sum, "the file did not arrive whole");
    drop(sink);
    std::fs::remove_file(received).unwrap();
    // Datagrams: the echo of a question is no answer, but it arrives.
    let _echo = Background::socat(&["UDP-LISTEN:53,fork", "PIPE"]);
    let counters = output(pod, &format!("timeout 6 nslookup caisson.test 10.9.{n}.1 > /dev/null 2>&1; grep Udp: /proc/net/snmp"));
    let received = counters.lines().nth(1).and_then(|line| line.split(' ').nth(1)).and_then(|count| count.parse::<u32>().ok());
    assert!(received.is_some_and(|received| received > 0), "{counters}");
}

fn changes_of_a_network_are_followed() {
    let network = Network::new();
    let pod = network.pod();
    let n = network.subnet;
    network.ip(&format!("addr add 10.9.{n}.77/24 dev eth7"));
    network.ip(&format!("route add 10.77.0.0/16 via 10.9.{n}.1"));
    eventually(|| output(&pod, "ip route").contains("10.77.0.0/16"), "the route did not appear");
    assert_contains(&output(&pod, "ip addr"), &[&format!("10.9.{n}.77/24")]);
    network.ip("route del 10.77.0.0/16");
    eventually(|| !output(&pod, "ip route").contains("10.77.0.0/16"), "the route did not go");
    // An interface that is plugged in while the pod runs.
    let (name, other) = (&network.name, format!("w{n}"));
    shell(&format!(
        "ip link add {other} type veth peer name net1 netns {name}; ip addr add 10.10.{n}.1/24 dev {other}; ip link set {other} up"
    ));
    network.ip(&format!("addr add 10.10.{n}.2/24 dev net1"));
    network.ip("link set net1 up");
    eventually(|| output(&pod, "ip addr").contains(&format!("10.10.{n}.2/24")), "the new interface did not appear");
    output(&pod, &format!("ping -c 2 10.10.{n}.1"));
    assert_contains(&output(&pod, "cat /sys/class/net/net1/mtu"), &["1500"]);
}

fn interfaces_change_and_go_and_come_again() {
    for vhost in [true, false] {
        let _settings = Config::set(&format!("[network]\nvhost = {vhost}\n"));
        let network = Network::new();
        let pod = network.pod();
        let (name, n) = (&network.name, network.subnet);
        let host = format!("w{n}");
        let seen = |file: &str| output(&pod, &format!("cat /sys/class/net/net1/{file} 2> /dev/null || echo none")).trim().to_owned();
        // A machine has eight places for interfaces.
        for round in 0..9 {
            shell(&format!(
                "ip link add {host} type veth peer name net1 netns {name}; ip addr add 10.10.{n}.1/24 dev {host}; ip link set {host} up"
            ));
            network.ip(&format!("addr add 10.10.{n}.2/24 dev net1"));
            network.ip("link set net1 up");
            eventually(|| output(&pod, "ip addr").contains(&format!("10.10.{n}.2/24")), "the interface did not appear");
            output(&pod, &format!("ping -c 1 10.10.{n}.1"));
            if round == 0 {
                // Larger than it was, with packets that need it; and another address.
                shell(&format!("ip link set {host} mtu 4000"));
                network.ip("link set net1 mtu 4000 address 02:00:00:00:00:77");
                eventually(|| seen("mtu") == "4000" && seen("address") == "02:00:00:00:00:77", "the change did not arrive");
                output(&pod, &format!("ping -c 1 -s 3500 10.10.{n}.1"));
                network.ip("link set net1 down");
                eventually(|| !output(&pod, "ip link show dev net1").contains(",UP"), "the interface did not go down");
                network.ip("link set net1 up");
                eventually(|| output(&pod, "ip link show dev net1").contains(",UP"), "the interface did not come up");
                output(&pod, &format!("ping -c 1 10.10.{n}.1"));
            }
            shell(&format!("ip link del {host}"));
            eventually(|| seen("mtu") == "none", "the interface did not go");
        }
        // What was there before is as it was.
        output(&pod, &format!("ping -c 1 10.9.{n}.1"));
        let taps = shell(&format!("ip -n {name} -brief link | grep -c caisson"));
        assert_eq!(taps, "1");
    }
}

fn interfaces_have_the_names_and_routes_that_they_have_on_the_host() {
    let network = Network::new();
    let pod = network.pod();
    let (name, n) = (&network.name, network.subnet);
    shell(&format!("ip link add w{n} type veth peer name net1 netns {name}; ip addr add 10.10.{n}.1/24 dev w{n}; ip link set w{n} up"));
    network.ip(&format!("addr add 10.10.{n}.2/24 dev net1"));
    network.ip(&format!("addr add fd01:{n}::2/64 dev net1 nodad"));
    network.ip("link set net1 up");
    network.ip(&format!("route add 10.77.0.0/16 via 10.10.{n}.1"));
    network.ip(&format!("route add fd77::/32 via fd01:{n}::1"));
    let is_whole = |device: &str| {
        let seen = output(&pod, &format!("ip addr show dev {device} 2>&1; ip route; ip -6 route"));
        let parts = [
            format!("10.10.{n}.2/24"),
            format!("fd01:{n}::2/64"),
            format!("10.77.0.0/16 via 10.10.{n}.1 dev {device}"),
            format!("fd77::/32 via fd01:{n}::1 dev {device}"),
        ];
        parts.iter().all(|part| seen.contains(part)) && seen.contains(",UP")
    };
    eventually(|| is_whole("net1"), "the interface did not appear whole");
    // The kernel of the host renames it as it is, or who does it has brought it down; either way it is whole afterwards.
    network.ip("link set net1 name other");
    eventually(|| is_whole("other"), "the interface was not renamed");
    output(&pod, &format!("ping -c 1 10.10.{n}.1"));
    // Two have each other's names.
    network.ip("link set eth7 name spare");
    network.ip("link set other name eth7");
    network.ip("link set spare name other");
    eventually(|| is_whole("eth7"), "the second interface was not renamed");
    eventually(|| output(&pod, "ip addr show dev other 2>&1").contains(&format!("10.9.{n}.2/24")), "the first interface was not renamed");
    output(&pod, &format!("ping -c 1 10.9.{n}.1 && ping -c 1 10.10.{n}.1"));
    // A route with two ways stays when one of them is down, as does an address of IPv6 where the host keeps it.
    network.ip(&format!("route add 10.78.0.0/16 nexthop via 10.9.{n}.1 nexthop via 10.10.{n}.1"));
    eventually(|| output(&pod, "ip route").contains("10.78.0.0/16"), "the route with two ways did not appear");
    network.ip("link set other down");
    eventually(|| !output(&pod, "ip addr show dev other").contains(",UP"), "the first interface did not go down");
    network.ip("link set other up");
    eventually(|| output(&pod, "ip addr show dev other").contains(",UP"), "the first interface did not come up");
    output(&pod, &format!("ip route | grep -q 10.78.0.0/16 && ping -c 1 10.9.{n}.1"));
    // One that is down keeps its addresses of IPv4 alone.
    network.ip("link set eth7 down");
    let down = || output(&pod, "ip addr show dev eth7; ip route; ip -6 route");
    eventually(|| !down().contains("fd01:") && !down().contains("10.77.0.0/16"), "the interface did not go down");
    assert!(down().contains(&format!("10.10.{n}.2/24")), "{}", down());
}

fn a_network_made_before_the_start_is_found() {
    let output = run_pod(&["--cni"], &["sh", "-c", "ip addr show dev eth0; ip route; ping -c 2 10.88.0.1"]);
    assert_eq!(output.code, 0, "{output:?}");
    assert_contains(&output.stdout, &["inet 10.88.", "default via 10.88.0.1 dev eth0", "2 packets received"]);
}

fn a_pod_without_a_network_has_loopback_alone() {
    let output = run_pod(&[], &["sh", "-c", "ls /sys/class/net; ping -c 1 127.0.0.1 > /dev/null && echo reached"]);
    assert_eq!(output.stdout, "lo\nreached\n", "{output:?}");
}

/// As port-forward makes them.
fn connections_within_the_namespace_reach_the_guest() {
    let network = Network::new();
    let script = "while read line; do echo you said $line; done";
    let pod = Pod::start("net", &["--with-ns", &network.option()], &format!("echo '{script}' > /serve; nc -ll -p 8080 -e sh /serve"));
    let ask = |address: &str| {
        let name = &network.name;
        shell(&format!("(echo hello; sleep 1) | ip netns exec {name} timeout 10 socat -t 3 - TCP:{address}:8080 || true"))
    };
    eventually(|| ask("127.0.0.1") == "you said hello", "nobody answers at 127.0.0.1");
    assert_eq!(ask("[::1]"), "you said hello");
    assert_eq!(ask(&format!("10.9.{}.2", network.subnet)), "you said hello");
    // Where nobody listens the connection ends at once.
    let refused = shell(&format!("echo hello | ip netns exec {} timeout 10 socat -t 5 - TCP:127.0.0.1:9; true", network.name));
    assert_eq!(refused, "");
    assert_eq!(pod.status().as_deref(), Some("RUNNING"));
}

/// How much longer than the limit asks for it takes is the machine's affair.
fn an_interface_keeps_to_its_limit() {
    let _settings = Config::set("[network]\nmax_mbit = 1\n");
    let network = Network::new();
    let (pod, host) = (network.pod(), format!("10.9.{}.1", network.subnet));
    let listen = |address: &str, to: &str| Command::new("socat").args(["-u", address, to]).spawn().unwrap();
    let seconds = |script: &str, mut server: Child| {
        let begin = Instant::now();
        output(&pod, script);
        server.wait().unwrap();
        begin.elapsed()
    };
    // Half a megabyte each way takes four seconds.
    let sent = listen(&format!("TCP-LISTEN:19100,bind={host}"), "CREATE:/dev/null");
    let sent = seconds(&format!("sleep 1; dd if=/dev/zero bs=65536 count=8 2> /dev/null | nc {host} 19100"), sent);
    shell("head -c 524288 /dev/zero > /tmp/limited");
    let received = listen("FILE:/tmp/limited", &format!("TCP-LISTEN:19101,bind={host}"));
    let received = seconds(&format!("sleep 1; nc {host} 19101 > /dev/null < /dev/null"), received);
    shell("rm /tmp/limited");
    for took in [sent, received] {
        assert!(took >= Duration::from_secs(4), "{took:?}");
    }
}

fn the_hosts_own_network_is_refused() {
    let output = run_pod(&["--with-ns", "network:/proc/1/ns/net"], &["true"]);
    assert_eq!(output.code, 1, "{output:?}");
    assert_contains(&output.stderr, &["/proc/1/ns/net is the host's own"]);
}

/// Queueing disciplines and interfaces that a pod brought.
fn remains(network: &Network) -> String {
    shell(&format!("ip netns exec {} tc qdisc show | grep ingress; ip -n {} -brief link | grep caisson; true", network.name, network.name))
}

fn nothing_stays_in_a_network_namespace() {
    for (join, left) in [("redirect", ["dev eth7", "caisson0"]), ("macvtap", ["caisson0@eth7", "caisson0"])] {
        let _settings = Config::set(&format!("[network]\njoin = \"{join}\"\n"));
        nothing_stays(&Network::new(), &left);
    }
}

/// After a pod that is seen by what it has `left` while it runs.
fn nothing_stays(network: &Network, left: &[&str]) {
    let pod = network.pod();
    assert_contains(&remains(network), left);
    drop(pod);
    assert_eq!(remains(network), "");
    // As much after a death without warning.
    let pod = network.pod();
    assert_contains(&remains(network), left);
    shell(&format!("kill -9 {}", pod.host_pid("shim")));
    eventually(|| pod.status().as_deref() != Some("RUNNING"), "the pod still runs");
    drop(pod);
    eventually(|| remains(network).is_empty(), "something stays in the namespace");
    // And the next pod finds it as new.
    let option = network.option();
    let name = id("again");
    let output = ctr(&["run", "--rm", "--with-ns", &option, "--runtime", RUNTIME, IMAGE, &name, "ip", "addr"]);
    assert_contains(&output.stdout, &["eth7"]);
}

fn a_macvtap_is_where_it_can_be_and_goes_with_its_interface() {
    let _settings = Config::set("[network]\njoin = \"macvtap\"\n");
    let network = Network::new();
    // Of a bridge's port the bridge has what arrives.
    let elsewhere = format!("{}-elsewhere", network.name);
    for change in ["link add br9 type bridge", "link add d9 type dummy", "link set d9 master br9", "link set d9 up"] {
        network.ip(change);
    }
    let pod = network.pod();
    eventually(|| output(&pod, "ls /sys/class/net").contains("d9"), "the port of the bridge is not in the guest");
    assert_contains(&remains(&network), &["caisson0@eth7", "dev d9"]);
    // A group that nobody on the host has joined.
    let received = || output(&pod, "cat /sys/class/net/eth7/statistics/rx_packets").trim().parse::<u64>().unwrap();
    let before = received();
    shell(&format!("ping -c 3 -W 1 -I {} 239.1.2.3 || true", network.outside));
    assert!(received() >= before + 3, "{before} frames before those to a group, {} then", received());
    shell(&format!("ip netns add {elsewhere}; ip -n {} link set eth7 netns {elsewhere}", network.name));
    eventually(|| !remains(&network).contains("caisson0"), "a macvtap stays on an interface that is elsewhere");
    drop(pod);
    assert_eq!(remains(&network), "");
    run("ip", &["netns", "del", &elsewhere]);
}

fn a_container_reaches_no_port_of_the_host() {
    // The node's socat knows vsock; what the agent is served on is the first of these ports.
    let pod = Pod::start("vsock", &["--mount", "type=bind,src=/usr,dst=/node,options=rbind:ro"], "sleep 1000");
    let socat = "/node/lib64/ld-linux-x86-64.so.2 --library-path /node/lib/x86_64-linux-gnu /node/bin/socat";
    let script = format!("for port in $(seq 1024 1040); do {socat} -u VSOCK-CONNECT:2:$port,connect-timeout=5 - && echo $port; done");
    let output = pod.exec(&[], &["sh", "-c", &script]);
    assert_eq!(output.stdout, "", "{output:?}");
    assert_eq!(output.stderr.matches("Connection reset by peer").count(), 17, "{output:?}");
    assert_eq!(pod.exec(&[], &["echo", "still there"]).stdout, "still there\n");
}
