//! Builds what a node boots from: kernel, initramfs and root file system, all of Debian packages.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use super::mend;
use crate::{cache, packages, progress};

/// Names how the image is made, beside the lists and scripts below; to be changed with [`build`], so
/// that a kept image is made anew.
const RECIPE: &str = "merged /usr, ext4 with an overlay on tmpfs, emulation of SVM mended, 4";
/// The release that the node is made of.
const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &[
    "acl",
    "attr",
    "bash",
    "busybox-static",
    "containernetworking-plugins",
    "coreutils",
    "e2fsprogs",
    "erofs-utils",
    "findutils",
    "fio",
    "grep",
    "gawk",
    "sed",
    "diffutils",
    "inotify-tools",
    "iproute2",
    "iperf3",
    "passt",
    "iptables",
    "jq",
    "kmod",
    "linux-image-amd64",
    "linux-perf",
    "mount",
    "nftables",
    "procps",
    "quota",
    "qemu-system-x86",
    "runc",
    "socat",
    "strace",
    "uidmap",
    "util-linux",
    "virtiofsd",
    "xz-utils",
];
/// The containerd versions that one Caisson binary has to serve: release, folder. The first is the node's default.
const CONTAINERDS: &[(&str, &str)] = &[("sid", "2"), ("trixie", "1.7"), ("bookworm", "1.6")];
/// What the initramfs loads to reach the root file system.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "crc32c_generic", "ext4", "overlay"];

const INIT: &str = include_str!("init.sh");
const CONTAINERD_SCRIPT: &str = include_str!("containerd.sh");
const CONTAINERD_CONFIG: &str = include_str!("containerd.toml");
const CNI_CONFIG: &str = include_str!("cni.conflist");
const INITRAMFS_INIT: &str = include_str!("initramfs.sh");

/// The files of a node, all in one cache folder.
pub struct NodeImage {
    dir: PathBuf,
    /// Names the content; saved states belong to one of these.
    pub key: String,
}

impl NodeImage {
    /// The node's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }
    /// The node's initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs")
    }
    /// The ext4 image of the root file system.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("root.ext4")
    }
    /// The unpacked tree that the image was made of; QEMU runs from it.
    pub fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }
}

/// The node's image, from the cache when nothing that it is made of changed.
pub fn node_image() -> Result<NodeImage> {
    let busybox_image = caisson_image_builder::busybox_image(&cache::root()?.join("images"))?;
    let lists = format!("{SUITE} {PACKAGES:?} {CONTAINERDS:?} {BOOT_MODULES:?}");
    let recipe = [
        lists.as_bytes(),
        RECIPE.as_bytes(),
        INIT.as_bytes(),
        CONTAINERD_SCRIPT.as_bytes(),
        CONTAINERD_CONFIG.as_bytes(),
        CNI_CONFIG.as_bytes(),
        INITRAMFS_INIT.as_bytes(),
        &std::fs::read(&busybox_image)?,
    ];
    let key = cache::key(recipe);
    let dir = cache::entry("node", &key, |dir| {
        let files =
            progress::step("downloading the node's packages (300 MB once a machine)", || packages::download(SUITE, PACKAGES, true))?;
        let containerds = progress::step("downloading containerd 1.6, 1.7 and 2.x", || {
            CONTAINERDS
                .iter()
                .map(|(suite, version)| Ok((*version, packages::download(suite, &["containerd"], false)?)))
                .collect::<Result<Vec<_>>>()
        })?;
        progress::step("making the node's root file system", || build(dir, &files, &containerds, &busybox_image))
    })?;
    Ok(NodeImage { dir, key })
}

