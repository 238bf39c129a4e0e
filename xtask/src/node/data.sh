# Measures files, disks and the network on a node, with each runtime in turn: `data.sh RUNS`. Writes lines of NAME and VALUE
# to /share/figures. The programs are the node's own, which each container sees read-only.
image=docker.io/library/busybox:latest
out=/share/figures
: >$out
note() { echo "$1 $2" >>$out; echo "$1 $2" >&2; }
fail() { echo "$1" >&2; exit 1; }
gateway=10.88.0.1
truncate -s 256M /var/tmp/disk.img
disk=$(losetup --find --show /var/tmp/disk.img)
mkdir -p /var/tmp/volume
start() {
	ctr run --detach --cni --runtime "io.containerd.$1.v2" --memory-limit 536870912 --device "$disk" \
		--mount type=bind,src=/usr,dst=/usr,options=rbind:ro --mount type=bind,src=/usr/lib,dst=/lib,options=rbind:ro \
		--mount type=bind,src=/usr/lib64,dst=/lib64,options=rbind:ro \
		--mount type=bind,src=/var/tmp/volume,dst=/volume,options=rbind:rw $image "data-$1" sleep 100000 || fail "start $1"
}
inside() { ctr task exec --exec-id "e$RANDOM$RANDOM" "data-$runtime" "$@"; }
# A figure of fio's JSON: NAME, what of it, then the job.
fio_figure() {
	local name=$1 what=$2
	shift 2
	inside /usr/bin/fio --output-format=json --name=job --allow_file_create=1 "$@" >/tmp/fio.json || fail "fio $name with $runtime"
	note "$name.$runtime" "$(sed -n '/^{/,$p' /tmp/fio.json | jq ".jobs[0].$what | floor")"
}
files() {
	local where=$1 folder=$2 file="--filename=$2/file --size=64m --ioengine=psync"
	fio_figure "rate-$where-write" write.bw $file --rw=write --bs=1m --end_fsync=1
	fio_figure "rate-$where-read" read.bw $file --rw=read --bs=1m --runtime=3 --time_based
	fio_figure "requests-$where-read" read.iops $file --rw=randread --bs=4k --runtime=3 --time_based
	fio_figure "requests-$where-write" write.iops $file --rw=randwrite --bs=4k --runtime=3 --time_based
	inside /bin/rm "$folder/file"
	for engine in create stat delete; do
		fio_figure "requests-$where-$engine" read.iops --ioengine=file$engine --filesize=4k --nrfiles=500 --openfiles=1 --rw=read --bs=4k --directory="$folder"
	done
	inside /bin/sh -c "rm -f $folder/job.*"
}
iperf3 --server --daemon --pidfile /run/iperf3.pid >/dev/null || fail "start iperf3"
for runtime in runc caisson; do
	start $runtime
	inside /usr/bin/fio --version >/dev/null || fail "fio does not run with $runtime"
done
for n in $(seq 0 "$1"); do
	# The first round warms caches (and the emulator's translations) and is not counted.
	[ "$n" = 1 ] && : >$out
	for runtime in runc caisson; do
		files root /root
		files volume /volume
		begin=$(date +%s%N)
		inside /bin/sh -c "mkdir /root/t && cd /root/t && for d in 1 2 3 4 5; do mkdir \$d; for f in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo \$f > \$d/\$f; done; done; tar c . | (mkdir ../u && cd ../u && tar x); rm -r ../t ../u" || fail "tar with $runtime"
		note "tree-root.$runtime" $((($(date +%s%N) - begin) / 1000000))
		device="--filename=$disk --size=64m --ioengine=libaio --direct=1 --iodepth=8 --runtime=3 --time_based"
		fio_figure rate-disk-read read.bw $device --rw=read --bs=1m
		fio_figure rate-disk-write write.bw $device --rw=write --bs=1m
		fio_figure requests-disk-read read.iops $device --rw=randread --bs=4k
		fio_figure requests-disk-write write.iops $device --rw=randwrite --bs=4k
		for way in out in; do
			reverse=$([ $way = in ] && echo --reverse)
			inside /usr/bin/iperf3 --client $gateway --time 3 --json $reverse >/tmp/iperf.json || fail "iperf3 with $runtime"
			note "stream-$way.$runtime" "$(jq '.end.sum_received.bits_per_second / 1000000 | floor' /tmp/iperf.json)"
		done
		# One packet there and back after the other.
		inside /bin/sh -c "ping -q -c 200 -i 0.005 $gateway" | sed -nE 's#.* = [0-9.]+/([0-9.]+)/.*#\1#p' >/tmp/ping
		note "answer-ping.$runtime" "$(jq '. * 1000 | floor' /tmp/ping)"
	done
done
for runtime in runc caisson; do
	ctr task kill -s SIGKILL "data-$runtime"
	sleep 2
	ctr task delete "data-$runtime" >/dev/null 2>&1
	ctr container delete "data-$runtime"
done
