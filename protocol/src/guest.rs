//! What host and guest agree on without saying it.

/// vsock context id of the host (virtio 1.2, 5.10.4: CID 2 is reserved for it).
pub const HOST_CID: u64 = 2;
/// vsock context id of every guest: each pod has a vsock of its own, so they need not differ.
pub const GUEST_CID: u64 = 3;
/// The host port that the agent connects to and serves [`crate::agent::Agent`] on.
pub const CONTROL_PORT: u32 = 1024;
/// Streams have ports from here on, each used once and known to the agent alone: any process of the guest can
/// ask for a port, and the first that does has the stream.
pub const FIRST_STREAM_PORT: u32 = 1025;

/// virtio-fs tag of the pod's share.
pub const SHARE_TAG: &str = "caisson";
/// Where the agent mounts the share.
pub const SHARE_DIR: &str = "/run/caisson/share";
/// Within the share, a container's folder holds its root file system under this name.
pub const ROOTFS_DIR: &str = "rootfs";
/// Within the share, a container's folder holds its snapshot's folder under this name where the layers below that are
/// disks: in it, what the container writes, and what overlayfs needs besides. Nothing else is made in it, nor any of
/// these two taken away.
pub const SNAPSHOT_DIR: &str = "snapshot";
/// What a container writes, within its snapshot's folder; as containerd's erofs snapshotter has it.
pub const UPPER_DIR: &str = "fs";
/// What overlayfs needs beside it.
pub const WORK_DIR: &str = "work";
/// Beside it, a folder for each of these volumes in which what gives a file rights on the host is kept.
pub const KEEPS_DIR: &str = "keeps";
/// Within the share, a container's folder holds its bind mounts under this name, numbered.
pub const MOUNTS_DIR: &str = "mounts";

/// Where the guest finds a container's bind mount in the share, by its number.
pub fn shared_mount(container: &str, name: &str) -> String {
    format!("{SHARE_DIR}/{container}/{MOUNTS_DIR}/{name}")
}

/// Where the guest finds the folder of a container's snapshot in the share.
pub fn shared_snapshot(container: &str) -> String {
    format!("{SHARE_DIR}/{container}/{SNAPSHOT_DIR}")
}

/// Annotations by which containerd's CRI and CRI-O tell a sandbox from a container in it: the name
/// of the kind (`sandbox` or `container`), and that of the sandbox's id.
pub const POD_ANNOTATIONS: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// Where the guest has the shared memory that all containers of a pod see as their /dev/shm.
pub const SHM_DIR: &str = "/dev/shm";

/// Where the guest keeps the files that all containers of a pod see in their /etc, when the shim
/// and not containerd makes the pod's sandbox.
pub const POD_FILES_DIR: &str = "/run/caisson/files";

/// Where the guest keeps its copies of volumes that the host replaces as a whole, by container and by
/// name among its bind mounts.
pub const VOLUMES_DIR: &str = "/run/caisson/volumes";
/// The link in such a volume that names its present state (Kubernetes'
/// `pkg/volume/util/atomic_writer.go`).
pub const VOLUME_STATE: &str = "..data";

/// Where the guest has sockets that stand for sockets of the host, by container and by name among its bind mounts.
pub const SOCKETS_DIR: &str = "/run/caisson/sockets";

/// Where the guest mounts disks with file systems, by container and by name.
pub const DISKS_DIR: &str = "/run/caisson/disks";

/// Where the guest mounts volumes of memory, which is its own.
pub const MEMORY_DIR: &str = "/run/caisson/memory";

/// The program of a container that only holds a pod's namespaces; the agent itself does what it does.
pub const PAUSE: &str = "/pause";

/// Bytes at the end of guest memory in which the kernel leaves the log of a panic (ramoops).
pub const PANIC_LOG_BYTES: u64 = 64 << 10;

/// The guest kernel's name for the device in a place for network interfaces is `virtio-mmio.N`, with
/// N counted from this number: the devices before it are virtio-fs, vsock and rng.
pub const FIRST_NIC_DEVICE: u32 = 3;

/// That of the device through which memory is added, which is there once it is wanted.
pub const MEMORY_DEVICE: u32 = FIRST_NIC_DEVICE + crate::vmm::NICS;

/// That of the device in the first place for disks: the balloon comes before it.
pub const FIRST_DISK_DEVICE: u32 = MEMORY_DEVICE + 2;
