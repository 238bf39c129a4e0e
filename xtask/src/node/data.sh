# Measures files, disks and the network on a node, in a container of each runtime and in QEMU's microvm with Debian's virtiofsd, in
# turn: `data.sh RUNS`. Writes lines of NAME and VALUE to /share/figures. The programs are the node's own, which each sees read-only.
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
# The same kernel, disk and bridge, and the node's programs. It looks for commands in a folder that it shares.
tree=/var/tmp/microvm
start_qemu() {
	mkdir -p $tree/{usr,dev,proc,sys,tmp,run,volume,x} && ln -s usr/bin usr/sbin usr/lib usr/lib64 $tree/
	mount --bind /usr $tree/usr && mount --bind /var/tmp/volume $tree/volume || fail "lay out QEMU's share"
	cat >$tree/x/init <<-'INIT'
		#!/usr/bin/bash
		export PATH=/usr/sbin:/usr/bin HOME=/volume
		mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev && mount -t tmpfs tmp /tmp
		ip link set lo up && ip address add 10.88.200.1/16 dev eth0 && ip link set eth0 up
		while :; do
			[ -e /x/go ] && { bash /x/go >/x/out 2>/x/err; echo $? >/tmp/code; rm /x/go; cp /tmp/code /x/code.new; mv /x/code.new /x/code; }
			sleep 0.1
		done
	INIT
	chmod +x $tree/x/init
	/usr/libexec/virtiofsd --socket-path=/run/virtiofsd.sock --shared-dir $tree --cache auto --sandbox none --announce-submounts --log-level error &
	n=0; until [ -S /run/virtiofsd.sock ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 100 ] || fail "start virtiofsd"; done
	# As a pod has it: a tap beside the interface of a network namespace, joined to it by traffic control.
	ip netns add microvm && ip link add microvm type veth peer name eth0 netns microvm address 02:00:00:88:20:01 && ip link set microvm master cni0 up || fail "make QEMU's network"
	ip netns exec microvm bash -c 'ip link set eth0 up; ip tuntap add dev tap0 mode tap vnet_hdr; ip link set tap0 up
		for pair in eth0.tap0 tap0.eth0; do
			tc qdisc add dev ${pair%.*} ingress && tc filter add dev ${pair%.*} parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev ${pair#*.} || exit 1
		done' || fail "join QEMU's tap"
	ip netns exec microvm qemu-system-x86_64 -M microvm,acpi=off,rtc=off,x-option-roms=off,memory-backend=memory -object memory-backend-memfd,id=memory,size=512M,share=on \
		-accel kvm -cpu host -m 512 -smp 1 -nodefaults -no-user-config -nographic -no-reboot -kernel /usr/share/caisson/vmlinux \
		-chardev socket,id=share,path=/run/virtiofsd.sock -device vhost-user-fs-device,chardev=share,tag=share \
		-drive "file=$disk,format=raw,if=none,id=disk,cache=writeback" -device virtio-blk-device,drive=disk \
		-netdev tap,id=network,ifname=tap0,script=no,downscript=no,vhost=on -device virtio-net-device,netdev=network,mac=02:00:00:88:20:01 -device virtio-balloon-device,free-page-reporting=on \
		-append "root=share rootfstype=virtiofs rw init=/x/init reboot=t panic=-1 quiet random.trust_cpu=on tsc=reliable no_timer_check" </dev/null >/tmp/qemu.log 2>&1 &
	qemu=$!
}
inside() {
	if [ "$runtime" != qemu ]; then
		ctr task exec --exec-id "e$RANDOM$RANDOM" "data-$runtime" "$@"
		return
	fi
	rm -f $tree/x/code
	printf '%q ' "$@" >$tree/x/go.new && mv $tree/x/go.new $tree/x/go
	local n=0
	until [ -e $tree/x/code ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 1200 ] || { cat /tmp/qemu.log >&2; fail "QEMU's guest does not answer"; }; done
	cat $tree/x/out
	return "$(cat $tree/x/code)"
}
# A figure of fio's JSON: NAME, what of it, then the job.
fio_figure() {
	local name=$1 what=$2
	shift 2
	inside /usr/bin/fio --output-format=json --name=job --allow_file_create=1 "$@" >/tmp/fio.json || fail "fio $name with $runtime"
	note "$name.$runtime" "$(sed -n '/^{/,$p' /tmp/fio.json | jq ".jobs[0].$what | floor")"
}
# Of fio's 500 files, when the guest has to ask for each again.
LOOK='sleep 1.5; my @files = map { "$ARGV[0]/job.0.$_" } 0 .. 499; my $begin = time; -e $_ or die "$_: $!" for @files; printf "%d\n", @files / (time - $begin)'
files() {
	local where=$1 folder=$2 file="--filename=$2/file --size=64m --ioengine=psync"
	fio_figure "rate-$where-write" write.bw $file --rw=write --bs=1m --end_fsync=1
	# It forgets what the guest or the host has of the file, again and again; the next one does not.
	fio_figure "rate-$where-read" read.bw $file --rw=read --bs=1m --runtime=3 --time_based
	fio_figure "rate-$where-cached" read.bw $file --rw=read --bs=1m --runtime=3 --time_based --invalidate=0
	fio_figure "requests-$where-read" read.iops $file --rw=randread --bs=4k --runtime=3 --time_based
	fio_figure "requests-$where-write" write.iops $file --rw=randwrite --bs=4k --runtime=3 --time_based
	inside /bin/rm "$folder/file"
	local each="--filesize=4k --nrfiles=500 --openfiles=1 --rw=read --bs=4k --directory=$folder"
	fio_figure "requests-$where-create" read.iops --ioengine=filecreate $each
	# fio would look at them before it begins, and then find what the guest knows.
	inside /usr/bin/perl -MTime::HiRes=sleep,time -e "$LOOK" "$folder" >/tmp/look || fail "look at files with $runtime"
	note "requests-$where-stat.$runtime" "$(cat /tmp/look)"
	fio_figure "requests-$where-delete" read.iops --ioengine=filedelete $each
	inside /bin/sh -c "rm -f $folder/job.*"
}
# A hundred small files, written, packed, unpacked and deleted.
small_files() {
	local begin
	begin=$(date +%s%N)
	inside /bin/sh -c "mkdir $1/t && cd $1/t && for d in 1 2 3 4 5; do mkdir \$d; for f in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo \$f > \$d/\$f; done; done; tar c . | (mkdir ../u && cd ../u && tar x); rm -r ../t ../u" || fail "tar with $runtime"
	note "tree-$2.$runtime" $((($(date +%s%N) - begin) / 1000000))
}
iperf3 --server --daemon --pidfile /run/iperf3.pid >/dev/null || fail "start iperf3"
for runtime in runc caisson; do
	start $runtime
	inside /usr/bin/fio --version >/dev/null || fail "fio does not run with $runtime"
done
start_qemu
for n in $(seq 0 "$1"); do
	# The first round warms caches (and the emulator's translations) and is not counted.
	[ "$n" = 1 ] && : >$out
	for runtime in runc caisson qemu; do
		# Its guest looks for commands without end, for which the others are not to pay.
		kill -$([ $runtime = qemu ] && echo CONT || echo STOP) $qemu
		if [ $runtime != qemu ]; then
			files root /root
			small_files /root root
		fi
		files volume /volume
		small_files /volume volume
		blocks=$([ $runtime = qemu ] && echo /dev/vda || echo "$disk")
		device="--filename=$blocks --size=64m --ioengine=libaio --direct=1 --iodepth=8 --runtime=3 --time_based"
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
kill -KILL $qemu
for runtime in runc caisson; do
	ctr task kill -s SIGKILL "data-$runtime"
	sleep 2
	ctr task delete "data-$runtime" >/dev/null 2>&1
	ctr container delete "data-$runtime"
done
# What two pods that read the same 64 MiB take of the host's memory for it beside its cache, when they have copies and when it is mapped.
head -c 64M /dev/urandom >/var/tmp/volume/model
touched() {
	for vmm in $(pgrep -x caisson-vmm); do
		for fd in /proc/"$vmm"/fd/*; do
			case $(readlink "$fd") in *guest-memory*) echo $(($(stat -Lc %b "$fd") / 2)); break ;; esac
		done
	done | { sum=0; while read -r kib; do sum=$((sum + kib)); done; echo $sum; }
}
mkdir -p /etc/caisson
for how in copied mapped; do
	echo "fs.window_mib = $([ $how = mapped ] && echo 128 || echo 0)" >/etc/caisson/config.toml
	for reader in 1 2; do
		ctr run --detach --runtime io.containerd.caisson.v2 --mount type=bind,src=/var/tmp/volume,dst=/volume,options=rbind:ro $image "reader-$reader" sleep 100000 || fail "start a reader"
	done
	# They give back what their start has freed.
	sleep 20
	before=$(touched)
	for reader in 1 2; do ctr task exec --exec-id "read$reader" "reader-$reader" md5sum /volume/model >/dev/null || fail "read with a window"; done
	note "memory-readers.$how" $(($(touched) - before))
	for reader in 1 2; do
		ctr task kill -s SIGKILL "reader-$reader"
		sleep 2
		ctr task delete "reader-$reader" >/dev/null 2>&1
		ctr container delete "reader-$reader"
	done
done
