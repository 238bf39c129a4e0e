//! Files under Caisson and under runc: the same program on the same layers, with the same outcome.

use crate::Test;
use crate::ctr::{NODES_PROGRAMS, RUNTIME, ctr, id, run_pod, shell};
use crate::host::number;

pub const TESTS: &[Test] = &[
    ("names_of_one_file_in_a_layer_are_two_files_once_one_is_written", names_of_one_file_in_a_layer_are_two_files_once_one_is_written),
    ("what_is_done_to_linked_files_at_random_is_as_with_runc", what_is_done_to_linked_files_at_random_is_as_with_runc),
    ("access_lists_of_files_are_heeded", access_lists_of_files_are_heeded),
    (
        "what_gives_rights_is_kept_in_a_root_file_system_and_not_in_a_volume",
        what_gives_rights_is_kept_in_a_root_file_system_and_not_in_a_volume,
    ),
];

const RUNC: &str = "io.containerd.runc.v2";

/// A root file system that is mounted for each run anew, as Docker does: layers, and a folder for what is written.
struct Layers {
    folder: String,
}

impl Layers {
    /// Layers over busybox's files: `make` fills the uppermost.
    fn make(make: &str) -> Self {
        let folder = format!("/tmp/{}", id("layers"));
        shell(&format!(
            "mkdir -p {folder}/image {folder}/base {folder}/top && ctr image mount docker.io/library/busybox:latest {folder}/image > /dev/null && \
             cp -a {folder}/image/. {folder}/base && ctr image unmount --rm {folder}/image > /dev/null && cd {folder}/top && {make}"
        ));
        Self { folder }
    }

    /// What a script prints under a runtime, and what it leaves in the folder that it writes to.
    fn run(&self, runtime: &str, options: &[&str], script: &str) -> (String, String) {
        let folder = &self.folder;
        shell(&format!(
            "cd {folder} && mkdir upper work root && \
             mount -t overlay overlay -o lowerdir={folder}/top:{folder}/base,upperdir={folder}/upper,workdir={folder}/work,index=off root"
        ));
        let name = id("same");
        let root = format!("{folder}/root");
        let run = ["run", "--rm", "--runtime", runtime, "--env", "PATH=/bin:/usr/bin", "--rootfs"];
        let arguments = [&run[..], options, &[&root, &name, "/bin/sh", "-c", script]].concat();
        let ran = ctr(&arguments);
        let left = shell(&format!(
            "umount {root}; cd {folder}/upper && find . ! -type d ! -path './etc/*' -exec stat -c '%n %F %h %s %a %u %g %t %T' {{}} + | sort; \
             find . -type f ! -path './etc/*' | sort | xargs -r md5sum; getfattr -R -d -m trusted . 2> /dev/null | grep -v -e '^$' -e overlay.uuid; cd .. && rm -r upper work root"
        ));
        assert_eq!(ran.code, 0, "{runtime}: {ran:?}");
        (ran.stdout, left)
    }

    /// What a script prints under Caisson, which has to be what it prints under runc, and to leave the same.
    fn same(&self, options: &[&str], script: &str) -> String {
        let theirs = self.run(RUNC, options, script);
        let ours = self.run(RUNTIME, options, script);
        assert_same(&ours, &theirs);
        ours.0
    }
}

/// Says where Caisson's outcome is first another than runc's.
fn assert_same(ours: &(String, String), theirs: &(String, String)) {
    for (ours, theirs) in [(&ours.0, &theirs.0), (&ours.1, &theirs.1)] {
        let mut lines = ours.lines().zip(theirs.lines()).enumerate();
        let other = lines.find(|(_, (ours, theirs))| ours != theirs).map_or_else(|| ours.lines().count(), |(line, _)| line);
        let around = |text: &str| text.lines().skip(other.saturating_sub(10)).take(14).collect::<Vec<_>>().join("\n");
        assert_eq!(ours, theirs, "line {other} of Caisson's:\n{}\nand of runc's:\n{}\n", around(ours), around(theirs));
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        shell(&format!("umount {0}/root 2> /dev/null; rm -rf {0}", self.folder));
    }
}

/// Files with several names: regular ones, a link and a pipe.
const LINKED: &str =
    "mkdir d && echo old > p && ln p q && ln p d/r && echo one > a && ln -s a s && ln s t && mkfifo f && ln f g && chmod 4755 p";

