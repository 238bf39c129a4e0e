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
usr/libexec/caisson/caisson-fs usr/share/caisson/vmlinux usr/share/caisson/initramfs"
BEGIN="# Caisson: begin; made and removed by its installer"
END="# Caisson: end"
ACCOUNT=/var/run/secrets/kubernetes.io/serviceaccount

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

# Writes standard input to a file of the machine, in one step.
replace() {
	mkdir -p "$(dirname "$1")"
	cat >"$1.new"
	[ -z "${2:-}" ] || chmod "$2" "$1.new"
	mv -f "$1.new" "$1"
}

install_files() {
	for file in $ARTEFACTS; do
		[ -f "$FILES/$file" ] || fail "$FILES/$file is missing in the installer"
		cmp -s "$FILES/$file" "$HOST/$file" && continue
		case $file in usr/share/*) mode=644 ;; *) mode=755 ;; esac
		replace "$HOST/$file" $mode <"$FILES/$file" || fail "$file cannot be written on the node"
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

# Puts a configuration in place when it differs from the one that is there, and restarts containerd.
change_config() {
	target=$HOST/$CONTAINERD_CONFIG
	if [ -f "$target" ] && printf '%s\n' "$1" | cmp -s - "$target"; then return; fi
	printf '%s\n' "$1" >"$target.caisson"
	if ! problem=$(on_host containerd --config "$CONTAINERD_CONFIG.caisson" config dump 2>&1 >/dev/null); then
		rm -f "$target.caisson"
		fail "containerd would not take the changed $CONTAINERD_CONFIG, which stays as it was: $problem"
	fi
	mv -f "$target.caisson" "$target"
	# shellcheck disable=SC2086 # a command with its arguments
	on_host $RESTART || fail "containerd did not restart"
	say "changed $CONTAINERD_CONFIG and restarted containerd"
}

add_handler() {
	config=$(foreign_config)
	case $config in *runtimes.caisson]*) say "$CONTAINERD_CONFIG has the handler already"; return ;; esac
	if [ -z "$config" ]; then
		case $(on_host containerd --version) in *" v1."* | *" 1."*) config="version = 2" ;; *) config="version = 3" ;; esac
	fi
	version=$(printf '%s\n' "$config" | config_version)
	case $version in
	2 | 3) ;;
	*) fail "$CONTAINERD_CONFIG is of version ${version:-1}; bring it to version 2 or 3 (containerd config migrate)" ;;
	esac
	mkdir -p "$(dirname "$HOST/$CONTAINERD_CONFIG")"
	change_config "$config
$(our_block "$version")"
}

remove_all() {
	if [ -x "$HOST/usr/bin/caisson" ]; then
		pods=$(on_host caisson list --json | wc -l)
		[ "$pods" -eq 0 ] || fail "$pods pods still run with Caisson on this node; delete them first (caisson list)"
	fi
	if [ -f "$HOST/$CONTAINERD_CONFIG" ] && grep -q "^$BEGIN\$" "$HOST/$CONTAINERD_CONFIG"; then
		config=$(foreign_config)
		case $config in
		"version = 2" | "version = 3")
			# Nothing but what the installer had made.
			rm -f "$HOST/$CONTAINERD_CONFIG"
			# shellcheck disable=SC2086
			on_host $RESTART || fail "containerd did not restart"
			;;
		*) change_config "$config" ;;
		esac
	fi
	for file in $ARTEFACTS; do rm -f "$HOST/$file"; done
	rmdir "$HOST/usr/libexec/caisson" "$HOST/usr/share/caisson" 2>/dev/null || say "the folders of Caisson hold other files, which stay"
	rm -rf "$HOST/run/caisson"
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
	if on_host caisson check; then label '"true"'; else
		label null
		fail "the node lacks what is named above"
	fi
}

case "$*" in
install | "run install") install_all ;;
remove | "run remove") label null && remove_all ;;
*) fail "expected is install, remove, run install or run remove" ;;
esac
if [ "$1" = run ]; then
	trap 'exit 0' TERM INT
	while :; do sleep 3600 & wait $!; done
fi
