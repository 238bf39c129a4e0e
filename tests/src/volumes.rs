//! What containers see of the host's folders, and what stays of them on the host.

use k8s_cri::v1::{Mount, StartContainerRequest};

use crate::Test;
use crate::cri::{Pod, SLEEP};
use crate::ctr::{NODES_PROGRAMS, Pod as PodOfCtr, RUNTIME, ctr, id, run, run_pod, shell};
use crate::exercise;
use crate::faults::Config;
use crate::host::eventually;

pub const TESTS: &[Test] = &[
    ("mounts_of_the_host_stay_when_a_container_goes", mounts_of_the_host_stay_when_a_container_goes),
    ("mounts_of_the_host_come_into_a_container_as_it_asks", mounts_of_the_host_come_into_a_container_as_it_asks),
    ("flags_of_the_hosts_mounts_hold_in_containers", flags_of_the_hosts_mounts_hold_in_containers),
    ("the_file_server_can_write_no_more_than_the_container", the_file_server_can_write_no_more_than_the_container),
    ("what_is_mounted_in_a_read_only_volume_has_its_own_rights", what_is_mounted_in_a_read_only_volume_has_its_own_rights),
    ("a_pod_with_all_of_the_hosts_files_has_no_copies_of_other_pods", a_pod_with_all_of_the_hosts_files_has_no_copies_of_other_pods),
    ("a_quota_of_the_host_holds_in_a_pod", a_quota_of_the_host_holds_in_a_pod),
    ("a_file_without_a_name_is_as_good_as_others_and_may_be_given_one", a_file_without_a_name_is_as_good_as_others_and_may_be_given_one),
    ("a_link_out_of_the_image_is_refused", a_link_out_of_the_image_is_refused),
    ("images_may_have_links_and_locked_folders", images_may_have_links_and_locked_folders),
    ("watchers_hear_of_a_volume_that_kubelet_replaces", watchers_hear_of_a_volume_that_kubelet_replaces),
    ("sockets_of_the_host_are_refused_or_dead", sockets_of_the_host_are_refused_or_dead),
    ("connections_to_a_socket_of_the_host_are_carried_to_it", connections_to_a_socket_of_the_host_are_carried_to_it),
    ("what_did_not_change_is_read_once_and_what_did_is_read_again", what_did_not_change_is_read_once_and_what_did_is_read_again),
    ("a_guest_sees_more_files_than_its_server_may_hold_open", a_guest_sees_more_files_than_its_server_may_hold_open),
    ("a_memory_volume_is_the_guests_and_shared_by_its_containers", a_memory_volume_is_the_guests_and_shared_by_its_containers),
];

pub const ALONE: &[Test] = &[
    ("writes_that_the_guest_collects_reach_the_host", writes_that_the_guest_collects_reach_the_host),
    ("a_file_in_a_window_is_the_hosts_own_memory", a_file_in_a_window_is_the_hosts_own_memory),
    ("files_hold_what_was_done_to_them_however_they_are_kept", files_hold_what_was_done_to_them_however_they_are_kept),
];

/// A folder of the host with a file system mounted in it, both in a shared tree as systemd makes it.
struct Nested(String);

impl Nested {
    fn make(options: &str) -> Self {
        let folder = format!("/tmp/{}", id("nested"));
        shell(&format!(
            "mkdir -p {folder} && mount -t tmpfs outer {folder} && mount --make-shared {folder} && mkdir {folder}/inner && \
             mount -t tmpfs -o {options} inner {folder}/inner && mount --make-shared {folder}/inner"
        ));
        Self(folder)
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(&format!(" {}/inner ", self.0))
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        shell(&format!("umount -R {0} && rmdir {0}", self.0));
    }
}

/// A folder of the host with ext4 of its own mounted on it.
struct Ext4(String);

