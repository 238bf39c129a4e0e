//! Pods of an ordinary user, who is nobody special on the host: containerd and all that it starts in a user namespace.

use crate::Test;
use crate::ctr::{run, shell};
use crate::host::{Inventory, assert_nothing_left};

pub const ALONE: &[Test] = &[("an_ordinary_user_runs_pods_without_root", an_ordinary_user_runs_pods_without_root)];

const HOME: &str = "/tmp/tester";
/// As the packages of a distribution leave a host: who is in the group `kvm` may use it.
const SET_UP: &str = r#"set -e
echo "tester:x:1000:1000::/tmp/tester:/bin/bash" >> /etc/passwd
echo "tester:100000:65536" | tee /etc/subuid > /etc/subgid
mkdir /tmp/tester; mount -t tmpfs -o uid=1000,gid=1000,mode=700 tester /tmp/tester
chgrp 104 /dev/kvm /dev/vhost-net; chmod 660 /dev/kvm /dev/vhost-net; chmod 666 /dev/net/tun
ip link add user0 type dummy; ip link set user0 up; ip addr add 10.200.0.1/24 dev user0; ip route add default via 10.200.0.254 dev user0"#;
const TEAR_DOWN: &str = r#"umount /tmp/tester; rmdir /tmp/tester; sed -i /^tester:/d /etc/passwd; rm /etc/subuid /etc/subgid
ip link del user0; chown 0:0 /dev/kvm /dev/vhost-net; chmod 600 /dev/kvm /dev/vhost-net"#;
/// Becomes the user.
const USER: &str = "HOME=/tmp/tester setpriv --reuid 1000 --regid 1000 --groups 1000,104";
/// What the user does in a namespace of the user's own; it says what the test looks for.
const INSIDE: &str = r#"
mount -t tmpfs run /run; mkdir -p /run/containerd; cd /tmp/tester
printf 'version = 2\nroot = "/tmp/tester/root"\nstate = "/run/containerd/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "/run/containerd/c.sock"\n' > containerd.toml
printf '[network]\ndefault = "user"\npublish = ["8099:80"]\n' > handler.toml
containerd --config containerd.toml > log 2>&1 &
ctr="ctr -a /run/containerd/c.sock"
n=0; until $ctr version > /dev/null 2>&1; do sleep 0.2; n=$((n+1)); [ $n -lt 200 ] || exit 1; done
$ctr images import /usr/lib/node/busybox.tar > /dev/null || exit 1
echo "check: $(caisson check --rootless | tail -n 1)"
mkdir volume
$ctr run -d --runtime io.containerd.caisson.v2 --runtime-config-path /tmp/tester/handler.toml \
    --mount type=bind,src=/tmp/tester/volume,dst=/volume,options=rbind:rw docker.io/library/busybox:latest pod \
    sh -c 'id -u; touch /volume/file; chown 5:6 /volume/file; while :; do echo from the pod | nc -l -p 80; done' || cat log
exec_in() { $ctr task exec --exec-id "e$RANDOM" pod "$@"; }
echo "inside: $(exec_in sh -c 'id -u; stat -c %u:%g /volume/file' | tr '\n' ' ')"
n=0; until said=$(timeout 5 socat -u TCP:127.0.0.1:8099 - 2>/dev/null) && [ -n "$said" ] || [ $n -gt 12 ]; do sleep 0.2; n=$((n+1)); done; echo "port: $said"
caisson list --json | jq -r '.processes[] | select(.role != "shim") | "\(.role) \(.pid)"' | while read role pid; do
    echo "$role: $(sed -n 's/^Uid:\s*//p' /proc/$pid/status | cut -f1)"
done
$ctr task kill -s KILL pod; sleep 1; $ctr task rm pod; $ctr container rm pod
echo "left: $(ls /run/caisson/default 2>/dev/null | wc -l) $(pgrep -c 'caisson|passt')"
echo "sentence: $($ctr run --rm --runtime io.containerd.caisson.v2 --runtime-config-path /tmp/tester/bad.toml docker.io/library/busybox:latest bad true 2>&1)"
kill %1; wait %1
"#;

fn an_ordinary_user_runs_pods_without_root() {
    let before = Inventory::take();
    shell(SET_UP);
    let outside = run("bash", &["-c", &format!("{USER} caisson check --rootless")]);
    std::fs::write(format!("{HOME}/inside.sh"), INSIDE).unwrap();
    std::fs::write(format!("{HOME}/bad.toml"), "[vmm]\nuid_base = 70000\n").unwrap();
    let done = run("bash", &["-c", &format!("{USER} unshare --user --map-auto --map-root-user --mount bash {HOME}/inside.sh 2>&1")]);
    shell(TEAR_DOWN);
    assert!(outside.code == 0 && outside.stdout.contains("subordinate user ids: 65536 for tester"), "{outside:?}");
    let said =
        |what: &str| done.stdout.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_else(|| panic!("{}", done.stdout)).trim();
    assert_eq!(said("check:"), "This host can run pods.");
    assert_eq!(said("inside:"), "0 5:6");
    assert_eq!(said("port:"), "from the pod");
    // Users of the namespace, none of which is anybody's on the host: the monitor's own, and for files the user's root.
    let monitor: u32 = said("vmm:").parse().unwrap();
    assert!((32_768..65_536).contains(&monitor), "{monitor}");
    assert_eq!(said("fs:"), "0");
    assert_eq!(said("left:"), "0 0");
    assert!(said("sentence:").contains("vmm.uid_base = 70000 on are not all in this user namespace, which has 0 to 0, 1 to 65535"));
    assert_nothing_left(&before);
}
