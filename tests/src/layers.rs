//! Images whose layers are file systems of their own, as containerd's erofs snapshotter has them.

use crate::Test;
use crate::containerd::{Containerd, CriContainerd};
use crate::cri::{Pod, SLEEP};
use crate::ctr::{Output, RUNTIME, id, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left, eventually};

pub const ALONE: &[Test] = &[
    ("layers_of_an_image_are_parts_of_a_disk", layers_of_an_image_are_parts_of_a_disk),
    ("what_is_written_above_layers_means_the_same_to_the_host", what_is_written_above_layers_means_the_same_to_the_host),
    ("a_file_above_layers_outlives_one_of_its_names", a_file_above_layers_outlives_one_of_its_names),
    ("what_is_written_above_layers_belongs_to_the_pods_ids", what_is_written_above_layers_belongs_to_the_pods_ids),
    ("containers_of_a_pod_share_the_layers_of_their_image", containers_of_a_pod_share_the_layers_of_their_image),
];

/// containerd makes a file system of each layer that it unpacks.
const SETTINGS: &str = "[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"erofs\", \"walking\"]\n";
/// Only containers that nobody writes to have layers as disks.
const READ_ONLY: &str = "[disk]\nlayers = \"read-only\"\n";
/// An image of three layers: the second takes a file away, hides what a folder held and writes over a file, the third
/// brings one back.
const LAYERED: &str = "layered";
const MAKE_LAYERED: &str = r#"
set -e; modprobe erofs; modprobe loop
mkdir oci two three; tar xf /usr/lib/node/busybox.tar -C oci; cd oci
of() { jq -r "$1" "blobs/sha256/$2"; }
manifest=$(jq -r '[.manifests[] | select(.annotations["io.containerd.image.name"] // .annotations["org.opencontainers.image.ref.name"] | test("busybox"))][0].digest' index.json | cut -d : -f 2)
[ "$manifest" != null ] || manifest=$(jq -r '.manifests[0].digest' index.json | cut -d : -f 2)
config=$(of .config.digest "$manifest" | cut -d : -f 2)
cd ../two; mkdir -p etc tmp/deep; echo two > tmp/two; touch etc/.wh..wh..opq; echo new > etc/new; touch bin.wh; mkdir bin; touch bin/.wh.base64; rm bin.wh
cd ../three; mkdir tmp; echo three > tmp/two; echo three > tmp/three
cd ../oci
add() { # TREE: adds it as a layer
	tar cf ../layer.tar -C "../$1" .; digest=$(sha256sum ../layer.tar | cut -d ' ' -f 1); size=$(stat -c %s ../layer.tar)
	mv ../layer.tar "blobs/sha256/$digest"
	jq -c ".rootfs.diff_ids += [\"sha256:$digest\"]" "blobs/sha256/$config" > ../config; config=$(sha256sum ../config | cut -d ' ' -f 1)
	cp ../config "blobs/sha256/$config"
	jq -c ".layers += [{mediaType: .layers[0].mediaType, digest: \"sha256:$digest\", size: $size}] | .config.digest = \"sha256:$config\" | .config.size = $(stat -c %s ../config)" \
		"blobs/sha256/$manifest" > ../manifest; manifest=$(sha256sum ../manifest | cut -d ' ' -f 1); cp ../manifest "blobs/sha256/$manifest"
}
add two; add three
jq -c ".manifests = [.manifests[0] | .digest = \"sha256:$manifest\" | .size = $(stat -c %s ../manifest) | .annotations = {\"io.containerd.image.name\": \"layered\"}]" index.json > ../index
cp ../index index.json; tar cf ../layered.tar .
"#;

/// A containerd that keeps layers so, with both images.
fn start() -> Containerd {
    let containerd = Containerd::start("2", SETTINGS, MAKE_LAYERED);
    for archive in ["/usr/lib/node/busybox.tar", "/tmp/c2/layered.tar"] {
        let imported = containerd.ctr(&["images", "import", "--local", "--snapshotter", "erofs", archive]);
        assert_eq!(imported.code, 0, "{imported:?}");
    }
    // containerd mounts layers when they are used first, and leaves them so.
    run(&containerd, &["--rm"], LAYERED, &id("first"), "true");
    containerd
}

