//! Who owns a pod's files on the host: with ids of its own nobody who is anybody there.

use crate::Test;
use crate::containerd::CriContainerd;
use crate::cri;
use crate::ctr::{Pod, ctr_ok, id, run_pod, shell};
use crate::faults::Config;
use crate::host::{Inventory, assert_nothing_left};

pub const ALONE: &[Test] = &[
    ("root_of_two_tenants_is_two_strangers_on_the_host", root_of_two_tenants_is_two_strangers_on_the_host),
    ("a_kubernetes_pod_has_the_ids_that_the_configuration_says", a_kubernetes_pod_has_the_ids_that_the_configuration_says),
];

/// A folder of the host that everybody may write, removed at the end.
struct Folder(String);

impl Folder {
    fn make(name: &str) -> Self {
        let folder = format!("/tmp/{}", id(name));
        shell(&format!("mkdir {folder} && chmod 1777 {folder}"));
        Self(folder)
    }

    /// Owner, group and mode of a file within.
    fn owner(&self, file: &str) -> String {
        shell(&format!("stat -c %u:%g:%a {}/{file}", self.0))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        shell(&format!("rm -rf {}", self.0));
    }
}

/// The settings of a runtime handler, in a file.
fn handler(files: &str) -> String {
    let path = format!("/tmp/{}.toml", id("handler"));
    std::fs::write(&path, format!("[fs]\n{files}")).unwrap();
    path
}

/// A pod of the tenant whose ids begin with `base`, with both folders.
fn tenant(base: u32, shared: &Folder, plain: &Folder) -> Pod {
    let handler = handler(&format!("id_base = {base}\nmapped_volumes = [\"/data\", \"/elsewhere\"]\n"));
    let mount = |folder: &Folder, place: &str| format!("type=bind,src={},dst={place},options=rbind:rw", folder.0);
    let (data, plain) = (mount(shared, "/data"), mount(plain, "/plain"));
    Pod::start("tenant", &["--runtime-config-path", &handler, "--mount", &data, "--mount", &plain], "sleep 1000")
}

fn says(pod: &Pod, script: &str) -> String {
    let output = pod.exec(&[], &["sh", "-c", script]);
    assert_eq!(output.code, 0, "{script}: {output:?}");
    output.stdout.trim().to_owned()
}

