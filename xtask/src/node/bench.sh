# Measures on a node: `bench.sh RUNS`. Writes lines of NAME and VALUE to /share/figures.
image=docker.io/library/busybox:latest
out=/share/figures
: >$out
now() { date +%s%N; }
note() { echo "$1 $2" >>$out; echo "$1 $2" >&2; }
ms() { echo $((($2 - $1) / 1000000)); }
run() {
	local name=$1 runtime=$2 begin
	begin=$(now)
	ctr run --rm --runtime "$runtime" $image "bench-$name-$n" true || exit 1
	note "run.$name" "$(ms "$begin" "$(now)")"
}
phase() { note "phase.$1" "$(echo "$line" | sed -nE "s/.*[ ;]$2 ([0-9]+) ms.*/\1/p")"; }
for n in $(seq 0 "$1"); do
	# The first round warms caches (and the emulator's translations) and is not counted.
	[ "$n" = 1 ] && : >$out
	run runc io.containerd.runc.v2
	run caisson io.containerd.caisson.v2
	line=$(grep "machine is ready" /var/log/containerd.log | tail -n 1)
	phase processes "processes"
	phase kernel "guest kernel"
	phase agent "agent"
	note start.caisson "$(echo "$line" | sed -nE 's/.*; ([0-9]+) ms in all.*/\1/p')"
	line=$(grep "shim is ready" /var/log/containerd.log | tail -n 1)
	phase shim "ready:"
	line=$(grep "was created in" /var/log/containerd.log | tail -n 1)
	phase container "container"
	line=$(grep "was taken apart" /var/log/containerd.log | tail -n 1)
	phase teardown "teardown"
	note phase.create "$(grep "was created in" /var/log/containerd.log | tail -n 1 | sed -nE 's/.*created in ([0-9]+) ms.*/\1/p')"
	# The same kernel and initramfs. Without a share the agent ends at once, the kernel panics and
	# the machine resets: from exec to the guest's first program, which is less than ready.
	begin=$(now)
	qemu-system-x86_64 -M microvm,acpi=off,rtc=off,x-option-roms=off -accel kvm -cpu host -m 256 -smp 1 -nodefaults -no-user-config -nographic -no-reboot \
		-kernel /usr/share/caisson/vmlinux -initrd /usr/share/caisson/initramfs \
		-append "reboot=t panic=-1 rdinit=/init quiet 8250.nr_uarts=0 random.trust_cpu=on tsc=reliable no_timer_check rcupdate.rcu_expedited=1" </dev/null >/dev/null 2>&1
	note start.qemu-microvm "$(ms "$begin" "$(now)")"
done
for n in $(seq 1 "$1"); do
	ctr run --detach --runtime io.containerd.caisson.v2 $image "bench-idle-$n" sleep 1000 || exit 1
	sleep 3
	caisson list --json >/tmp/record
	total=0
	for role in shim vmm fs; do
		pid=$(jq -r ".processes[] | select(.role == \"$role\") | .pid" /tmp/record)
		pss=$(sed -nE 's/^Pss: +([0-9]+) kB/\1/p' "/proc/$pid/smaps_rollup")
		if [ $role = vmm ] || [ $role = fs ]; then
			guest=$(sed -n '/guest-memory/,/^Pss:/p' "/proc/$pid/smaps" | { sum=0; while read -r key value _; do [ "$key" = Pss: ] && sum=$((sum + value)); done; echo $sum; })
			pss=$((pss - guest))
		fi
		note "memory.$role" "$pss"
		total=$((total + pss))
	done
	note memory.processes $total
	vmm=$(jq -r '.processes[] | select(.role == "vmm") | .pid' /tmp/record)
	for fd in /proc/"$vmm"/fd/*; do
		case $(readlink "$fd") in *guest-memory*) note memory.guest-touched $(($(stat -Lc %b "$fd") / 2)); break ;; esac
	done
	ctr task kill -s SIGKILL "bench-idle-$n"
	sleep 1
	ctr task delete "bench-idle-$n" 2>/dev/null
done
for file in /usr/bin/containerd-shim-caisson-v2 /usr/bin/caisson /usr/libexec/caisson/caisson-vmm /usr/libexec/caisson/caisson-fs /usr/libexec/caisson/caisson-stand-in /usr/share/caisson/vmlinux /usr/share/caisson/initramfs; do
	note "size.$(basename $file)" $(($(stat -c %s $file) / 1024))
done
# What the jail costs: its entering, and a system call behind its longest filter beside one behind none.
for n in $(seq 1 "$1"); do
	/share/jail-probe cost 1500000000 >/tmp/jail || exit 1
	while read -r name value; do note "$name" "$value"; done </tmp/jail
done
# A neighbour's answer while nothing else happens, and while another pod does its worst.
ctr run --detach --runtime io.containerd.caisson.v2 $image bench-neighbour sleep 100000 || exit 1
answers() {
	for m in $(seq 1 "$2"); do
		begin=$(now)
		ctr task exec --exec-id "a$1$m" bench-neighbour true || exit 1
		note "neighbour.$1" "$(ms "$begin" "$(now)")"
	done
}
answers quiet $(($1 * 2))
ctr run --detach --runtime io.containerd.caisson.v2 --cpu-period 100000 --cpu-quota 50000 --memory-limit 67108864 $image bench-worst sh -c \
	'yes >/dev/null & b() { b | b & }; b; while :; do mkdir -p /tmp/a/b; mv /tmp/a /tmp/d; rm -r /tmp/d; done' || exit 1
sleep 5
answers attacked $(($1 * 2))
for name in worst neighbour; do
	ctr task kill -s SIGKILL "bench-$name"
	sleep 2
	ctr task delete "bench-$name" 2>/dev/null
done
# Last, as it takes long: what it fails to measure takes nothing from the rest.
/share/node-tests bench "$1" >/tmp/cri
code=$?
while read -r name value; do note "$name" "$value"; done </tmp/cri
exit $code
