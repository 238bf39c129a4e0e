#!/bin/bash
# PID 1 of a node: brings the machine up to "containerd answers, the image is imported", then
# waits for a command on the control port. The wait is where the node's saved state is taken.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TERM=dumb
control=/dev/port-control out=/dev/port-out err=/dev/port-err

fail() {
	echo "node: $*" >/dev/console
	{ echo "FAIL $*" >&3; } 2>/dev/null
	sync
	echo o >/proc/sysrq-trigger
	sleep 60
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,gid=5,mode=620 pts /dev/pts
ln -sf pts/ptmx /dev/ptmx
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
ln -sf /proc/self/fd /dev/fd
mkdir -p /run/lock
mount --make-rshared /
if grep -q node.cgroup=v1 /proc/cmdline; then
	# As systemd mounts them: a hierarchy for each controller or pair, and a link for each of a pair. Debian 13 has none of cpuset and memory.
	mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
	for c in blkio cpu,cpuacct devices freezer hugetlb pids; do
		mkdir /sys/fs/cgroup/$c && mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c || fail "mount the cgroups of $c"
	done
	ln -s cpu,cpuacct /sys/fs/cgroup/cpu && ln -s cpu,cpuacct /sys/fs/cgroup/cpuacct
else
	mount -t cgroup2 cgroup /sys/fs/cgroup
	mkdir /sys/fs/cgroup/init
	echo $$ >/sys/fs/cgroup/init/cgroup.procs
	for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$c >/sys/fs/cgroup/cgroup.subtree_control; done
fi
hostname node
ip link set lo up
for m in virtio_console kvm-amd kvm-intel tun vhost_net vhost_vsock loop overlay br_netfilter veth bridge; do modprobe -q $m; done
# A VM that stays, so that KVM does not patch the kernel's text for the first and the last one again
# and again (preempt_notifier_key, apic_sw_disabled): QEMU's emulation lets the other CPU run into a
# breakpoint that is gone already, and the node's kernel dies of it.
qemu-system-x86_64-microvm -accel kvm -M microvm -S -m 2 -nodefaults -no-user-config -display none -daemonize 3>&- || fail "KVM does not work"
# For the same reason network hooks that pods would be the first and the last to use.
ip link set lo up && tc qdisc add dev lo ingress || fail "traffic control does not work"
hooks=$(for hook in prerouting input forward output postrouting; do echo "chain $hook { type filter hook $hook priority 0; }"; done)
printf 'table inet node {\n%s\n}\n' "$hooks" | nft -f - || fail "netfilter does not work"
sysctl -q -w net.ipv4.ip_forward=1 kernel.panic=5
n=0
while [ ! -c $control ]; do
	for p in /sys/class/virtio-ports/*/name; do [ -f "$p" ] && ln -sf "$(basename "${p%/name}")" "/dev/port-$(cat "$p")"; done
	n=$((n + 1)); [ $n -lt 100 ] || fail "no virtio console port"
	sleep 0.1
done
# Open from here to the end: what the host sends while a port is closed is lost.
exec 3<>$control </dev/null >/dev/console 2>&1

# containerd's state must not lie on the overlay that the root is: overlay is no upper of overlay.
mount -t tmpfs -o size=80% state /var/lib/containerd
mkdir -p /etc/containerd
/usr/lib/node/containerd.sh 3>&- || fail "containerd did not start; see the node's console log"

echo READY >&3
# Without a host at the other end the port reads as ended.
until read -r -u 3 verb epoch rest && [ "$verb" = GO ]; do sleep 0.05; done
date -s "@$epoch" >/dev/null
mkdir -p /caisson /node /share
for tag in caisson node share; do
	problem=$(busybox mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=512000 $tag /$tag 2>&1) || fail "mount the shared folder $tag: $problem"
done
cp -a /caisson/. / || fail "install Caisson"
cd /root
# A node that has died under its command is told from one whose command takes its time.
while sleep 10; do echo ALIVE >&3; done &
# A process group of its own, so that what the command leaves behind does not hold the node.
setsid sh /node/command >$out 2>$err 3>&-
code=$?
echo "EXIT $code" >&3
sync
echo o >/proc/sysrq-trigger
sleep 60