fn names_of_one_file_in_a_layer_are_two_files_once_one_is_written() {
    let layers = Layers::make(LINKED);
    let script = "cat q; echo new > p; cat p q d/r; sleep 2; cat p q d/r; \
        cat d/r; echo more >> q; cat p q d/r; \
        chmod 600 d/r; stat -c '%a %h' p q d/r; ln q z; echo z >> z; cat q z; \
        chown -h 5:6 s; stat -c '%u %g' s t; chmod 640 f; stat -c '%a' f g";
    let seen = layers.same(&[], script);
    assert!(seen.starts_with("old\nnew\nold\nold\nnew\nold\nold\nold\nnew\nold\nmore\nold\n"), "{seen}");
    assert!(seen.ends_with("old\nmore\nz\nold\nmore\nz\n5 6\n0 0\n640\n644\n"), "{seen}");
    // What is renamed is copied up, too, and stays the file that is open.
    layers.same(&[], "exec 3< p; mv p n; cat q; echo x > n; cat n q; mv q n; cat n d/r; cat <&3; truncate -s 1 d/r; cat d/r n; touch -d @5 g; stat -c %Y f g");
    // A write through a descriptor that was opened before a second name was found.
    layers.same(&[], "cat p > /dev/null; exec 4>> q; cat d/r p; echo four >&4; cat p q d/r; rm q; echo five >&4; cat p d/r; ls");
}

/// A random program of so many steps: what it prints tells each step's outcome.
fn random_program(seed: u64, steps: usize) -> String {
    let mut state = seed;
    let mut next = |most: u64| {
        // Knuth's numbers (The Art of Computer Programming, 3.3.4).
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % most
    };
    let names = ["p", "q", "d/r", "a", "x", "d/y"];
    let mut program = String::from(
        "cd /; look() { for n in p q d/r a x d/y; do [ -e $n ] && stat -c '%n %h %s %a %u' $n && cat $n; done; for n in p q d/r a x d/y; do for m in p q d/r a x d/y; do [ $n -ef $m ] && echo -n \"$n=$m \"; done; done; echo; }\n",
    );
    for step in 0..steps {
        let mut name = || names[next(names.len() as u64) as usize];
        let (one, other) = (name(), name());
        let line = match next(14) {
            0 | 1 => format!("echo {step} > {one}"),
            2 | 3 => format!("echo {step} >> {one}"),
            4 => format!("chmod 6{}{}{} {one}", next(8), next(8), next(8)),
            5 => format!("chown {} {one}", next(3)),
            6 => format!("truncate -s {} {one}", next(9)),
            7 => format!("ln {one} {other}"),
            8 => format!("mv -T {one} {other}"),
            9 => format!("rm {one}"),
            10 => format!("exec 3>> {one}"),
            11 => format!("echo {step} >&3"),
            12 => format!("cp {one} {other}"),
            _ => format!("cat {one} {other}"),
        };
        program += &format!("{{ {line}; }} 2> /dev/null; echo {step} $?; look\n");
    }
    program
}

fn what_is_done_to_linked_files_at_random_is_as_with_runc() {
    let layers = Layers::make(LINKED);
    for seed in 1..=number("CAISSON_TEST_SEEDS", 1) {
        layers.same(&[], &format!("exec 3> /dev/null\n{}", random_program(seed, 25)));
    }
}

/// Gives files access lists, and tries them as users whom they name.
const ACCESS: &str = r#"
use strict; my @entry;
sub acl { my $out = pack "V", 2; $out .= pack "v v V", @$_ for @_; $out }
sub set { my ($file, $name, $acl) = @_; my $n = "system.posix_acl_$name"; syscall(188, $file, $n, $acl, length $acl, 0) == 0 or print "set $file $!\n" }
my $none = 0xffffffff;
my @lets = ([1, 6, $none], [2, 4, 1000], [4, 0, $none], [16, 4, $none], [32, 0, $none]);
my @denies = ([1, 6, $none], [4, 4, $none], [8, 0, 2000], [16, 4, $none], [32, 4, $none]);
for my $top (@ARGV) {
    mkdir "$top/folder" or die; chmod 0777, "$top/folder";
    for my $file ("lets", "denies") { open my $f, ">", "$top/$file" or die; print $f "read\n"; close $f; chmod 0640, "$top/$file" }
    set("$top/lets", "access", acl(@lets)); set("$top/denies", "access", acl(@denies));
    set("$top/folder", "default", acl([1, 7, $none], [2, 6, 1000], [4, 5, $none], [16, 7, $none], [32, 0, $none]));
    umask 077; open my $f, ">", "$top/folder/inherits" or die; close $f; mkdir "$top/folder/inner", 0777 or die; umask 022;
    printf "%o %o %o %o\n", map { (stat $_)[2] & 07777 } "$top/lets", "$top/denies", "$top/folder/inherits", "$top/folder/inner";
    for my $who ([1000, 1000], [1001, 2000], [1001, 1001]) {
        my $pid = fork; if (!$pid) {
            $) = "$who->[1] $who->[1]"; $( = $who->[1]; $> = $who->[0];
            for my $file ("lets", "denies", "folder/inherits") { print "$who->[0]:$who->[1] $file ", (open(my $f, "<", "$top/$file") ? "yes" : "no"), "\n" }
            exit 0 }
        waitpid $pid, 0;
    }
}
"#;