fn run(containerd: &Containerd, options: &[&str], image: &str, name: &str, script: &str) -> Output {
    let run = ["run", "--runtime", RUNTIME, "--snapshotter", "erofs"];
    containerd.ctr(&[&run[..], options, &[image, name, "sh", "-c", script]].concat())
}

/// What a script says of the files of a container's snapshot, as the host mounts them.
fn on_the_host(containerd: &Containerd, container: &str, script: &str) -> String {
    let mounts = containerd.ctr(&["snapshots", "--snapshotter", "erofs", "mounts", "/tmp/snapshot", container]).stdout;
    shell(&format!("mkdir -p /tmp/snapshot; {mounts}\ncd /tmp/snapshot; {script}; cd /; umount /tmp/snapshot; rmdir /tmp/snapshot"))
}

fn layers_of_an_image_are_parts_of_a_disk() {
    let containerd = start();
    let before = Inventory::take();
    let script = "grep ' / ' /proc/mounts | grep -o 'overlay.*lowerdir=[^,]*' | tr ' ' '\\n' | tail -n 1 | grep -o 'lowerdir.*'; \
        cd /sys/class/block; echo vd*; cat vda/ro; cat vda/serial; echo; \
        cat /tmp/two /tmp/three; ls /etc | tr '\\n' ' '; ls -d /tmp/deep /bin/base64 /bin/sh 2> /dev/null; cat /new/place/tmp/two; touch /x 2>&1 | grep -o Read-only";
    // A mount of which the image lacks the place has one all the same.
    let options = ["--rm", "--read-only", "--mount", "type=bind,src=/tmp/c2/two,dst=/new/place,options=rbind:ro"];
    let seen = run(&containerd, &options, LAYERED, &id("parts"), script);
    let expected = "lowerdir=0:1:2\nvda vda1 vda2 vda3\n1\nlayers\nthree\nthree\nnew /bin/sh\n/tmp/deep\ntwo\nRead-only\n";
    assert_eq!((seen.code, seen.stdout.as_str()), (0, expected), "{seen:?}");
    let _settings = Config::set(READ_ONLY);
    let seen = run(&containerd, &["--rm"], LAYERED, &id("written"), "grep -c ' / virtiofs' /proc/mounts; cat /tmp/two; touch /x");
    assert_eq!((seen.code, seen.stdout.as_str()), (0, "1\nthree\n"), "{seen:?}");
    assert_nothing_left(&before);
}

fn what_is_written_above_layers_means_the_same_to_the_host() {
    let containerd = start();
    let before = Inventory::take();
    let name = id("above");
    let script = "[ -e /tmp/again ] && ls /tmp /etc | grep -v -e : -e '^$' && exit 0; rm -r /tmp/deep /etc; mkdir /etc; echo mine > /etc/mine; rm /tmp/three; mv /tmp/two /tmp/moved; echo more >> /tmp/moved; \
        ln -s /tmp/moved /link; mkfifo /fifo; mknod /null c 1 3; chmod 2750 /etc; exec sleep 1000";
    let options = [&["run", "-d", "--runtime", RUNTIME, "--snapshotter", "erofs", LAYERED, &name, "sh", "-c", script][..]].concat();
    assert_eq!(containerd.ctr(&options).code, 0);
    eventually(
        || shell(&format!("ls /tmp/c2/root/*erofs/snapshots/*/fs/null 2> /dev/null | wc -l; : {name}")) == "1",
        "nothing was written",
    );
    // However the pod ends.
    shell(&format!("pkill -9 -f 'containerd-shim-caisson.* -id {name}'"));
    eventually(|| containerd.ctr(&["task", "ls"]).stdout.lines().all(|line| !line.contains("RUNNING")), "the task still runs");
    let _ = containerd.ctr(&["task", "rm", "-f", &name]);
    let look = "ls etc tmp | tr '\\n' ' '; cat tmp/moved link; stat -c '%F %a' fifo null etc";
    // The link is the container's, and leads to nothing here.
    let look = look.replace(" link;", "; readlink link;");
    let expected = "etc: mine  tmp: moved three\nmore\n/tmp/moved\nfifo 644\ncharacter special file 644\ndirectory 2750";
    assert_eq!(on_the_host(&containerd, &name, &look), expected);
    // A pod that has the snapshot next sees what the host has hidden meanwhile as little.
    on_the_host(&containerd, &name, "rm -r tmp; mkdir tmp; echo host > tmp/again");
    let again = containerd.ctr(&["task", "start", &name]);
    assert_eq!((again.code, again.stdout.as_str()), (0, "mine\nagain\n"), "{again:?}");
    assert_eq!(containerd.ctr(&["container", "rm", &name]).code, 0);
    assert_nothing_left(&before);
}