fn build(dir: &Path, files: &[PathBuf], containerds: &[(&str, Vec<PathBuf>)], busybox_image: &Path) -> Result<()> {
    let sh = Shell::new()?;
    let tree = dir.join("tree");
    sh.create_dir(&tree)?;
    packages::unpack(files, &tree)?;
    for (index, (version, files)) in containerds.iter().enumerate() {
        let scratch = dir.join("containerd");
        packages::unpack(files, &scratch)?;
        let bin = scratch.join("usr/bin");
        let place = tree.join("opt/containerd").join(version).join("bin");
        sh.create_dir(&place)?;
        for name in ["containerd", "ctr", "containerd-shim-runc-v2"] {
            sh.copy_file(bin.join(name), place.join(name))?;
            if index == 0 {
                cmd!(sh, "ln -sfn /opt/containerd/{version}/bin/{name} {tree}/usr/bin/{name}").quiet().run()?;
            }
        }
        sh.remove_path(&scratch)?;
    }
    merge_usr(&sh, &tree)?;
    if let Err(error) = mend::emulator(&tree.join("usr/bin/qemu-system-x86_64")) {
        eprintln!("warning: {error:#}; an emulated node's guests may hang now and then");
    }
    for dir in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "etc/cni/net.d",
        "etc/containerd",
        "var/lib/containerd",
        "var/log",
        "usr/lib/node",
        "share",
        "node",
        "caisson",
    ] {
        sh.create_dir(tree.join(dir))?;
    }
    for (name, target) in [
        ("iptables", "xtables-nft-multi"),
        ("iptables-save", "xtables-nft-multi"),
        ("iptables-restore", "xtables-nft-multi"),
        ("ip6tables", "xtables-nft-multi"),
    ] {
        cmd!(sh, "ln -sfn {target} {tree}/usr/sbin/{name}").quiet().run()?;
    }
    for applet in ["ping", "vi", "wget", "nc", "hostname", "less"] {
        if !tree.join("usr/bin").join(applet).exists() {
            cmd!(sh, "ln -sfn busybox {tree}/usr/bin/{applet}").quiet().run()?;
        }
    }
    cmd!(sh, "ln -sfn bash {tree}/usr/bin/sh").quiet().run()?;
    // Where `ctr run --cni` looks.
    sh.create_dir(tree.join("opt/cni"))?;
    cmd!(sh, "ln -sfn /usr/lib/cni {tree}/opt/cni/bin").quiet().run()?;
    write_executable(&sh, &tree.join("usr/lib/node/init"), INIT)?;
    write_executable(&sh, &tree.join("usr/lib/node/containerd.sh"), CONTAINERD_SCRIPT)?;
    sh.write_file(tree.join("etc/containerd/config.toml"), CONTAINERD_CONFIG)?;
    sh.write_file(tree.join("etc/cni/net.d/10-node.conflist"), CNI_CONFIG)?;
    sh.write_file(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    sh.write_file(tree.join("etc/group"), "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n")?;
    sh.write_file(tree.join("etc/hosts"), "127.0.0.1 localhost node\n")?;
    sh.write_file(tree.join("etc/resolv.conf"), "nameserver 127.0.0.1\n")?;
    sh.copy_file(busybox_image, tree.join("usr/lib/node/busybox.tar"))?;

    let release = kernel_release(&tree)?;
    run_from_tree(&tree, "usr/bin/kmod", &["--argv0", "depmod"], &["-b".into(), tree.display().to_string(), release.clone()])?;
    sh.copy_file(tree.join("boot").join(format!("vmlinuz-{release}")), dir.join("vmlinuz"))?;
    sh.remove_path(tree.join("boot"))?;
    build_initramfs(&sh, &tree, &release, &dir.join("initramfs"))?;

    let disk = dir.join("root.ext4");
    let size = cmd!(sh, "du --summarize --block-size=1M {tree}").quiet().read()?;
    let size: u64 = size.split_whitespace().next().and_then(|n| n.parse().ok()).context("read the size of the node's root")?;
    let size = format!("{}M", size * 12 / 10 + 64);
    // mke2fs lives in sbin, which is not on every user's PATH.
    let _path = sh.push_env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    cmd!(sh, "mke2fs -q -t ext4 -E root_owner=0:0 -O ^has_journal -d {tree} {disk} {size}").quiet().run()?;
    Ok(())
}