impl Ext4 {
    fn make(size: &str, made_with: &str, mounted_with: &str) -> Self {
        let folder = format!("/tmp/{}", id("ext4"));
        shell(&format!(
            "modprobe -a loop quota_v2; mkdir {folder} && truncate -s {size} {folder}.img && mkfs.ext4 -q {made_with} {folder}.img && \
             mount -o loop{mounted_with} {folder}.img {folder}"
        ));
        Self(folder)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        shell(&format!("umount {0} && rmdir {0} && rm {0}.img", self.0));
    }
}

fn mounts_of_the_host_stay_when_a_container_goes() {
    let nested = Nested::make("size=1m");
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", nested.0);
    let output = run_pod(&["--mount", &mount], &["sh", "-c", "echo kept > /data/inner/file && cat /data/inner/file"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "kept\n"), "{output:?}");
    assert!(nested.is_mounted(), "what the host had mounted was unmounted with the container");
    assert_eq!(shell(&format!("cat {}/inner/file", nested.0)), "kept");
    // Not even a file server that is still there holds it: the host can take it away.
    shell(&format!("umount {0}/inner && mount -t tmpfs inner {0}/inner", nested.0));
}

fn mounts_of_the_host_come_into_a_container_as_it_asks() {
    for (propagation, follows) in [("rprivate", false), ("rslave", true), ("rshared", true)] {
        let nested = Nested::make("size=1m");
        let mount = format!("type=bind,src={},dst=/data,options=rbind:rw:{propagation}", nested.0);
        let pod = PodOfCtr::start("comes", &["--privileged", "--mount", &mount], SLEEP);
        shell(&format!("mkdir {0}/later && mount -t tmpfs later {0}/later && touch {0}/later/file", nested.0));
        let seen = || pod.exec(&[], &["ls", "-A", "/data/later"]).stdout;
        if follows {
            eventually(|| seen() == "file\n", "what the host mounts later is not in the container");
            // The pod knows files of it, so that it is in use.
            shell(&format!("umount --lazy {}/later", nested.0));
            eventually(|| seen().is_empty(), "what the host unmounts stays in the container");
        } else {
            assert_eq!(seen(), "", "{propagation}");
        }
        // The other way it is the guest's alone.
        let output = pod.exec(&[], &["sh", "-c", "mkdir /data/own && mount --bind /bin /data/own && ls -A /data/own"]);
        assert!(output.code == 0 && output.stdout.contains("busybox"), "{output:?}");
        assert_eq!(shell(&format!("ls -A {}/own", nested.0)), "", "{propagation}");
    }
}

fn flags_of_the_hosts_mounts_hold_in_containers() {
    let nested = Nested::make("ro,noexec");
    let mount = format!("type=bind,src={}/inner,dst=/data,options=rbind:rw", nested.0);
    let output = run_pod(&["--mount", &mount], &["sh", "-c", "echo x > /data/file"]);
    assert!(output.code != 0 && output.stderr.contains("Read-only file system"), "{output:?}");
}

