#!/bin/bash
# Starts the node's containerd and imports the test image: `containerd.sh [BIN-DIR]`.
# With BIN-DIR another version replaces the one that runs.
bin=${1:-/usr/bin}
if [ -f /run/containerd.pid ]; then
	kill "$(cat /run/containerd.pid)" 2>/dev/null
	n=0; while [ -d "/proc/$(cat /run/containerd.pid)" ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
fi
PATH=$bin:$PATH setsid "$bin/containerd" --config /etc/containerd/config.toml >>/var/log/containerd.log 2>&1 &
echo $! >/run/containerd.pid
n=0
until "$bin/ctr" version >/dev/null 2>&1; do
	sleep 0.2; n=$((n + 1))
	if [ $n -gt 300 ]; then tail -n 30 /var/log/containerd.log; exit 1; fi
done
for ns in default k8s.io; do
	"$bin/ctr" -n $ns images ls -q | grep -q busybox ||
		"$bin/ctr" -n $ns images import /usr/lib/node/busybox.tar >/dev/null || exit 1
done
