//! A small OCI image archive (OCI image layout 1.0 in a tar file) of the distribution's `busybox-static`.
//!
//! No registry is needed: `ctr images import` takes the archive. It holds two images: busybox, and
//! the one that containerd's CRI holds a pod's namespaces with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

const BUSYBOX: &str = "/bin/busybox";
const REFERENCE: &str = "docker.io/library/busybox:latest";
const PAUSE_REFERENCE: &str = "docker.io/library/pause:latest";
/// Does nothing, and collects what dies in its process id namespace.
const PAUSE: &[u8] = b"#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 2147483647 & wait; done\n";
/// The commands that the image offers besides `busybox` itself.
const APPLETS: &[&str] = &[
    "[",
    "ash",
    "awk",
    "base64",
    "basename",
    "bc",
    "blkid",
    "cat",
    "chgrp",
    "chmod",
    "chown",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "diff",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "ed",
    "egrep",
    "env",
    "expr",
    "factor",
    "fallocate",
    "false",
    "fgrep",
    "find",
    "flock",
    "free",
    "fsync",
    "getopt",
    "grep",
    "groups",
    "gunzip",
    "gzip",
    "head",
    "hexdump",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "install",
    "ip",
    "kill",
    "killall",
    "less",
    "link",
    "ln",
    "losetup",
    "ls",
    "lsof",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "more",
    "mount",
    "mountpoint",
    "mv",
    "nc",
    "netstat",
    "nice",
    "nohup",
    "nproc",
    "nslookup",
    "od",
    "passwd",
    "paste",
    "pgrep",
    "pidof",
    "ping",
    "ping6",
    "pkill",
    "printenv",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "renice",
    "reset",
    "rm",
    "rmdir",
    "route",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha1sum",
    "sha256sum",
    "sha512sum",
    "shuf",
    "sleep",
    "sort",
    "split",
    "stat",
    "stty",
    "su",
    "sync",
    "sysctl",
    "tac",
    "tail",
    "tar",
    "tee",
    "telnet",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "traceroute",
    "true",
    "truncate",
    "tty",
    "umount",
    "uname",
    "uniq",
    "unlink",
    "unshare",
    "unxz",
    "uptime",
    "usleep",
    "vi",
    "watch",
    "wc",
    "wget",
    "which",
    "who",
    "whoami",
    "xargs",
    "xxd",
    "yes",
    "zcat",
];

/// Makes (once) the archive of the busybox and pause images below `dir` and returns its path.
///
/// Needs the package `busybox-static` on this machine.
pub fn busybox_image(dir: &Path) -> Result<PathBuf> {
    let busybox = std::fs::read(BUSYBOX).with_context(|| format!("read {BUSYBOX}: install the package busybox-static"))?;
    let archive = archive(&layer(&busybox)?, &pause_layer()?)?;
    let path = dir.join(format!("busybox-{}.tar", &digest(&archive)[..16]));
    if !path.exists() {
        std::fs::create_dir_all(dir)?;
        let scratch = dir.join(format!(".busybox-{}", std::process::id()));
        std::fs::write(&scratch, &archive)?;
        std::fs::rename(&scratch, &path)?;
    }
    Ok(path)
}

/// The image's one layer: busybox, its links, and the files that every image has.
fn layer(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("var", 0o755),
        ("var/tmp", 0o1777),
    ] {
        append(&mut tar, &format!("{dir}/"), EntryType::Directory, mode, &[])?;
    }
    append(&mut tar, "bin/busybox", EntryType::Regular, 0o755, busybox)?;
    for applet in APPLETS {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    append(&mut tar, "etc/passwd", EntryType::Regular, 0o644, b"root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")?;
    append(
        &mut tar,
        "etc/group",
        EntryType::Regular,
        0o644,
        b"root:x:0:\ndaemon:x:1:\ntty:x:5:\nwheel:x:10:root\nwww-data:x:33:\nusers:x:100:\nnobody:x:65534:\n",
    )?;
    tar.into_inner().context("finish the layer")
}

/// What the pause image has on top of busybox.
fn pause_layer() -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    append(&mut tar, "pause", EntryType::Regular, 0o755, PAUSE)?;
    tar.into_inner().context("finish the layer")
}

/// The OCI layout around the layers: one image of the first, one of both.
fn archive(busybox: &[u8], pause: &[u8]) -> Result<Vec<u8>> {
    let mut blobs = vec![busybox.to_vec(), pause.to_vec()];
    let manifests = [
        image(REFERENCE, &[busybox], &serde_json::json!({ "Cmd": ["sh"] }), &mut blobs)?,
        image(PAUSE_REFERENCE, &[busybox, pause], &serde_json::json!({ "Entrypoint": ["/pause"] }), &mut blobs)?,
    ];
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    }))?;
    let mut tar = Builder::new(Vec::new());
    append(&mut tar, "oci-layout", EntryType::Regular, 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", EntryType::Regular, 0o644, &index)?;
    for blob in &blobs {
        append(&mut tar, &format!("blobs/sha256/{}", digest(blob)), EntryType::Regular, 0o644, blob)?;
    }
    tar.into_inner().context("finish the image")
}

/// One image's configuration and manifest, added to the blobs; returns its entry in the index.
fn image(reference: &str, layers: &[&[u8]], command: &serde_json::Value, blobs: &mut Vec<Vec<u8>>) -> Result<serde_json::Value> {
    let mut run = command.clone();
    run["Env"] = serde_json::json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    let digests: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", digest(layer))).collect();
    let config = serde_json::to_vec(&serde_json::json!({
        "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": run, "rootfs": { "type": "layers", "diff_ids": digests },
    }))?;
    let entries: Vec<_> = layers
        .iter()
        .zip(&digests)
        .map(|(layer, digest)| serde_json::json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len() }))
        .collect();
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{}", digest(&config)), "size": config.len() },
        "layers": entries,
    }))?;
    let entry = serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{}", digest(&manifest)), "size": manifest.len(),
        "annotations": { "io.containerd.image.name": reference, "org.opencontainers.image.ref.name": "latest" },
        "platform": { "architecture": "amd64", "os": "linux" },
    });
    blobs.extend([config, manifest]);
    Ok(entry)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(tar: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, mode: u32, data: &[u8]) -> Result<()> {
    let mut header = header(kind, mode, data.len() as u64);
    tar.append_data(&mut header, name, data).with_context(|| format!("add {name}"))
}

fn digest(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_busybox_makes_the_same_archive() {
        let first = archive(&layer(b"busybox").unwrap(), &pause_layer().unwrap()).unwrap();
        let second = archive(&layer(b"busybox").unwrap(), &pause_layer().unwrap()).unwrap();
        assert_eq!(digest(&first), digest(&second));
    }

    #[test]
    fn the_archive_names_its_images() {
        let bytes = archive(&layer(b"busybox").unwrap(), &pause_layer().unwrap()).unwrap();
        let mut index = None;
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            if entry.path().unwrap().ends_with("index.json") {
                let mut text = String::new();
                std::io::Read::read_to_string(&mut entry, &mut text).unwrap();
                index = Some(text);
            }
        }
        let index = index.unwrap();
        assert!(index.contains(REFERENCE) && index.contains(PAUSE_REFERENCE));
    }
}
