#!/bin/sh
# Installs Caisson on a node, upgrades it, or removes it; the program of deploy/installer.yaml.
#
#   install.sh install | remove         does it, and ends
#   install.sh run install | remove     does it, and stays: what a DaemonSet needs
#
# It works on the machine whose first process it sees, so a privileged pod with hostPID needs no
# mounts. What it changes:
#
#   /usr/bin, /usr/libexec/caisson, /usr/share/caisson     files, each replaced by rename: pods that
#                                                          run go on with the old ones
#   containerd's configuration                             a block between two lines that name Caisson;
#                                                          containerd is restarted when it changes
#
# Settings, as environment variables:
#   FILES               the artefacts, as `cargo xtask install --root` lays them out
#   HOST                the machine's root; / for the one that this runs on
#   CONTAINERD_CONFIG   containerd's configuration, on the machine
#   RESTART             what restarts containerd there
#   NODE_NAME           the node's name in the cluster, to be labelled; empty for none
set -eu

FILES=${FILES:-/opt/caisson}
HOST=${HOST:-/proc/1/root}
CONTAINERD_CONFIG=${CONTAINERD_CONFIG:-/etc/containerd/config.toml}
RESTART=${RESTART:-systemctl restart containerd}
NODE_NAME=${NODE_NAME:-}

ARTEFACTS="usr/bin/containerd-shim-caisson-v2 usr/bin/caisson usr/libexec/caisson/caisson-vmm
usr/libexec/caisson/caisson-fs usr/libexec/caisson/caisson-stand-in usr/share/caisson/vmlinux usr/share/caisson/initramfs"
BEGIN="# Caisson: begin; made and removed by its installer"
END="# Caisson: end"
ACCOUNT=/var/run/secrets/kubernetes.io/serviceaccount
# There while containerd is to be restarted, also when the installer was killed before it came to it.
DUE=$HOST/var/lib/caisson/restart-due

say() {
	echo "caisson installer: $*"
}

fail() {
	say "$*" >&2
	exit 1
}

# Runs a command on the machine.
on_host() {
	if [ "$HOST" = / ]; then "$@"; else nsenter --target 1 --mount --uts --ipc --net --pid -- "$@"; fi
}

install_files() {
	changed=
	for file in $ARTEFACTS; do
		[ -f "$FILES/$file" ] || fail "$FILES/$file is missing in the installer"
		cmp -s "$FILES/$file" "$HOST/$file" || changed="$changed $file"
	done
	# All are written before the first is put in place: a full disk leaves what there was.
	for file in $changed; do
		case $file in usr/share/*) mode=644 ;; *) mode=755 ;; esac
		mkdir -p "$(dirname "$HOST/$file")" && cp "$FILES/$file" "$HOST/$file.new" && chmod $mode "$HOST/$file.new" || {
			for other in $changed; do rm -f "$HOST/$other.new"; done
			fail "$file cannot be written on the node"
		}
	done
	for file in $changed; do
		mv -f "$HOST/$file.new" "$HOST/$file" || fail "$file cannot be put in place on the node"
		say "installed /$file"
	done
}

# containerd's configuration without our block.
foreign_config() {
	[ ! -f "$HOST/$CONTAINERD_CONFIG" ] || sed "/^$BEGIN\$/,/^$END\$/d" "$HOST/$CONTAINERD_CONFIG"
}

# The version that a configuration says it is of.
config_version() {
	sed -n 's/^[[:space:]]*version[[:space:]]*=[[:space:]]*\([0-9]*\).*/\1/p' | head -n 1
}

our_block() {
	case $1 in
	2) plugin=io.containerd.grpc.v1.cri ;;
	3) plugin=io.containerd.cri.v1.runtime ;;
	esac
	cat <<-TOML
		$BEGIN
		[plugins."$plugin".containerd.runtimes.caisson]
		  runtime_type = "io.containerd.caisson.v2"
		  pod_annotations = ["io.caisson.*"]
		  privileged_without_host_devices = true
		$END
	TOML
}

# Restarts containerd; what is due stays due until it is done.
restart() {
	# shellcheck disable=SC2086 # a command with its arguments
	on_host $RESTART || fail "containerd did not restart"
	rm -f "$DUE"
	say "restarted containerd"
}

