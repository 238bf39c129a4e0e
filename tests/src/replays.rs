//! What let containers and guests out elsewhere, tried here. docs/THREAT-MODEL.md has the table: advisory, what it did, test.
//!
//! Each test tries several of them in one pod: a pod takes long to start under emulation.

use crate::Test;
use crate::ctr::{IMAGE, NODES_PROGRAMS, Pod, RUNTIME, ctr, id, run, run_pod, shell};

pub const TESTS: &[Test] = &[
    ("a_container_is_born_with_nothing_of_its_makers", a_container_is_born_with_nothing_of_its_makers),
    ("an_image_that_lies_about_its_files_leads_nowhere", an_image_that_lies_about_its_files_leads_nowhere),
    ("a_volume_gives_no_way_to_the_hosts_files", a_volume_gives_no_way_to_the_hosts_files),
    ("what_a_privileged_container_may_do_ends_at_its_machine", what_a_privileged_container_may_do_ends_at_its_machine),
    ("a_disk_is_its_bytes_whatever_they_say", a_disk_is_its_bytes_whatever_they_say),
];

/// The most memory of its own that a shim may have had, in KiB, after more than that has gone through it.
const SHIMS_MEMORY: u64 = 16 << 10;

/// A folder of the node, removed in the end.
struct Folder(String);

