//! Block devices and images of the host, as disks of the pod.

use std::time::{Duration, Instant};

use k8s_cri::v1::Device;

use crate::Test;
use crate::containerd::Containerd;
use crate::cri::{Pod, SLEEP};
use crate::ctr::{IMAGE, Pod as PodOfCtr, RUNTIME, host_pid, id, run_pod, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const TESTS: &[Test] = &[
    ("raw_block_volumes_are_read_and_written_as_allowed", raw_block_volumes_are_read_and_written_as_allowed),
    ("a_pod_has_eight_disks_at_a_time_and_any_number_one_after_another", a_pod_has_eight_disks_at_a_time_and_any_number_one_after_another),
    ("a_disk_keeps_to_its_limit", a_disk_keeps_to_its_limit),
    ("a_disk_that_grows_does_so_in_the_pod", a_disk_that_grows_does_so_in_the_pod),
    ("a_file_system_in_an_image_is_mounted_by_one_pod_alone", a_file_system_in_an_image_is_mounted_by_one_pod_alone),
];

pub const ALONE: &[Test] = &[
    ("a_disk_has_a_ring_where_the_host_lets_it", a_disk_has_a_ring_where_the_host_lets_it),
    ("what_was_synced_is_on_the_disk_when_the_monitor_dies", what_was_synced_is_on_the_disk_when_the_monitor_dies),
    ("a_root_file_system_of_its_own_is_a_disk", a_root_file_system_of_its_own_is_a_disk),
];

const MIB: &str = "16M";
/// Disks that a pod has place for.
const PLACES: usize = 8;

/// A block device of the host, with a file behind it.
struct Loop {
    file: String,
    device: String,
}

impl Loop {
    fn make() -> Self {
        let file = format!("/tmp/{}", id("disk"));
        let device = shell(&format!("modprobe loop && truncate -s {MIB} {file} && losetup -f --show {file}"));
        Self { file, device }
    }

    /// As Kubernetes gives it to a container, at a path.
    fn at(&self, path: &str, permissions: &str) -> Device {
        Device { container_path: path.into(), host_path: self.device.clone(), permissions: permissions.into() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        shell(&format!("losetup -d {} && rm {}", self.device, self.file));
    }
}

/// An image with an empty file system in it.
struct Image(String);

impl Image {
    fn make() -> Self {
        let file = format!("/tmp/{}", id("image"));
        shell(&format!("truncate -s {MIB} {file} && mkfs.ext4 -q {file}"));
        Self(file)
    }

    fn mount(&self, option: &str) -> String {
        format!("type=ext4,src={},dst=/data,options={option}", self.0)
    }
}

/// What a file in an image holds, which nobody mounts meanwhile.
fn read(image: &str, name: &str) -> String {
    shell(&format!("e2fsck -fn {image} > /dev/null 2>&1 && debugfs -R 'cat /{name}' {image} 2> /dev/null"))
}

impl Drop for Image {
    fn drop(&mut self) {
        shell(&format!("rm {}", self.0));
    }
}

/// How much longer than the limit asks for it takes is the machine's affair.
fn a_disk_keeps_to_its_limit() {
    let disk = Loop::make();
    let _settings = Config::set("[disk]\nmax_mib = 1\n");
    let mut pod = Pod::start(|_| ());
    let container = pod.run("reader", SLEEP, |config| config.devices = vec![disk.at("/dev/xvda", "rw")]);
    let begin = Instant::now();
    pod.output(&container, "dd if=/dev/xvda of=/dev/null bs=65536 count=64 iflag=direct");
    assert!(begin.elapsed() >= Duration::from_secs(3), "{:?}", begin.elapsed());
}

/// Whether the host's programs may have rings.
struct Rings(String);

impl Rings {
    const SETTING: &str = "/proc/sys/kernel/io_uring_disabled";

    fn allow(yes: bool) -> Self {
        let before = std::fs::read_to_string(Self::SETTING).unwrap();
        std::fs::write(Self::SETTING, if yes { "0" } else { "2" }).unwrap();
        Self(before)
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::SETTING, &self.0);
    }
}

fn a_disk_has_a_ring_where_the_host_lets_it() {
    let disk = Loop::make();
    let _settings = Config::set("[disk]\nio_uring = true\n");
    // Many at a time, each of them with neighbours.
    let script = "cd /tmp; for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=$i bs=64k count=16 2> /dev/null; done; \
        for i in 1 2 3 4 5 6 7 8; do dd if=$i of=/dev/xvda bs=64k seek=$((i * 16 - 16)) conv=notrunc,fsync 2> /dev/null & done; wait; \
        cat 1 2 3 4 5 6 7 8 | md5sum; dd if=/dev/xvda bs=64k count=128 iflag=direct 2> /dev/null | md5sum";
    for allowed in [true, false] {
        let _rings = Rings::allow(allowed);
        let mut pod = Pod::start(|_| ());
        let container = pod.run("writer", SLEEP, |config| config.devices = vec![disk.at("/dev/xvda", "rw")]);
        let seen = pod.output(&container, script);
        let (written, read) = seen.split_once('\n').unwrap();
        assert_eq!(
            (written, written),
            (read, shell(&format!("dd if={} bs=64k count=128 iflag=direct 2> /dev/null | md5sum", disk.device)).as_str())
        );
        let used = shell(&format!("cat /proc/{}/fdinfo/* | grep -c -P '^SqTail:\\t[1-9]'; :", host_pid(&pod.id, "vmm")));
        assert_eq!(used != "0", allowed, "{used} rings were used");
        let warned = shell(&format!(
            "grep {} /var/log/containerd.log | grep -c 'do without io_uring (disk.io_uring): Operation not permitted'; :",
            pod.id
        ));
        assert_eq!(warned, if allowed { "0" } else { "1" });
    }
}

fn raw_block_volumes_are_read_and_written_as_allowed() {
    let disk = Loop::make();
    shell(&format!("echo from the host | dd of={} conv=notrunc,fsync", disk.device));
    let mut pod = Pod::start(|_| ());
    let writer = pod.run("writer", SLEEP, |config| config.devices = vec![disk.at("/dev/xvda", "rw")]);
    let reader = pod.run("reader", SLEEP, |config| config.devices = vec![disk.at("/dev/xvdb", "r")]);
    assert_eq!(pod.output(&writer, "head -n 1 /dev/xvda; cat /sys/class/block/vda/size"), "from the host\n32768");
    pod.output(&writer, "echo from the pod | dd of=/dev/xvda bs=4096 seek=2 conv=notrunc,fsync");
    // Not through a cache that the host has of its own.
    assert_eq!(shell(&format!("dd if={} bs=4096 skip=2 count=1 iflag=direct | head -n 1", disk.device)), "from the pod");
    assert_eq!(pod.output(&reader, "head -n 1 /dev/xvdb"), "from the host");
    assert_ne!(pod.exec(&reader, "echo no | dd of=/dev/xvdb conv=notrunc").exit_code, 0);
    // Neither its cgroup nor its disk would let it.
    assert_eq!(pod.output(&reader, "cat /sys/class/block/vdb/ro /sys/class/block/vdb/serial"), "1\nxvdb");
    assert_eq!(pod.output(&writer, "ls /dev/xvdb 2> /dev/null || echo none"), "none");
}

fn a_pod_has_eight_disks_at_a_time_and_any_number_one_after_another() {
    let disk = Loop::make();
    let mut pod = Pod::start(|_| ());
    for round in 0..=PLACES {
        let name = format!("round{round}");
        let container = pod.run(&name, SLEEP, |config| config.devices = vec![disk.at("/dev/xvda", "rw")]);
        assert_eq!(pod.output(&container, "cd /sys/class/block; echo vd*"), "vda");
        pod.remove(&container);
    }
    // While it runs, and when it ends with one attached, the host's own users are not kept from it.
    let disks: Vec<Loop> = (0..PLACES).map(|_| Loop::make()).collect();
    let all: Vec<Device> = disks.iter().enumerate().map(|(index, disk)| disk.at(&format!("/dev/xvd{index}"), "rw")).collect();
    let container = pod.run("all", SLEEP, |config| config.devices = all);
    assert_eq!(pod.output(&container, "ls -d /sys/class/block/vd* | wc -l"), PLACES.to_string());
    let one_more = pod.create("more", SLEEP, |config| config.devices = vec![disk.at("/dev/xvda", "rw")]).unwrap();
    let error = pod.try_run(&one_more).unwrap_err();
    assert!(error.message().contains("a pod can have 8 disks at a time"), "{error}");
}

fn a_disk_that_grows_does_so_in_the_pod() {
    let disk = Loop::make();
    let pod = PodOfCtr::start("grows", &["--device", &disk.device], SLEEP);
    shell(&format!("truncate -s 24M {} && losetup -c {}", disk.file, disk.device));
    let sectors = || pod.exec(&[], &["cat", "/sys/class/block/vda/size"]).stdout.trim().to_owned();
    eventually(|| sectors() == "49152", "the pod's disk has not grown");
}

fn a_file_system_in_an_image_is_mounted_by_one_pod_alone() {
    let image = Image::make();
    let pod = PodOfCtr::start("writer", &["--mount", &image.mount("rw")], "echo kept > /data/file; sleep 1000");
    eventually(|| pod.exec(&[], &["cat", "/data/file"]).stdout == "kept\n", "the file was not written");
    let refused = run_pod(&["--mount", &image.mount("rw")], &["true"]);
    assert!(refused.code != 0 && refused.stderr.contains(&format!("{}): it is in use by another pod", image.0)), "{refused:?}");
    drop(pod);
    assert_eq!(read(&image.0, "file"), "kept");
    let output = run_pod(&["--mount", &image.mount("ro")], &["sh", "-c", "cat /data/file; echo no > /data/file"]);
    assert!(output.code != 0 && output.stdout == "kept\n" && output.stderr.contains("Read-only file system"), "{output:?}");
    // What is no such file system is the guest's to find out, and one sentence here.
    shell(&format!("dd if=/dev/zero of={} bs=1M count=1 conv=notrunc", image.0));
    let broken = run_pod(&["--mount", &image.mount("rw")], &["true"]);
    assert!(broken.stderr.contains("mount the ext4 file system of disk mount"), "{broken:?}");
    assert_eq!(broken.stderr.matches("Invalid argument").count(), 1, "{broken:?}");
}

fn what_was_synced_is_on_the_disk_when_the_monitor_dies() {
    let (disk, image) = (Loop::make(), Image::make());
    let before = Inventory::take();
    let script = format!("echo synced | dd of={} conv=notrunc,fsync; echo synced > /data/file; sync; touch /done; sleep 1000", disk.device);
    let pod = PodOfCtr::start("dies", &["--device", &disk.device, "--mount", &image.mount("rw")], &script);
    eventually(|| pod.exec(&[], &["ls", "/done"]).code == 0, "the container did not sync");
    shell(&format!("kill -9 {}", pod.host_pid("vmm")));
    pod.wait_for("STOPPED");
    drop(pod);
    assert_nothing_left(&before);
    assert_eq!(shell(&format!("dd if={} bs=512 count=1 iflag=direct | head -n 1", disk.device)), "synced");
    shell(&format!("e2fsck -fy {} > /dev/null; [ $? -le 1 ]", image.0));
    assert_eq!(read(&image.0, "file"), "synced");
}

fn a_root_file_system_of_its_own_is_a_disk() {
    let plugin = "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n  root_path = \"/tmp/c2/blockfile\"\n  \
                  scratch_file = \"/tmp/c2/scratch\"\n  fs_type = \"ext4\"\n  mount_options = []\n";
    let scratch = "truncate -s 64M scratch && mkfs.ext4 -q scratch; modprobe loop";
    let containerd = Containerd::start("2", plugin, scratch);
    let imported = containerd.ctr(&["images", "import", "--no-unpack", "/usr/lib/node/busybox.tar"]);
    assert_eq!(imported.code, 0, "{imported:?}");
    let before = Inventory::take();
    let name = id("root");
    let options = ["run", "--runtime", RUNTIME, "--snapshotter", "blockfile", IMAGE, &name];
    let script = "grep ' / ' /proc/mounts | cut -d ' ' -f 1,3; echo kept > /file; losetup -a | wc -l; exit 4";
    let output = containerd.ctr(&[&options[..], &["sh", "-c", script]].concat());
    assert_eq!((output.code, output.stdout.as_str()), (4, "/dev/vda ext4\n0\n"), "{output:?}");
    // ctr leaves the snapshot, with what the guest wrote.
    let mounts = containerd.ctr(&["snapshots", "--snapshotter", "blockfile", "mounts", "/tmp/root", &name]).stdout;
    let image = mounts.split_whitespace().find(|word| word.contains("/blockfile/")).unwrap_or_else(|| panic!("{mounts}")).to_owned();
    assert_eq!(read(&image, "file"), "kept");
    assert_nothing_left(&before);
}