fn root_of_two_tenants_is_two_strangers_on_the_host() {
    let (shared, plain) = (Folder::make("shared"), Folder::make("plain"));
    shell(&format!("echo theirs > {0}/hosts && chown 7:8 {0}/hosts && chmod 600 {0}/hosts", plain.0));
    let before = Inventory::take();
    {
        let (one, other) = (tenant(200_000, &shared, &plain), tenant(300_000, &shared, &plain));
        for (pod, name, base) in [(&one, "one", 200_000), (&other, "other", 300_000)] {
            says(pod, &format!("umask 077; echo of {name} > /data/{name}; echo plain > /plain/{name}"));
            assert_eq!(shared.owner(name), format!("{base}:{base}:600"));
            assert_eq!(plain.owner(name), "0:0:600");
            // Inside it is root's, and root may do what root does, but for what the host's root has there.
            assert_eq!(says(pod, &format!("stat -c %u:%g /data/{name} /plain/{name} / /bin/busybox")), "0:0\n0:0\n0:0\n0:0");
            says(pod, &format!("chown 33:100 /data/{name}; chmod 4750 /data/{name}; cat /plain/hosts > /root/read; rm /bin/vi"));
            assert_eq!(shared.owner(name), format!("{}:{}:4750", base + 33, base + 100));
            assert_eq!(says(pod, "stat -c %u:%g /plain/hosts"), "7:8");
        }
        let refused = one.exec(&[], &["sh", "-c", "cat /data/other || rm /data/other || chown 0 /data/other || chmod 777 /data/other"]);
        assert_ne!(refused.code, 0, "{refused:?}");
        assert_eq!((shared.owner("other"), says(&one, "stat -c %u:%g /data/other")), ("300033:300100:4750".into(), "65534:65534".into()));
        // What the snapshot got is the tenant's, and the image is as it was.
        let mounts = ctr_ok(&["snapshot", "mounts", "/tmp/any", &one.id]);
        let folder = |key: &str| mounts.split(',').find_map(|word| word.trim().split_once(key)?.1.split(':').next()).unwrap().to_owned();
        let (upper, lower) = (folder("upperdir="), folder("lowerdir="));
        assert_eq!(shell(&format!("stat -c %u {upper} {upper}/root/read {lower}/bin/busybox")), "200000\n200000\n0");
        // The file server is nobody either.
        let status = format!("/proc/{}/status", one.host_pid("fs"));
        assert_eq!(shell(&format!("grep Uid {status} | tr -s '\\t' ' '")), "Uid: 200000 200000 200000 200000");
        assert_ne!(shell(&format!("readlink /proc/{}/ns/user", one.host_pid("fs"))), shell("readlink /proc/self/ns/user"));
    }
    assert_nothing_left(&before);
    let config = handler("id_base = 500000\nmapped_volumes = [\"/tmp\"]\n");
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", shared.0);
    let output = run_pod(&["--runtime-config-path", &config, "--mount", &mount], &["touch", "/data/acme"]);
    assert_eq!((output.code, shared.owner("acme")), (0, "500000:500000:644".into()), "{output:?}");
    // A link below a mapped folder leads to no more rights.
    shell(&format!("ln -s /etc {}/link", shared.0));
    let mount = format!("type=bind,src={}/link,dst=/data,options=rbind:rw", shared.0);
    let output = run_pod(&["--runtime-config-path", &config, "--mount", &mount], &["touch", "/data/evil"]);
    assert!(output.code != 0 && output.stderr.contains("Permission denied") && !std::path::Path::new("/etc/evil").exists(), "{output:?}");
    // Not every file system can have its owners mapped; one below suffices for the kernel to refuse all.
    shell("mkdir -p /mnt/mixed && mount -t tmpfs t /mnt/mixed && mkdir /mnt/mixed/proc && mount -t proc p /mnt/mixed/proc");
    let output = run_pod(
        &["--runtime-config-path", &config, "--mount", "type=bind,src=/mnt/mixed,dst=/data,options=rbind:ro"],
        &["stat", "-c", "%u", "/data", "/data/proc/sys"],
    );
    shell("umount -R /mnt/mixed");
    assert_eq!((output.code, output.stdout.as_str()), (0, "0\n65534\n"), "{output:?}");
    let output = run_pod(&["--runtime-config-path", &config, "--user", "70000"], &["true"]);
    assert!(output.code != 0 && output.stderr.contains("user or group 70000"), "{output:?}");
    std::fs::remove_file(&config).unwrap();
    let refused = run_pod(&["--runtime-config-path", &config], &["true"]);
    assert!(refused.code != 0 && refused.stderr.contains(&format!("read configuration {config}")), "{refused:?}");
    let mapped = Config::set("[fs]\nid_base = 200000\n");
    let refused = run_pod(&["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"], &["true"]);
    drop(mapped);
    assert!(refused.code != 0 && refused.stderr.contains("and fs.id_base exclude each other"), "{refused:?}");
    let refused = run_pod(&["--runtime-config-path", &handler("id_base = 1000\n")], &["true"]);
    assert!(refused.code != 0 && refused.stderr.contains("0, or 65536 to"), "{refused:?}");
}

fn a_kubernetes_pod_has_the_ids_that_the_configuration_says() {
    let _config = Config::set("[fs]\nid_base = 400000\nmapped_volumes = [\"/data\"]\n");
    let _containerd = CriContainerd::start("2");
    for handler in ["caisson", "caisson-sandboxer"] {
        let folder = Folder::make("mapped");
        let mut pod = cri::Pod::start_with(CriContainerd::SOCKET, handler, |_| ()).unwrap();
        let volume = k8s_cri::v1::Mount { container_path: "/data".into(), host_path: folder.0.clone(), ..Default::default() };
        let container = pod.run("mapped", cri::SLEEP, |config| config.mounts = vec![volume]);
        let script = "cat /etc/hosts /etc/resolv.conf > /dev/null && touch /made /data/made && stat -c %u /made /etc/hosts /data/made";
        assert_eq!(pod.output(&container, script), "0\n0\n0", "{handler}");
        assert_eq!(folder.owner("made"), "400000:400000:644", "{handler}");
    }
}