impl Folder {
    fn make() -> Self {
        let path = format!("/tmp/{}", id("replay"));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// As a mount of a container.
    fn at(&self, inside: &str, options: &str) -> String {
        format!("type=bind,src={},dst={inside},options={options}", self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        shell(&format!("rm -r {}", self.0));
    }
}

/// Lines that a command in a pod prints, `exec` being told what comes before it.
fn says(pod: &Pod, options: &[&str], script: &str) -> Vec<String> {
    let output = pod.exec(options, &["sh", "-c", script]);
    format!("{}{}", output.stdout, output.stderr).lines().map(str::to_owned).collect()
}

fn a_container_is_born_with_nothing_of_its_makers() {
    // Whoever comes into being is seen, and written over.
    let overwrite = "while :; do for exe in /proc/[0-9]*/exe; do case \"$(readlink $exe)\" in /bin/*|'') ;; *) \
        (echo x > $exe) 2> /dev/null && echo $exe >> /overwritten;; esac; done; done";
    let pod = Pod::start("born", &["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"], overwrite);
    // CVE-2024-21626: open files of the runtime. Three are the program's, and one is of the folder that is listed.
    assert_eq!(says(&pod, &[], "echo $(ls /proc/self/fd)"), ["0 1 2 3"]);
    // CVE-2022-24769 and CVE-2022-29162: capabilities that a program hands on.
    assert_eq!(says(&pod, &[], "grep -E 'Cap(Inh|Amb)' /proc/self/status"), ["CapInh:\t0000000000000000", "CapAmb:\t0000000000000000"]);
    // CVE-2023-25809: the cgroups of others.
    let made = says(&pod, &[], "mkdir /sys/fs/cgroup/made");
    assert!(made[0].ends_with("Read-only file system"), "{made:?}");
    // CVE-2020-15257: the shim's socket, which has no path.
    assert_eq!(says(&pod, &[], "grep -c @ /proc/net/unix"), ["0"]);
    // CVE-2024-21626 again: a working folder that is an open file of the runtime.
    for number in 3..8 {
        let cwd = format!("/proc/self/fd/{number}");
        let output = pod.exec(&["--cwd", &cwd], &["ls", "-a", ".", "../.."]);
        assert!(output.code != 0 && output.stdout.is_empty() && output.stderr.contains("working folder"), "{number}: {output:?}");
    }
    // CVE-2019-5736: the runtime's own program, as one to start and as one to write over.
    let output = pod.exec(&[], &["/proc/self/exe"]);
    assert_ne!(output.code, 0, "{output:?}");
    let overwritten = says(&pod, &[], "cat /overwritten");
    assert!(overwritten[0].ends_with("No such file or directory"), "{overwritten:?}");
    assert_eq!(says(&pod, &[], "echo alive"), ["alive"]);
    // CVE-2022-31030: output that is kept.
    let flood = pod.exec(&[], &["dd", "if=/dev/zero", "bs=1M", "count=24"]);
    assert_eq!((flood.code, flood.stdout.len()), (0, 24 << 20));
    let status = std::fs::read_to_string(format!("/proc/{}/status", pod.host_pid("shim"))).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(u64::MAX);
    assert!(most < SHIMS_MEMORY, "{most} KiB");
    // CVE-2021-41103 and CVE-2026-1386: users of the host, in the folders of its pods.
    let stranger =
        format!("setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'ls /run/caisson/default/{}; touch /run/caisson/x'", pod.id);
    let output = run("bash", &["-c", &stranger]);
    assert_eq!(output.stderr.matches("Permission denied").count(), 2, "{output:?}");
}

fn an_image_that_lies_about_its_files_leads_nowhere() {
    let (root, volume, target) = (Folder::make(), Folder::make(), Folder::make());
    shell(&format!(
        "cd {} && mkdir bin && cp /bin/busybox bin/ && ln -s busybox bin/sh && mkdir elsewhere && ln -s elsewhere proc",
        root.0
    ));
    let try_image = |options: &[&str], script: &str| {
        let name = id("image");
        let end = ["--rootfs", &root.0, &name, "/bin/sh", "-c", script];
        let output = ctr(&[&["run", "--rm", "--runtime", RUNTIME], options, &end].concat());
        ctr(&["container", "delete", &name]);
        output
    };
    // CVE-2023-27561 and CVE-2023-28642: /proc is a link, so that what is hidden there is not.
    let output = try_image(&[], "busybox wc -c < /elsewhere/kcore; busybox wc -c < /proc/kcore; echo x > /proc/sys/kernel/printk");
    assert!(output.code != 0 && output.stdout.lines().all(|line| line == "0"), "{output:?}");
    // CVE-2025-31133: what hides files is another one.
    shell(&format!("ln -s /proc/version {}/null", volume.0));
    let output = try_image(&["--mount", &volume.at("/dev", "rbind:rw")], "echo runs");
    assert!(output.stdout.is_empty() && output.stderr.contains("/dev/null is not the null device"), "{output:?}");
    // CVE-2021-30465 and CVE-2024-45310: the place for a mount is a link in a volume.
    shell(&format!("ln -s {} {}/link", target.0, volume.0));
    let mounts = [volume.at("/data", "rbind:rw"), target.at("/data/link/made", "rbind:rw")];
    let output = try_image(&["--mount", &mounts[0], "--mount", &mounts[1]], "echo runs");
    assert_eq!(shell(&format!("ls -A {}", target.0)), "", "{output:?}");
    // CVE-2021-43784: a field of the specification that is longer than its length can say.
    let long = target.at(&format!("/{}", "x".repeat(70_000)), "rbind:rw");
    let output = try_image(&["--mount", &long], "echo runs");
    assert!(output.code != 0 && output.stdout.is_empty(), "{}", output.stdout);
}

fn a_volume_gives_no_way_to_the_hosts_files() {
    let (volume, secret, kept) = (Folder::make(), Folder::make(), Folder::make());
    let disk = shell(&format!(
        "modprobe loop; cd {}; echo secret > file; truncate -s 1M disk; echo secret | dd of=disk conv=notrunc status=none; losetup -f --show disk",
        secret.0
    ));
    shell(&format!("cp -a {disk} {}/disk; mkfifo {}/pipe; echo kept > {}/file; chmod 644 {}/file", volume.0, volume.0, kept.0, kept.0));
    let mounts = [volume.at("/data", "rbind:rw"), kept.at("/kept", "rbind:ro")];
    let options = [&NODES_PROGRAMS[..], &["--privileged", "--mount", &mounts[0], "--mount", &mounts[1]]].concat();
    let pod = Pod::start("volume", &options, "sleep 1000");
    // CVE-2020-2026 and CVE-2026-47243: a link that leads out of the share.
    let script =
        format!("ln -s {}/file /data/link; cat /data/link; ln -s ../../../../../..{}/file /data/up; cat /data/up", secret.0, secret.0);
    let said = says(&pod, &[], &script);
    assert!(said.len() == 2 && said.iter().all(|line| line.ends_with("No such file or directory")), "{said:?}");
    // CVE-2020-28914: a volume that is read-only for the guest's kernel alone.
    let said =
        says(&pod, &[], "mount -o remount,rw /kept && echo remounted; echo other > /kept/file; rm -f /kept/file; chmod 777 /kept/file");
    assert_eq!(said[0], "remounted");
    assert_eq!(shell(&format!("cat {}/file; stat -c %a {}/file", kept.0, kept.0)), "kept\n644", "{said:?}");
    // CVE-2020-35517: a device of the host, by its node in the volume.
    let said = says(&pod, &[], "head -c 6 /data/disk");
    assert!(!said.concat().contains("secret"), "{said:?}");
    // CVE-2023-2861: a FIFO of the host that would be opened there.
    let feeder = format!("timeout 20 sh -c 'echo secret > {}/pipe' & sleep 0.2", volume.0);
    let fed = std::thread::spawn(move || run("bash", &["-c", &feeder]));
    let said = says(&pod, &[], "timeout 2 cat /data/pipe");
    assert!(!said.concat().contains("secret"), "{said:?}");
    shell(&format!("timeout 5 cat {}/pipe", volume.0));
    fed.join().unwrap();
    // CVE-2022-0358: a program of a group to whom its maker does not belong.
    let user = |script: &str| format!("setpriv --reuid 1000 --regid 1000 --clear-groups --bounding-set=-all sh -c '{script}'");
    says(&pod, &[], "umask 0; mkdir -m 2777 /shared; cp /bin/busybox /shared/source; chmod 2755 /shared/source; touch /shared/written");
    let make = user(
        "umask 0; cp /shared/source /shared/made; /bin/busybox mknod -m 2777 /shared/pipe p; cd /shared; stat -c \"%a %u:%g\" made pipe",
    );
    assert_eq!(says(&pod, &[], &make), ["755 1000:0", "777 1000:0"]);
    // CVE-2021-20263: a file that is written by another keeps what it may do.
    let capable = "chmod 4777 /shared/written; setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 /shared/written; \
        getfattr -n security.capability -e hex /shared/written 2> /dev/null | grep -c =";
    assert_eq!(says(&pod, &[], capable), ["1"]);
    says(&pod, &[], &user("echo more >> /shared/written"));
    let said = says(&pod, &[], "stat -c %a /shared/written; getfattr -n security.capability /shared/written 2>&1 | grep -c =");
    assert_eq!(said, ["777", "0"]);
    for write in ["echo x > written", "truncate -s 1 written", "fallocate -l 8192 written", "dd if=source of=written conv=notrunc count=1"]
    {
        let write = user(&format!("cd /shared; {write} 2> /dev/null"));
        assert_eq!(says(&pod, &[], &format!("chmod 4777 /shared/written; {write}; stat -c %a /shared/written")), ["777"], "{write}");
    }
    drop(pod);
    shell(&format!("losetup -d {disk}"));
}

fn what_a_privileged_container_may_do_ends_at_its_machine() {
    let files = "sha256sum /usr/share/caisson/* /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe";
    let before = shell(files);
    let pod = Pod::start("privileged", &["--privileged"], "sleep 1000");
    // CVE-2022-0492: a program that the kernel starts when a cgroup is empty.
    let agent = "mkdir -p /tmp/cgroup; for kind in rdma memory cpuset; do mount -t cgroup -o $kind cgroup /tmp/cgroup && echo mounted; done; \
        echo '#!/bin/sh' > /cmd; echo 'touch /tmp/replay-escaped' >> /cmd; chmod +x /cmd; echo /cmd > /tmp/cgroup/release_agent; \
        find /sys/fs/cgroup -name release_agent";
    let said = says(&pod, &[], agent);
    assert!(!said.iter().any(|line| line == "mounted" || line.starts_with("/sys")), "{said:?}");
    // CVE-2022-0811: a program that the kernel starts when one crashes, or asks for a module. They are the guest's kernel's.
    let crash = "echo '|/cmd' > /proc/sys/kernel/core_pattern; echo /cmd > /proc/sys/kernel/modprobe; ulimit -c unlimited; sh -c 'kill -SEGV $$'; \
        mount -t nothing none /tmp/cgroup; sleep 1; cat /proc/sys/kernel/core_pattern";
    let said = says(&pod, &[], crash);
    assert_eq!(said[0], "|/cmd", "{said:?}");
    // CVE-2020-2023, CVE-2020-2025 and CVE-2026-24834: what the guest was booted from, by its disk or its memory.
    let devices = "grep -c . /proc/partitions; for numbers in '259 0' '254 0' '8 0' '31 0'; do rm -f /node; mknod /node b $numbers && cat /node; done; \
        mknod /mem c 1 1; dd if=/dev/urandom of=/mem bs=4096 seek=256 count=4";
    says(&pod, &[], devices);
    // Its own reset, which is the pod's end and nobody else's.
    let neighbour = Pod::start("neighbour", &[], "sleep 1000");
    says(&pod, &[], "reboot -f");
    pod.wait_for("STOPPED");
    assert_eq!(neighbour.exec(&[], &["echo", "alive"]).stdout, "alive\n");
    assert_eq!(shell(files), before);
    assert!(!std::path::Path::new("/tmp/replay-escaped").exists());
}

fn a_disk_is_its_bytes_whatever_they_say() {
    let folder = Folder::make();
    let disk = shell(&format!("modprobe loop; cd {}; echo secret > secret; truncate -s 1M disk; losetup -f --show disk", folder.0));
    // An image of qcow2 with a file behind it, as it would begin (docs/interop/qcow2.txt of QEMU): magic, version, where the
    // file's name is, how long it is, bits of a cluster, and the size.
    let name = format!("{}/secret", folder.0);
    let bytes = [
        &b"QFI\xfb\0\0\0\x02\0\0\0\0\0\0\0\x48\0\0\0"[..],
        &[name.len() as u8],
        b"\0\0\0\x10\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ]
    .concat();
    let octal: String = bytes.iter().take(72).map(|byte| format!("\\{byte:03o}")).collect();
    let write = format!("printf '{octal}{name}' | dd of={disk} conv=notrunc,fsync 2> /dev/null; md5sum < {disk}");
    let written = run_pod(&["--device", &disk], &["sh", "-c", &write]);
    // Whoever has it next, and the host, see what was written.
    let next =
        run_pod(&["--device", &disk], &["sh", "-c", &format!("md5sum < {disk}; grep -c secret {disk}; blockdev --getsize64 {disk}")]);
    let host = shell(&format!("dd if={disk} iflag=direct bs=64k status=none | md5sum; losetup -d {disk}"));
    let lines: Vec<&str> = next.stdout.lines().collect();
    assert_eq!(
        (written.stdout.trim(), lines.as_slice()),
        (host.as_str(), [host.as_str(), "1", "1048576"].as_slice()),
        "{written:?} {next:?} {IMAGE}"
    );
}