/// What a file is known by on the share is its first name, until the guest asks for it again.
fn a_file_above_layers_outlives_one_of_its_names() {
    let containerd = start();
    let before = Inventory::take();
    let script = "grep -c ' / overlay ' /proc/mounts; cd /tmp; echo kept > first; ln first second; ln /etc/new new; rm first /etc/new; sleep 3; \
        cat second; mv second third; sleep 3; echo more >> third; cat third; ln third first; rm third; sleep 3; cat first; stat -c %h first new";
    let seen = run(&containerd, &["--rm"], LAYERED, &id("names"), script);
    assert_eq!((seen.code, seen.stdout.as_str()), (0, "1\nkept\nkept\nmore\nkept\nmore\n1\n1\n"), "{seen:?}");
    assert_nothing_left(&before);
}

fn what_is_written_above_layers_belongs_to_the_pods_ids() {
    let _settings = Config::set("[fs]\nid_base = 700000\n");
    let containerd = start();
    let before = Inventory::take();
    let name = id("owned");
    let script = "stat -c '%u %g' / /bin/sh /etc /tmp; echo x > /root/mine; chown 5:6 /root/mine; rm -r /etc; mkdir /etc; stat -c '%u %g' /root/mine /etc";
    let seen = run(&containerd, &[], LAYERED, &name, script);
    assert_eq!((seen.code, seen.stdout.as_str()), (0, "0 0\n0 0\n0 0\n0 0\n5 6\n0 0\n"), "{seen:?}");
    assert_eq!(shell("stat -c '%u %g' /tmp/c2/root/*erofs/snapshots/*/fs/root/mine"), "700005 700006");
    assert_eq!(on_the_host(&containerd, &name, "ls etc | wc -l; stat -c %u etc"), "0\n700000");
    assert_eq!(containerd.ctr(&["container", "rm", &name]).code, 0);
    assert_nothing_left(&before);
}

fn containers_of_a_pod_share_the_layers_of_their_image() {
    let handler = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.layers]\n  runtime_type = \"io.containerd.caisson.v2\"\n  \
                   snapshotter = \"erofs\"\n";
    shell("modprobe erofs; modprobe loop");
    let _containerd = CriContainerd::start_with("2", &format!("{handler}{SETTINGS}"));
    let start = || Pod::start_with(CriContainerd::SOCKET, "layers", |_| ()).unwrap();
    // containerd keeps what it has mounted for the first one.
    start().run("first", "true", |_| ());
    let before = Inventory::take();
    let mut pod = start();
    let names = ["first", "second", "third"];
    let containers = names.map(|name| pod.run(name, &format!("echo {name} > /mine; {SLEEP}"), |_| ()));
    for (name, container) in names.iter().zip(&containers) {
        let seen = pod.output(container, "cat /mine; grep -c ' / overlay ' /proc/mounts; cd /sys/class/block; echo vd?");
        assert_eq!(seen, format!("{name}\n1\nvda"));
    }
    // Who brought the disk may go before the others.
    pod.remove(&containers[0]);
    assert_eq!(pod.output(&containers[1], "sh -c 'cat /mine'"), "second");
    pod.remove(&containers[1]);
    pod.remove(&containers[2]);
    let last = pod.run("last", SLEEP, |_| ());
    assert_eq!(pod.output(&last, "cd /sys/class/block; echo vd?"), "vda");
    drop(pod);
    assert_nothing_left(&before);
}
