//! Two tenants on one host, set up as `deploy/tenant` has it: they share nothing.

use crate::Test;
use crate::containerd::CriContainerd;
use crate::cri;
use crate::ctr::{self, run, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const ALONE: &[Test] = &[
    ("two_tenants_of_a_host_share_no_network_user_or_cgroup", two_tenants_of_a_host_share_no_network_user_or_cgroup),
    ("a_tenant_that_uses_up_its_memory_harms_no_other", a_tenant_that_uses_up_its_memory_harms_no_other),
    ("a_tenants_limits_are_one_clear_sentence_when_they_cannot_be", a_tenants_limits_are_one_clear_sentence_when_they_cannot_be),
];

const CONFIG: &str = include_str!("../../deploy/tenant/acme.toml");
const NETWORK: &str = include_str!("../../deploy/tenant/acme.conflist");
const HANDLER: &str = include_str!("../../deploy/tenant/containerd-2.toml");
const RULES: &str = include_str!("../../deploy/tenant/tenants.nft");
/// The text of the rules that each tenant has one of.
const RULE: &str = "iifname \"tenant-acme\" oifname \"tenant-acme\" accept\n";

/// What `deploy/tenant` has for acme, for another tenant with numbers of its own.
fn of(tenant: &str, text: &str) -> String {
    let numbers = [("10.101.", "10.102."), ("1950000000", "1950010000"), ("1900000000", "1900100000")];
    let renumber = |text: String, (from, to): &(&str, &str)| text.replace(from, to);
    if tenant == "acme" { text.to_owned() } else { numbers.iter().fold(text.replace("acme", tenant), renumber) }
}

/// Two tenants' files, and the group of each one's owners; all gone at the end.
struct Tenants;

impl Tenants {
    const NAMES: [&str; 2] = ["acme", "umbra"];

    fn set_up() -> Self {
        for tenant in Self::NAMES {
            shell(&format!("mkdir -p /etc/caisson/tenants /etc/cni/{tenant} && groupadd --force {tenant}"));
            std::fs::write(format!("/etc/caisson/tenants/{tenant}.toml"), of(tenant, CONFIG)).unwrap();
            std::fs::write(format!("/etc/cni/{tenant}/10-{tenant}.conflist"), of(tenant, NETWORK)).unwrap();
        }
        Self
    }

    /// Their handlers, as the node's containerd has its configuration.
    fn handlers() -> String {
        let handler =
            |tenant| of(tenant, HANDLER).replace("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri").replace("version = 3", "");
        Self::NAMES.map(handler).concat()
    }

    /// Loads the rules.
    fn separate() {
        let rules = RULES.replace(RULE, &Self::NAMES.map(|tenant| of(tenant, RULE)).concat());
        let loaded = ctr::run_with_input("nft", &["-f", "-"], rules.as_bytes());
        assert_eq!(loaded.code, 0, "{loaded:?}");
    }
}

impl Drop for Tenants {
    fn drop(&mut self) {
        run("bash", &["-c", "pkill -x busybox; ip netns del outside; rm -f /tmp/index"]);
        for tenant in Self::NAMES {
            let files = format!("/etc/caisson/tenants/{tenant}.toml /etc/cni/{tenant} /var/lib/cni/networks/{tenant}");
            shell(&format!("rm -rf {files}; groupdel {tenant}; ip link del tenant-{tenant} 2>/dev/null; true"));
        }
        shell(
            "nft delete table inet caisson-tenants 2>/dev/null; rmdir /etc/caisson/tenants /etc/caisson /sys/fs/cgroup/tenants/* /sys/fs/cgroup/tenants 2>/dev/null; true",
        );
    }
}

struct Member {
    pod: cri::Pod,
    container: String,
    address: String,
}

impl Member {
    fn start(tenant: &str) -> Self {
        let mut pod = cri::Pod::start_with(CriContainerd::SOCKET, tenant, |_| ()).unwrap();
        let container = pod.run("one", "echo here > /index; httpd -f -p 80 -h /", |_| ());
        let address = pod.output(&container, "ip -4 addr show dev eth0 | sed -n 's|.*inet \\([0-9.]*\\)/.*|\\1|p'");
        Self { pod, container, address }
    }

    /// Whether it gets an answer from a web server.
    fn reaches(&mut self, address: &str) -> bool {
        let get = format!("printf 'GET /index HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc -w 3 {address} 80 | tail -n 1");
        self.pod.exec(&self.container, &get).stdout == b"here\n"
    }

    /// The user on the host and the cgroup of its processes.
    fn on_host(&self) -> [(u32, String); 2] {
        ["vmm", "fs"].map(|role| {
            let process = format!("/proc/{}", ctr::host_pid(&self.pod.id, role));
            let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
            let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
            (uid.unwrap(), std::fs::read_to_string(format!("{process}/cgroup")).unwrap().trim().to_owned())
        })
    }
}

fn two_tenants_of_a_host_share_no_network_user_or_cgroup() {
    let _tenants = Tenants::set_up();
    let _containerd = CriContainerd::start_with("2", &Tenants::handlers());
    // The world outside, behind the host.
    shell(
        "ip netns add outside && ip link add outside0 type veth peer name eth0 netns outside && ip addr add 192.0.2.1/24 dev outside0 && ip link set outside0 up",
    );
    shell("cd /tmp && echo here > index && ip -n outside addr add 192.0.2.2/24 dev eth0 && ip -n outside link set eth0 up");
    shell("ip netns exec outside busybox httpd -p 80 -h /tmp; busybox httpd -p 192.0.2.1:80 -h /tmp");
    {
        let [mut one, two] = ["acme", "acme"].map(Member::start);
        let mut other = Member::start("umbra");
        // It is the rules that part them, nothing else that might be missing elsewhere.
        eventually(|| one.reaches(&other.address), "without rules tenants reach each other");
        assert!(one.reaches("192.0.2.1"));
        Tenants::separate();
        assert!(!one.reaches(&other.address) && !other.reaches(&one.address) && !other.reaches(&two.address));
        assert!(one.reaches(&two.address) && one.reaches("192.0.2.2") && other.reaches("192.0.2.2"));
        for host in ["192.0.2.1", "10.101.0.1", "10.102.0.1"] {
            assert!(!one.reaches(host) && !other.reaches(host), "{host}");
        }
        // The host reaches them, as kubelet's probes do.
        for member in [&one, &other] {
            assert_eq!(shell(&format!("busybox wget -q -T 3 -O - http://{}/index", member.address)), "here");
        }
        for (member, uids, ids, tenant) in [(&one, 1_950_000_000, 1_900_000_000, "acme"), (&other, 1_950_010_000, 1_900_100_000, "umbra")] {
            let [(vmm, cgroup), (fs, other_cgroup)] = member.on_host();
            assert!((uids..uids + 4096).contains(&vmm) && fs == ids, "{tenant}: {vmm} {fs}");
            let place = format!("0::/tenants/{tenant}/k8s.io/{}/machine", member.pod.id);
            assert_eq!((cgroup, other_cgroup), (place.clone(), place));
            let limits = shell(&format!("cd /sys/fs/cgroup/tenants/{tenant} && cat memory.max cpu.max pids.max"));
            assert_eq!(limits, format!("{}\n400000 100000\n4096", 8192_u64 << 20));
            let folder = format!("/run/caisson/k8s.io/{}", member.pod.id);
            assert_eq!(shell(&format!("stat -c %G:%a {folder}")), format!("{tenant}:750"));
        }
    }
    assert_eq!(shell("find /sys/fs/cgroup/tenants -mindepth 2 -type d"), "", "the pods' cgroups");
}

fn a_tenant_that_uses_up_its_memory_harms_no_other() {
    let before = Inventory::take();
    let _config = Config::set("[annotations]\nallowed = [\"tenant.name\"]\n");
    shell("mkdir /etc/caisson/tenants");
    let start = |tenant: &str| {
        let text = format!("[vm]\nmemory_mib = 512\n[tenant]\ncgroup = \"/{tenant}\"\nmemory_mib = 160\n");
        std::fs::write(format!("/etc/caisson/tenants/{tenant}.toml"), text).unwrap();
        let (name, memory) = (format!("io.caisson.tenant.name={tenant}"), "type=tmpfs,src=tmpfs,dst=/fill,options=size=400m");
        ctr::Pod::start(tenant, &["--annotation", &name, "--mount", memory], "sleep 1000")
    };
    {
        let (greedy, quiet) = (start("greedy"), start("quiet"));
        let filled = greedy.exec(&[], &["dd", "if=/dev/zero", "of=/fill/all", "bs=1M", "count=300"]);
        assert_ne!(filled.code, 0, "{filled:?}");
        greedy.wait_for("STOPPED");
        assert_eq!(quiet.exec(&[], &["echo", "fine"]).stdout, "fine\n");
        let kills = |tenant: &str| shell(&format!("sed -n 's/^oom_kill //p' /sys/fs/cgroup/{tenant}/memory.events"));
        assert!(kills("greedy") != "0" && kills("quiet") == "0");
    }
    let unknown = ctr::run_pod(&["--annotation", "io.caisson.tenant.name=nobody"], &["true"]);
    assert!(unknown.stderr.contains("read configuration /etc/caisson/tenants/nobody.toml: No such file or directory"), "{unknown:?}");
    shell("rmdir /sys/fs/cgroup/greedy /sys/fs/cgroup/quiet; rm -r /etc/caisson/tenants");
    assert_nothing_left(&before);
}

fn a_tenants_limits_are_one_clear_sentence_when_they_cannot_be() {
    let before = Inventory::take();
    let says = |text: &str| {
        std::fs::write("/tmp/bad.toml", text).unwrap();
        let refused = ctr::run_pod(&["--runtime-config-path", "/tmp/bad.toml"], &["true"]);
        assert_ne!(refused.code, 0, "{text}");
        refused.stderr
    };
    let text = says("[tenant]\ncpus = 2\n");
    assert!(text.contains("need a path as tenant.cgroup, which is \"\""), "{text}");
    let text = says("[tenant]\ncgroup = \"acme\"\n");
    assert!(text.contains("tenant.cgroup = \"acme\" is not allowed; allowed is an absolute path like"), "{text}");
    // A cgroup of threads cannot be given processes with limits of memory.
    shell("mkdir /sys/fs/cgroup/threads && echo threaded > /sys/fs/cgroup/threads/cgroup.type");
    let text = says("[tenant]\ncgroup = \"/threads\"\nmemory_mib = 100\n");
    assert!(text.contains("limit the tenant's pods: write \"104857600\" to /sys/fs/cgroup/threads/memory.max"), "{text}");
    shell("rmdir /sys/fs/cgroup/threads; rm /tmp/bad.toml");
    assert_nothing_left(&before);
}
