#!/bin/bash
# A node without a virtual machine: `host.sh TREE NODE SHARE`, as root. The node's user land (TREE) runs
# on this machine's kernel, in namespaces of its own and, with cgroup v2, a cgroup of its own. Kernel
# modules that it needs stay loaded. NODE holds what is to be installed (root) and the command.
tree=$1 node=$2 share=$3 stage=$4
group=/sys/fs/cgroup/caisson-node-$PPID

fail() {
	echo "node on this machine: $*" >&2
	exit 125
}

unified() { [ -f /sys/fs/cgroup/cgroup.controllers ]; }

case $stage in
"")
	for m in tun overlay br_netfilter veth bridge kvm-intel kvm-amd; do modprobe -q $m 2>/dev/null; done
	if unified; then
		mkdir $group || fail "make a cgroup"
		trap 'echo 1 >$group/cgroup.kill; for n in $(seq 50); do find $group -depth -type d -exec rmdir {} + 2>/dev/null && break; sleep 0.1; done' EXIT
	fi
	(
		if unified; then echo $BASHPID >$group/cgroup.procs || exit 125; fi
		exec unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child bash "$0" "$tree" "$node" "$share" inside
	)
	exit $?
	;;
inside)
	root=$node/node-root
	mkdir -p $root
	mount -t tmpfs node $root || fail "mount a tmpfs"
	mkdir $root/upper $root/work $root/root
	mount -t overlay -o lowerdir=$tree,upperdir=$root/upper,workdir=$root/work node $root/root || fail "lay the node's root over its tree"
	root=$root/root
	mount -t proc proc $root/proc && mount -t sysfs sys $root/sys && mount --rbind /dev $root/dev && mount --make-rslave $root/dev || fail "mount /proc, /sys and /dev"
	if unified; then mount -t cgroup2 cgroup $root/sys/fs/cgroup; else mount --rbind /sys/fs/cgroup $root/sys/fs/cgroup; fi || fail "mount the cgroups"
	mount -t tmpfs -o mode=755 run $root/run
	mount -t tmpfs -o mode=1777 tmp $root/tmp
	# containerd's state must not lie on an overlay: overlay is no upper of overlay.
	mount -t tmpfs state $root/var/lib/containerd
	mount --bind "$share" $root/share || fail "bind the shared folder"
	cp -a "$node/root/." $root/ && cp "$node/command" "$0" $root/node/ || fail "install Caisson"
	# Not chroot: what runs under one may not make user namespaces.
	cd $root && pivot_root . . && umount -l . || fail "enter the node's root"
	mount --make-rshared /
	exec /bin/bash /node/host.sh / / / started
	;;
started)
	export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
	if unified; then
		mkdir /sys/fs/cgroup/init
		echo $$ >/sys/fs/cgroup/init/cgroup.procs
		for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$c >/sys/fs/cgroup/cgroup.subtree_control; done
	fi
	hostname node
	ip link set lo up
	sysctl -q -w net.ipv4.ip_forward=1
	mkdir -p /run/lock
	/usr/lib/node/containerd.sh >/dev/null || fail "containerd did not start: $(tail -n 3 /var/log/containerd.log)"
	cd /root
	sh /node/command
	;;
esac