# Puts a configuration in place, of which containerd must make what `$2` matches, and restarts containerd.
change_config() {
	mkdir -p "$(dirname "$HOST/$CONTAINERD_CONFIG")" "$(dirname "$DUE")"
	# A link stays one.
	real=$(on_host readlink -f "$CONTAINERD_CONFIG")
	target=$HOST/$real
	rm -f "$target.caisson"
	# Its owner and mode stay.
	[ ! -f "$target" ] || cp -p "$target" "$target.caisson"
	printf '%s\n' "$1" >"$target.caisson" || fail "$CONTAINERD_CONFIG.caisson cannot be written"
	if ! read=$(on_host containerd --config "$real.caisson" config dump 2>&1); then
		rm -f "$target.caisson"
		fail "containerd would not take the changed $CONTAINERD_CONFIG, which stays as it was: $read"
	fi
	if ! printf '%s\n' "$read" | grep -q "$2"; then
		rm -f "$target.caisson"
		fail "containerd would not see the handler in $CONTAINERD_CONFIG, which stays as it was: does a file that it imports set the same plugin?"
	fi
	: >"$DUE"
	mv -f "$target.caisson" "$target"
	say "changed $CONTAINERD_CONFIG"
}

add_handler() {
	config=$(foreign_config)
	if printf '%s\n' "$config" | grep -q '^[^#]*runtimes\.caisson\]'; then
		say "$CONTAINERD_CONFIG has the handler already, which the installer did not make"
		[ ! -f "$DUE" ] || restart
		return
	fi
	if [ -z "$config" ]; then
		case $(on_host containerd --version) in *" v1."* | *" 1."*) config="version = 2" ;; *) config="version = 3" ;; esac
	fi
	version=$(printf '%s\n' "$config" | config_version)
	case $version in
	2 | 3) ;;
	*) fail "$CONTAINERD_CONFIG is of version ${version:-1}; bring it to version 2 or 3 (containerd config migrate)" ;;
	esac
	wanted="$config
$(our_block "$version")"
	if [ ! -f "$HOST/$CONTAINERD_CONFIG" ] || ! printf '%s\n' "$wanted" | cmp -s - "$HOST/$CONTAINERD_CONFIG"; then
		change_config "$wanted" 'runtimes\.caisson\]'
	fi
	[ ! -f "$DUE" ] || restart
}

remove_handler() {
	if [ -f "$HOST/$CONTAINERD_CONFIG" ] && grep -q "^$BEGIN\$" "$HOST/$CONTAINERD_CONFIG"; then
		config=$(foreign_config)
		case $config in
		"version = 2" | "version = 3")
			# Nothing but what the installer had made.
			mkdir -p "$(dirname "$DUE")" && : >"$DUE"
			rm -f "$HOST/$CONTAINERD_CONFIG"
			;;
		*) change_config "$config" . ;;
		esac
	fi
	[ ! -f "$DUE" ] || restart
	if grep -q '^[^#]*runtimes\.caisson\]' "$HOST/$CONTAINERD_CONFIG" 2>/dev/null; then
		say "$CONTAINERD_CONFIG has a handler that the installer did not make, which stays"
	fi
}

no_pods() {
	[ -x "$HOST/usr/bin/caisson" ] || return 0
	pods=$(on_host caisson list --json) || fail "the pods of this node cannot be listed"
	[ -z "$pods" ] || fail "$(printf '%s\n' "$pods" | wc -l) pods still run with Caisson on this node; delete them first (caisson list)"
}

remove_all() {
	no_pods
	remove_handler
	# One that was started meanwhile.
	no_pods
	if on_host grep -q ' /run/caisson/' /proc/self/mountinfo; then
		fail "something is still mounted below /run/caisson, which stays with all of Caisson's files"
	fi
	for file in $ARTEFACTS; do rm -f "$HOST/$file" "$HOST/$file.new"; done
	rmdir "$HOST/usr/libexec/caisson" "$HOST/usr/share/caisson" 2>/dev/null || say "the folders of Caisson hold other files, which stay"
	rm -rf --one-file-system "$HOST/run/caisson" "$HOST/var/lib/caisson"
	say "removed; /etc/caisson is yours and stays"
}

# Sets or, with null, removes the node's label that the RuntimeClass selects by.
label() {
	[ -n "$NODE_NAME" ] || return 0
	curl --silent --show-error --fail --output /dev/null --max-time 30 --cacert $ACCOUNT/ca.crt \
		--header "Authorization: Bearer $(cat $ACCOUNT/token)" --header "Content-Type: application/merge-patch+json" \
		--request PATCH --data "{\"metadata\":{\"labels\":{\"caisson.dev/ready\":$1}}}" \
		"https://kubernetes.default.svc/api/v1/nodes/$NODE_NAME" || fail "the node could not be labelled"
}

install_all() {
	install_files
	add_handler
	if on_host caisson check; then
		label '"true"'
		return
	fi
	label null
	# A DaemonSet goes on with its other nodes.
	[ "$1" = run ] || fail "the node lacks what is named above"
	say "the node lacks what is named above: it gets no label"
}

case "$*" in
install | "run install") install_all "$1" ;;
remove | "run remove") label null && remove_all ;;
*) fail "expected is install, remove, run install or run remove" ;;
esac
if [ "$1" = run ]; then
	trap 'exit 0' TERM INT
	while :; do sleep 3600 & wait $!; done
fi