fn access_lists_of_files_are_heeded() {
    let layers = Layers::make("mkdir -p data lib lib64 usr");
    let volume = format!("/tmp/{}", id("volume"));
    let script = format!("cat > /tmp/access.pl << 'END'\n{ACCESS}\nEND\nexec perl /tmp/access.pl /data /volume");
    let mut seen = Vec::new();
    for runtime in [RUNC, RUNTIME] {
        shell(&format!("mkdir {volume}"));
        let mount = format!("type=bind,src={volume},dst=/volume,options=rbind:rw");
        let options = [&NODES_PROGRAMS[..], &["--mount", &mount]].concat();
        seen.push(layers.run(runtime, &options, &script));
        shell(&format!("rm -r {volume}"));
    }
    assert_same(&seen[1], &seen[0]);
    let expected = "640 644 660 770\n1000:1000 lets yes\n1000:1000 denies yes\n1000:1000 folder/inherits yes\n\
        1001:2000 lets no\n1001:2000 denies no\n1001:2000 folder/inherits no\n\
        1001:1001 lets no\n1001:1001 denies yes\n1001:1001 folder/inherits no\n";
    assert_eq!(seen[1].0, expected.repeat(2));
}

/// What a container makes on a volume gives nobody on the host its rights; its own root file system has all of it.
fn what_gives_rights_is_kept_in_a_root_file_system_and_not_in_a_volume() {
    let folder = format!("/tmp/{}", id("rights"));
    shell(&format!("mkdir {folder}"));
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:rw");
    // The attribute is cap_net_raw of Linux's second version (linux/capability.h, `struct vfs_cap_data`).
    let make = "cp /bin/busybox $1/tool && chmod 6755 $1/tool && mkdir $1/folder && chmod 2775 $1/folder && mknod $1/null c 1 3; \
        stat -c '%a %F' $1/tool $1/folder $1/null 2>&1 | sed \"s,$1,,\"; chmod 2644 $1/tool; stat -c %a $1/tool";
    let script = format!("make() {{ {make}; }}; mknod /data/gone c 0 0; make /data 2>&1; make /root 2>&1");
    let seen = run_pod(&["--mount", &mount], &["sh", "-c", &script]);
    let in_volume = "mknod: /data/null: Operation not permitted\n755 regular file\n2775 directory\nstat: can't stat '/null': No such file or directory\n2644\n";
    let in_root = "6755 regular file\n2775 directory\n644 character special file\n2644\n";
    assert_eq!((seen.code, seen.stdout.as_str()), (0, format!("{in_volume}{in_root}").as_str()), "{seen:?}");
    assert_eq!(shell(&format!("cd {folder}; stat -c '%n %a' tool folder; ls; rm -r *")), "tool 2644\nfolder 2775\nfolder\ngone\ntool");
    let handler = format!("/tmp/{}.toml", id("set-id"));
    std::fs::write(&handler, "[fs]\nset_id = true\n").unwrap();
    let seen =
        run_pod(&["--runtime-config-path", &handler, "--mount", &mount], &["sh", "-c", &format!("make() {{ {make}; }}; make /data 2>&1")]);
    assert_eq!((seen.code, seen.stdout.as_str()), (0, in_root), "{seen:?}");
    assert_eq!(shell(&format!("stat -c '%t:%T' {folder}/null; rm -r {folder} {handler}")), "1:3");
}
