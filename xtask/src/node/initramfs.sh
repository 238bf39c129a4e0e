#!/bin/busybox sh
# The node's initramfs: loads what the root needs, lays a writable overlay over it, switches to it.
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /root
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod "/modules/$m"; done
n=0
while [ ! -b /dev/vda ]; do
	/bin/busybox sleep 0.05; n=$((n + 1))
	[ $n -lt 400 ] || { echo "node: no disk"; /bin/busybox poweroff -f; }
done
/bin/busybox mount -t ext4 -o ro /dev/vda /lower
/bin/busybox mount -t tmpfs -o size=60% upper /upper
/bin/busybox mkdir /upper/data /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /usr/lib/node/init