/// A guest that breaks its own rules has the file server's rights.
fn the_file_server_can_write_no_more_than_the_container() {
    let folder = format!("/tmp/{}", id("kept"));
    shell(&format!("mkdir -p {folder}"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:ro");
    let pod = PodOfCtr::start("rights", &["--mount", &mount], "sleep 1000");
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", pod.host_pid("fs"))).unwrap();
    let is_read_only = |end: &str| {
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[4].ends_with(end));
        fields.unwrap_or_else(|| panic!("{end} is not in {mounts}"))[5].split(',').any(|option| option == "ro")
    };
    assert!(is_read_only("/mounts/0") && !is_read_only("/rootfs"), "{mounts}");
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    assert!(root.split(' ').nth(5).unwrap().split(',').any(|option| option == "ro"), "{mounts}");
    drop(pod);
    shell(&format!("rmdir {folder}"));
}

fn what_is_mounted_in_a_read_only_volume_has_its_own_rights() {
    let nested = Nested::make("size=1m");
    let mut pod = Pod::start(|_| ());
    let volume = |recursive: bool| Mount {
        container_path: "/data".into(),
        host_path: nested.0.clone(),
        readonly: true,
        recursive_read_only: recursive,
        ..Mount::default()
    };
    let container = pod.run("plain", SLEEP, |config| config.mounts = vec![volume(false)]);
    let refused = pod.exec(&container, "touch /data/file");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{refused:?}");
    assert_eq!(pod.output(&container, "echo inner > /data/inner/file && cat /data/inner/file"), "inner");
}

fn a_pod_with_all_of_the_hosts_files_has_no_copies_of_other_pods() {
    let other = PodOfCtr::start("other", &[], "sleep 1000");
    assert_eq!(shell(&format!("ls -d /proc/{}/root/{}/rootfs/bin | wc -l", other.host_pid("fs"), other.id)), "1");
    assert_eq!(shell("find /run/caisson -name rootfs"), "", "the other pod's files are the host's to see");
    let all = "type=bind,src=/,dst=/host,options=rbind:rw";
    let script = "cat /host/etc/debian_version; find /host/run/caisson -name rootfs";
    let output = run_pod(&["--mount", all], &["sh", "-c", script]);
    assert_eq!((output.code, output.stdout.lines().count()), (0, 1), "{output:?}");
    // Nothing was taken from the other pod, nor from the host.
    assert_eq!(other.exec(&[], &["sh", "-c", "ls / | grep -c bin"]).code, 0);
    assert_eq!(shell("mountpoint -q /proc && mountpoint -q /sys/fs/cgroup && echo there"), "there");
}

fn a_quota_of_the_host_holds_in_a_pod() {
    let mounted = Ext4::make("32M", "-O quota -E quotatype=usrquota", ",usrquota");
    let folder = &mounted.0;
    shell(&format!("setquota -u 1000 0 1024 0 4 {folder} && chmod 777 {folder}"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let script = "cd /data; dd if=/dev/zero of=much bs=64k count=64 2>&1 | grep -o quota; stat -c %s much; rm much; for i in 1 2 3 4 5; do echo > $i; done";
    let output = run_pod(&["--user", "1000", "--mount", &mount], &["sh", "-c", script]);
    assert!(output.stdout == "quota\n1048576\n" && output.stderr.contains("create 5: Disk quota exceeded"), "{output:?}");
    // Another one's is not used up by that, and root has none.
    let output =
        run_pod(&["--mount", &mount], &["sh", "-c", "dd if=/dev/zero of=/data/root bs=64k count=64 2> /dev/null && stat -c %s /data/root"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "4194304\n"), "{output:?}");
}

fn files_hold_what_was_done_to_them_however_they_are_kept() {
    let mounted = Ext4::make("256M", "", "");
    let folder = &mounted.0;
    let data = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let share = "type=bind,src=/share,dst=/share,options=rbind:ro";
    let mounts = [&["--mount", &data, "--mount", share], &NODES_PROGRAMS[..]].concat();
    let ways = ["fs.cache = \"auto\"", "fs.cache = \"never\"", "fs.cache = \"always\"", "fs.writeback = true", "fs.window_mib = 64"];
    for (number, way) in ways.iter().enumerate() {
        let _settings = Config::set(way);
        let seeds = [2 * number + 1, 2 * number + 2];
        let script = seeds.map(|seed| format!("mkdir /data/{seed} && /share/node-tests exercise /data/{seed} {seed} 300")).join(" && ");
        let output = run_pod(&mounts, &["sh", "-c", &script]);
        // The kernel maps nothing of what it may not keep.
        let mapped = if way.contains("never") { "never mapped" } else { "mapped" };
        let on_host = |seed| exercise::sum(&std::fs::read(format!("{folder}/{seed}/{}", exercise::FILE)).unwrap());
        let expected: String = seeds.iter().map(|seed| format!("{:x} {mapped}\n", on_host(seed))).collect();
        assert_eq!((output.code, output.stdout.as_str()), (0, expected.as_str()), "{way}: {output:?}");
    }
}

/// A file that is made without a name in /data (`O_TMPFILE`), used, and given a name (linkat(2)); Perl is the node's.
const NAMELESS: &str = r#"
use strict; use warnings; use Fcntl qw(:DEFAULT :flock SEEK_SET);
sub made { sysopen(my $file, "/data", 0x410000 | O_RDWR | $_[0], 0640) or die "make: $!"; return $file }
sub linked { syscall(265, -100, "/proc/self/fd/" . fileno($_[0]), -100, "$_[1]", 0x400) == 0 ? "linked" : "$!" }
my $file = made(0);
syswrite($file, "before") == 6 or die "write: $!";
my ($inode, $mode, $links) = (stat $file)[1, 2, 3];
truncate($file, 4) && chmod(0600, $file) && chown(1000, 100, $file) && utime(5, 7, $file) or die "change: $!";
open(my $again, "<", "/proc/self/fd/" . fileno($file)) or die "open again: $!";
printf("%o %d %d %s
", $mode, $links, scalar(() = glob("/data/*")), <$again>);
print linked($file, "/data/name"), "
";
my @named = stat("/data/name");
printf("%s %o %d %d %d %d
", $named[1] == $inode ? "same" : "another", @named[2, 3, 4, 7, 9]);
open(my $named, "+<", "/data/name") or die "open by its name: $!";
flock($file, LOCK_EX | LOCK_NB) or die "lock: $!";
print flock($named, LOCK_EX | LOCK_NB) ? "two files
" : "one file
";
sysseek($file, 0, SEEK_SET); syswrite($file, "after"); sysread($named, my $read, 100); print "$read
";
print linked(made(O_EXCL), "/data/never"), "
";
unlink("/data/name"); print linked($file, "/data/later"), "
";
"#;

fn a_file_without_a_name_is_as_good_as_others_and_may_be_given_one() {
    let folder = format!("/tmp/{}", id("nameless"));
    shell(&format!("mkdir {folder}"));
    let data = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let mounts = [&["--mount", &data], &NODES_PROGRAMS[..]].concat();
    let output = run_pod(&mounts, &["/usr/bin/perl", "-e", NAMELESS]);
    let expected =
        "100640 0 0 befo\nlinked\nsame 100600 1 1000 4 7\none file\nafter\nNo such file or directory\nNo such file or directory\n";
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (0, expected, ""), "{output:?}");
    // Nothing of those without a name is left.
    shell(&format!("rmdir {folder}"));
}

fn a_link_out_of_the_image_is_refused() {
    let root = format!("/tmp/{}", id("root"));
    shell(&format!("mkdir -p {root}/bin {root}.volume && cp /bin/busybox {root}/bin/ && ln -s busybox {root}/bin/sh"));
    let run = |extra: &[&str]| {
        let name = id("out");
        let mut arguments = vec!["run", "--rm", "--runtime", RUNTIME];
        arguments.extend_from_slice(extra);
        arguments.extend_from_slice(&["--rootfs", &root, &name, "/bin/sh", "-c", "busybox ls /.. /"]);
        ctr(&arguments)
    };
    // Whatever number the guest's own root has while the container's is filled; of one that is not in
    // use the link leads nowhere.
    let mut refused = 0;
    for number in 3..8 {
        shell(&format!("ln -sfn /proc/self/fd/{number} {root}/data && ln -sfn /proc/self/fd/{number}/made {root}/file"));
        let mount = format!("type=bind,src={root}.volume,dst=/data,options=rbind:rw");
        let output = run(&["--mount", &mount]);
        refused += i32::from(output.code != 0 && output.stderr.contains("/data"));
        assert!(!output.stdout.contains("init") && !output.stdout.contains("caisson"), "{number}: {output:?}");
    }
    assert!(refused > 0, "no number was that of an open folder");
    let output = run(&["--cwd", "/data/made"]);
    assert!(!output.stdout.contains("init") && !output.stdout.contains("caisson"), "{output:?}");
    shell(&format!("rm -r {root} {root}.volume"));
}

fn images_may_have_links_and_locked_folders() {
    let root = format!("/tmp/{}", id("root"));
    shell(&format!(
        "mkdir -p {root}/bin {root}/etc {root}/locked && cp /bin/busybox {root}/bin/ && ln -s busybox {root}/bin/sh && \
         chmod 0700 {root}/locked && ln -s ../run/there/resolv.conf {root}/etc/resolv.conf && echo from the host > {root}.file"
    ));
    let mount = format!("type=bind,src={root}.file,dst=/etc/resolv.conf,options=rbind:ro");
    let script = "busybox cat /etc/resolv.conf; busybox readlink /etc/resolv.conf; busybox id -u; busybox pwd";
    let arguments = ["run", "--rm", "--runtime", RUNTIME, "--mount", &mount, "--cwd", "/locked", "--user", "1000", "--rootfs", &root];
    let output = ctr(&[&arguments[..], &[id("linked").as_str(), "/bin/sh", "-c", script]].concat());
    assert_eq!((output.code, output.stdout.as_str()), (0, "from the host\n../run/there/resolv.conf\n1000\n/locked\n"), "{output:?}");
    shell(&format!("rm -r {root} {root}.file"));
}

fn writes_that_the_guest_collects_reach_the_host() {
    let _config = Config::set("[fs]\nwriteback = true\n");
    let folder = format!("/tmp/{}", id("collected"));
    shell(&format!("mkdir -p {folder}"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let script =
        "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done > /data/lines; echo more >> /data/lines; mv /data/lines /data/moved";
    let output = run_pod(&["--mount", &mount], &["sh", "-c", script]);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(shell(&format!("wc -l < {folder}/moved; sed -n '1p;$p' {folder}/moved")), "2001\nline 0\nmore");
    shell(&format!("rm -r {folder}"));
}

/// Replaces what a folder holds by a state, as kubelet does (`pkg/volume/util/atomic_writer.go`).
fn publish(folder: &str, state: &str, files: &[(&str, &str)]) {
    shell(&format!("mkdir {folder}/{state}"));
    for (name, text) in files {
        std::fs::write(format!("{folder}/{state}/{name}"), text).unwrap();
    }
    shell(&format!("cd {folder}; ln -s {state} ..data_tmp; mv -T ..data_tmp ..data"));
    for (name, _) in files {
        shell(&format!("cd {folder}; [ -L {name} ] || ln -s ..data/{name} {name}"));
    }
    shell(&format!(
        "cd {folder}; for link in *; do [ -e $link ] || rm $link; done; for old in ..2*; do [ $old = {state} ] || rm -r $old; done"
    ));
}

fn watchers_hear_of_a_volume_that_kubelet_replaces() {
    let folder = format!("/tmp/{}", id("config"));
    shell(&format!("mkdir {folder}"));
    publish(&folder, "..2026_1", &[("key", "first"), ("old", "old")]);
    let mut options = vec!["--mount".to_owned(), format!("type=bind,src={folder},dst=/config,options=rbind:ro")];
    // The image has no program that watches.
    for (source, place) in [("/usr/bin", "/tools"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")] {
        options.extend(["--mount".to_owned(), format!("type=bind,src={source},dst={place},options=rbind:ro")]);
    }
    let watch = "/tools/inotifywait -m -q -e moved_to,create,delete --format '%e %f' /config >/events & \
                 /tools/inotifywait -q -e delete_self --format %e /config/key >/gone & sleep 1000";
    let pod = PodOfCtr::start("watched", &options.iter().map(String::as_str).collect::<Vec<_>>(), watch);
    let says = |script: &str| pod.exec(&[], &["sh", "-c", script]).stdout;
    eventually(|| says("cat /proc/[0-9]*/fdinfo/* 2>/dev/null | grep -c ^inotify") == "2\n", "nobody watches");
    assert_eq!(says("cat /config/key /config/old; echo x >/config/key"), "firstold");

    publish(&folder, "..2026_2", &[("key", "second"), ("more", &"much".repeat(100_000))]);
    eventually(|| says("cat /config/key") == "second", "the volume is as it was");
    assert_eq!(says("ls -A /config; wc -c </config/more"), "..2026_2\n..data\nkey\nmore\n400000\n");
    let events = says("cat /events; cat /gone");
    for event in ["CREATE,ISDIR ..2026_2", "MOVED_TO ..data", "CREATE more", "DELETE old", "DELETE,ISDIR ..2026_1", "DELETE_SELF"] {
        assert!(events.lines().any(|line| line == event), "{event:?} is not in {events}");
    }
    drop(pod);
    shell(&format!("rm -r {folder}"));
}

fn sockets_of_the_host_are_refused_or_dead() {
    let mount = "type=bind,src=/run/containerd/containerd.sock,dst=/the.sock,options=bind";
    let refused = run_pod(&["--mount", mount], &["true"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(refused.stderr.contains("containerd.sock: it is a socket or FIFO of the host"), "{refused:?}");
    let _settings = Config::set("[fs]\nsockets = \"dead\"\n");
    let bound = run_pod(&["--mount", mount], &["test", "-S", "/the.sock"]);
    assert_eq!(bound.code, 0, "{bound:?}");
}

fn connections_to_a_socket_of_the_host_are_carried_to_it() {
    let _settings = Config::set("[fs]\nsockets = \"carry\"\n");
    let socket = format!("/tmp/{}", id("socket"));
    let listen = format!("UNIX-LISTEN:{socket},fork,mode=0600");
    // What comes is answered when all of it is there.
    let mut server = std::process::Command::new("socat").args([&listen, "EXEC:tr a-z A-Z"]).spawn().unwrap();
    eventually(|| std::path::Path::new(&socket).exists(), "socat does not listen");
    let mount = format!("type=bind,src={socket},dst=/the.sock,options=bind");
    let pod = PodOfCtr::start("sockets", &["--mount", &mount, "--mount", "type=bind,src=/usr,dst=/host,options=bind:ro"], "sleep 1000");
    let client =
        "/host/lib64/ld-linux-x86-64.so.2 --library-path /host/lib/x86_64-linux-gnu /host/bin/socat -t 20 - UNIX-CONNECT:/the.sock";
    let say = |options: &[&str], script: String| pod.exec(options, &["sh", "-c", &script]);
    let both = say(&[], format!("for i in one two; do echo $i | {client} & done; wait"));
    let mut lines: Vec<&str> = both.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["ONE", "TWO"], "{both:?}");
    let much = say(&[], format!("yes | head -c 3000000 | {client} | md5sum"));
    assert_eq!(much.stdout, run("sh", &["-c", "yes Y | head -c 3000000 | md5sum"]).stdout, "{much:?}");
    let stranger = say(&["--user", "1000"], format!("echo x | {client}"));
    assert!(stranger.stderr.contains("Permission denied"), "{stranger:?}");
    server.kill().unwrap();
    server.wait().unwrap();
    // Nobody answers on the host: the connection ends, with nothing.
    let nobody = say(&[], format!("echo x | {client}"));
    assert_eq!(nobody.stdout, "", "{nobody:?}");
    drop(pod);
    std::fs::remove_file(socket).unwrap();
}

fn a_memory_volume_is_the_guests_and_shared_by_its_containers() {
    // As kubelet mounts them: the volume, and a folder of it for a container that wants only that.
    let kubelet = format!("/tmp/{}", id("kubelet"));
    let (volume, part) = (format!("{kubelet}/volumes/kubernetes.io~empty-dir/cache"), format!("{kubelet}/volume-subpaths/cache/second/0"));
    shell(&format!(
        "mkdir -p {volume} {part} && mount -t tmpfs -o size=8m,mode=2770,gid=2000 tmpfs {volume} && mkdir -p {volume}/a/b && mount --bind {volume}/a/b {part}"
    ));
    {
        let mut pod = Pod::start(|_| ());
        let with = |place: &str, host: &str| vec![Mount { container_path: place.into(), host_path: host.into(), ..Mount::default() }];
        let first = pod.run("first", SLEEP, |config| config.mounts = with("/cache", &volume));
        assert_eq!(pod.output(&first, "stat -c %u:%g:%a /cache; df -k /cache | awk 'NR == 2 {print $2}'"), "0:2000:2770\n8192");
        let second = pod.run("second", SLEEP, |config| config.mounts = with("/part", &part));
        pod.output(&first, "echo shared > /cache/a/b/file");
        assert_eq!(pod.output(&second, "cat /part/file"), "shared");
        // It counts for who fills it, and is full when it is.
        assert_ne!(pod.exec(&first, "dd if=/dev/zero of=/cache/fill bs=1M count=9 2> /dev/null").exit_code, 0);
        let counted: u64 = pod.output(&first, "awk '$1 == \"shmem\" {print $2}' /sys/fs/cgroup/memory.stat").parse().unwrap();
        assert!(counted > 7 << 20, "{counted}");
        assert_eq!(shell(&format!("find {volume} -type f")), "");
        // A container that comes again finds it, and a link that was put there leads nobody out.
        pod.remove(&first);
        let third = pod.run("third", SLEEP, |config| config.mounts = with("/cache", &volume));
        pod.output(&third, "test -s /cache/fill && rm -r /cache/a && ln -s / /cache/a");
        let fourth = pod.create("fourth", SLEEP, |config| config.mounts = with("/part", &part)).unwrap();
        let start = StartContainerRequest { container_id: fourth };
        let refused = pod.cri.call(|client| client.start_container(start)).unwrap_err();
        assert!(refused.message().contains("folder \"a/b\" of a memory volume"), "{refused:?}");
    }
    shell(&format!("umount {part} {volume} && rm -r {kubelet}"));
}

fn what_did_not_change_is_read_once_and_what_did_is_read_again() {
    let folder = format!("/tmp/{}", id("kept"));
    shell(&format!("mkdir {folder} && head -c 1048576 /dev/urandom > {folder}/file"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let pod = PodOfCtr::start("kept", &["--mount", &mount], "sleep 1000");
    let server = pod.host_pid("fs");
    let read = || shell(&format!("sed -n 's/^rchar: //p' /proc/{server}/io")).parse::<u64>().unwrap();
    let sum = || pod.exec(&[], &["md5sum", "/data/file"]).stdout;
    // What was changed less than three seconds ago could change again and look the same.
    std::thread::sleep(std::time::Duration::from_secs(4));
    let (first, before) = (sum(), read());
    assert_eq!(sum(), first);
    let again = read() - before;
    assert!(again < 512 << 10, "{again} bytes of a file of 1048576 were read again");
    // Of the same size, and changed the very moment before.
    shell(&format!("printf x | dd of={folder}/file conv=notrunc seek=500000 bs=1 status=none"));
    let changed = sum();
    assert_eq!(changed.split(' ').next().unwrap(), shell(&format!("md5sum < {folder}/file")).split(' ').next().unwrap());
    assert_ne!(changed, first);
    assert!(read() - before > 1 << 20);
    // What the pod writes itself it reads, and so does the host.
    assert_eq!(pod.exec(&[], &["sh", "-c", "echo mine > /data/file; cat /data/file"]).stdout, "mine\n");
    assert_eq!(shell(&format!("cat {folder}/file")), "mine");
    shell(&format!("echo theirs > {folder}/file"));
    // A size is known for a second.
    eventually(|| pod.exec(&[], &["cat", "/data/file"]).stdout == "theirs\n", "what the host wrote is not seen");
    drop(pod);
    shell(&format!("rm -r {folder}"));
}

fn a_guest_sees_more_files_than_its_server_may_hold_open() {
    const FILES: usize = 6000;
    let folder = format!("/tmp/{}", id("many"));
    shell(&format!("mkdir {folder} && cd {folder} && seq {FILES} | xargs touch"));
    let mount = format!("type=bind,src={folder},dst=/many,options=rbind:rw");
    let pod = PodOfCtr::start("many", &["--mount", &mount], SLEEP);
    let server = format!("/proc/{}", pod.host_pid("fs"));
    let limits = std::fs::read_to_string(format!("{server}/limits")).unwrap();
    let limit: usize =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok()).unwrap();
    assert!(limit < FILES, "the node's containerd lets a process open {limit} files: the test needs more");
    // Twice at once, and then as the guest remembers the last ones.
    let count = "[ $(ls -l /many | wc -l) = 6001 ]";
    let walks = format!("(find /many -size 1000 & {count} && wait $!) && {count} && echo new > /many/new && cat /many/new");
    let output = pod.exec(&[], &["sh", "-c", &walks]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "new\n"), "{output:?}");
    let open = || std::fs::read_dir(format!("{server}/fd")).unwrap().count();
    assert!(open() < limit, "{} of {limit}", open());
    // What is open stays so, whatever is forgotten.
    let held =
        pod.exec(&[], &["sh", "-c", &format!("exec 3< /many/7; rm /many/7; {count}; echo held > /many/8; read line <&3; cat /many/8")]);
    assert_eq!((held.code, held.stdout.as_str()), (0, "held\n"), "{held:?}");
    shell(&format!("rm -rf {folder}"));
}

/// With `always` nothing that is cached of a file would ever be asked for again.
fn a_file_in_a_window_is_the_hosts_own_memory() {
    let _settings = Config::set("[fs]\nwindow_mib = 32\ncache = \"always\"\n");
    let folder = format!("/tmp/{}", id("window"));
    shell(&format!("mkdir {folder}; head -c 20M /dev/urandom > {folder}/file"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    let pod = PodOfCtr::start("window", &["--mount", &mount], SLEEP);
    let inside = |script: &str| pod.exec(&[], &["sh", "-c", script]).stdout.trim().to_owned();
    let cached = || inside("grep ^Cached: /proc/meminfo | tr -s ' ' | cut -d ' ' -f 2").parse::<u64>().unwrap();
    let before = cached();
    assert_eq!(inside("md5sum < /data/file"), shell(&format!("md5sum < {folder}/file")));
    assert!(cached() < before + 4096, "of 20 MiB the guest has {} KiB of its own", cached() - before);
    shell(&format!("echo host | dd of={folder}/file bs=1M seek=3 conv=notrunc"));
    assert_eq!(inside("dd if=/data/file bs=1M skip=3 count=1 | head -c 4"), "host");
    inside("echo guest | dd of=/data/file bs=1M seek=5 conv=notrunc");
    assert_eq!(shell(&format!("dd if={folder}/file bs=1 skip=5242880 count=5 2> /dev/null")), "guest");
    // Files that grow and shrink, and more of them than the window holds at a time.
    let script = "for n in 1 2 3 4 5 6 7 8 9 10; do cat /data/file | head -c ${n}500000 > /data/$n; done; \
        truncate -s 600000 /data/9; cat /data/1 >> /data/9; : > /data/8; cat /data/2 >> /data/8; cd /data; md5sum * | sort";
    assert_eq!(inside(script), shell(&format!("cd {folder}; md5sum * | sort")));
    assert_eq!(inside("cd /data; md5sum * | sort"), shell(&format!("cd {folder}; md5sum * | sort")));
    drop(pod);
    shell(&format!("rm -r {folder}"));
}