/// Gives the tree the merged-/usr layout that maintainer scripts would have made.
fn merge_usr(sh: &Shell, tree: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let top = tree.join(name);
        let usr = tree.join("usr").join(name);
        sh.create_dir(&usr)?;
        if top.is_dir() && !top.is_symlink() {
            cmd!(sh, "cp -a {top}/. {usr}").quiet().run()?;
            sh.remove_path(&top)?;
        }
        cmd!(sh, "ln -sfn usr/{name} {top}").quiet().run()?;
    }
    Ok(())
}

fn write_executable(sh: &Shell, path: &Path, text: &str) -> Result<()> {
    sh.write_file(path, text)?;
    cmd!(sh, "chmod 755 {path}").quiet().run()?;
    Ok(())
}

fn kernel_release(tree: &Path) -> Result<String> {
    let dir = tree.join("usr/lib/modules");
    let entry = std::fs::read_dir(&dir)?.next().context("find the node's kernel modules")??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// A command that runs a program of `tree` with the tree's own loader and libraries, so that it
/// runs on a machine of any release.
pub fn tree_command(tree: &Path, program: &str, loader_args: &[&str]) -> std::process::Command {
    let lib = tree.join("usr/lib/x86_64-linux-gnu");
    let mut command = std::process::Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&lib).args(loader_args).arg(tree.join(program));
    command
}

fn run_from_tree(tree: &Path, program: &str, loader_args: &[&str], args: &[String]) -> Result<()> {
    let status = tree_command(tree, program, loader_args).args(args).status().with_context(|| format!("run {program}"))?;
    anyhow::ensure!(status.success(), "run {program}: {status}");
    Ok(())
}

/// Packs busybox, the modules that reach the root, and the script that does it.
fn build_initramfs(sh: &Shell, tree: &Path, release: &str, target: &Path) -> Result<()> {
    let modules = tree.join("usr/lib/modules").join(release);
    let deps = sh.read_file(modules.join("modules.dep"))?;
    let mut order: Vec<String> = Vec::new();
    for name in BOOT_MODULES {
        let line = deps.lines().find(|line| {
            line.split(':')
                .next()
                .and_then(|path| Path::new(path).file_name())
                .is_some_and(|file| file.to_string_lossy().split('.').next() == Some(*name))
        });
        // A module that is missing is built into this kernel.
        let Some(line) = line else { continue };
        let (module, needs) = line.split_once(':').context("parse modules.dep")?;
        // modules.dep lists what a module needs from the nearest to the farthest.
        for path in needs.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|have| have == path) {
                order.push(path.to_owned());
            }
        }
    }
    let stage = tempfile::tempdir()?;
    let stage = stage.path();
    sh.create_dir(stage.join("modules"))?;
    sh.create_dir(stage.join("bin"))?;
    let mut names = Vec::new();
    for path in &order {
        let source = modules.join(path);
        let name = source.file_name().map(|name| name.to_string_lossy().trim_end_matches(".xz").to_owned()).context("name a module")?;
        let dest = stage.join("modules").join(&name);
        if path.ends_with(".xz") {
            let data = cmd!(sh, "xz --decompress --stdout {source}").quiet().output()?.stdout;
            sh.write_file(&dest, data)?;
        } else {
            sh.copy_file(&source, &dest)?;
        }
        names.push(name);
    }
    sh.write_file(stage.join("modules/order"), names.join("\n"))?;
    sh.copy_file(tree.join("usr/bin/busybox"), stage.join("bin/busybox"))?;
    write_executable(sh, &stage.join("init"), INITRAMFS_INIT)?;
    let file = std::fs::File::create(target)?;
    caisson_image_builder::pack_tree(stage, file)?;
    Ok(())
}
