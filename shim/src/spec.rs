//! The OCI specification of a container, as containerd wrote it and as the guest gets it.
//!
//! It is handled as JSON, not as a type of ours: what we do not know passes through to the agent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use caisson_protocol::guest::{MOUNTS_DIR, ROOTFS_DIR, SHARE_DIR};
use serde_json::{Value, json};

/// A larger specification does not fit into a message to the agent (ttrpc: 4 MiB).
const MAX_BYTES: u64 = 3 << 20;
/// Annotations by which containerd's CRI and CRI-O tell a sandbox from a container in it.
const POD_ANNOTATIONS: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// A folder or file of the host that a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// With everything mounted below it.
    pub recursive: bool,
    /// Name in the container's `mounts` folder.
    pub name: String,
}

/// A container's specification.
#[derive(Debug, Clone)]
pub struct Spec(Value);

/// The pod that a bundle's container belongs to; `None` when it is a pod of its own.
///
/// # Errors
/// When the specification cannot be read.
pub fn pod_of(path: &Path) -> Result<Option<String>> {
    let spec = Spec::read(path)?;
    let annotations = spec.annotations();
    Ok(POD_ANNOTATIONS.iter().find_map(|(kind, pod)| (annotations.get(*kind)? == "container").then(|| annotations.get(*pod).cloned())?))
}

impl Spec {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// When it is missing, too large or no JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        let size = std::fs::metadata(path).with_context(|| format!("read {}", path.display()))?.len();
        anyhow::ensure!(size <= MAX_BYTES, "read {}: it has {size} bytes; at most {MAX_BYTES} are allowed", path.display());
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let value: Value = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        anyhow::ensure!(value.is_object(), "parse {}: it is no object", path.display());
        Ok(Self(value))
    }

    /// Its annotations.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let entries = self.0["annotations"].as_object().into_iter().flatten();
        entries.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
    }

    /// The host name it asks for.
    pub fn hostname(&self) -> &str {
        self.0["hostname"].as_str().unwrap_or_default()
    }

    /// The cgroup that it asks for on the host.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.0["linux"]["cgroupsPath"].as_str().filter(|path| !path.is_empty())
    }

    /// The root file system's folder on the host, for a request that brings no mounts.
    pub fn root_path(&self, bundle: &Path) -> PathBuf {
        bundle.join(self.0["root"]["path"].as_str().unwrap_or("rootfs"))
    }

    /// The specification for the guest, and what must be bound into the share for it.
    ///
    /// What the guest cannot honour is taken out, and said in the log.
    pub fn for_guest(&self, container: &str) -> (Vec<u8>, Vec<Bind>) {
        let mut spec = self.0.clone();
        let place = format!("{SHARE_DIR}/{container}");
        spec["root"]["path"] = json!(format!("{place}/{ROOTFS_DIR}"));
        let mut binds = Vec::new();
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if let Some(bind) = host_bind(mount, binds.len()) {
                mount["source"] = json!(format!("{place}/{MOUNTS_DIR}/{}", bind.name));
                mount["type"] = json!("bind");
                binds.push(bind);
            }
        }
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            // A namespace with a path is one of the host's; the guest's own stands for it.
            namespaces.retain(|namespace| namespace["path"].as_str().unwrap_or_default().is_empty());
        }
        drop_unsupported(&mut spec, container);
        // A JSON value always serialises.
        (serde_json::to_vec(&spec).unwrap_or_default(), binds)
    }
}

/// The bind mount of a host path that a mount entry asks for.
fn host_bind(mount: &Value, index: usize) -> Option<Bind> {
    let options: Vec<&str> = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let recursive = options.contains(&"rbind");
    if mount["type"].as_str() != Some("bind") && !recursive && !options.contains(&"bind") {
        return None;
    }
    Some(Bind { source: PathBuf::from(mount["source"].as_str()?), recursive, name: index.to_string() })
}

/// Takes out what names things of the host that are not in the guest.
fn drop_unsupported(spec: &mut Value, container: &str) {
    let mut dropped = Vec::new();
    if spec
        .as_object_mut()
        .is_some_and(|spec| spec.remove("hooks").is_some_and(|hooks| hooks.as_object().is_some_and(|hooks| !hooks.is_empty())))
    {
        dropped.push("hooks (they are programs of the host)");
    }
    for (section, key, why) in [
        ("process", "apparmorProfile", "the AppArmor profile"),
        ("process", "selinuxLabel", "the SELinux label"),
        ("linux", "mountLabel", "the SELinux mount label"),
        ("linux", "intelRdt", "Intel RDT"),
    ] {
        if spec[section].as_object_mut().and_then(|section| section.remove(key)).is_some_and(|value| value.as_str() != Some("")) {
            dropped.push(why);
        }
    }
    if !dropped.is_empty() {
        log::warn!("container {container}: the guest cannot honour {}", dropped.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(value: Value) -> Spec {
        Spec(value)
    }

    #[test]
    fn host_paths_become_places_in_the_share() {
        let spec = spec(json!({
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]},
                {"destination": "/etc/hosts", "type": "none", "source": "/tmp/hosts", "options": ["bind"]},
            ],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"}], "cgroupsPath": "/default/c"},
            "hooks": {"prestart": [{"path": "/bin/hook"}]},
        }));
        let (guest, binds) = spec.for_guest("c");
        let guest: Value = serde_json::from_slice(&guest).unwrap();
        assert_eq!(guest["root"]["path"], "/run/caisson/share/c/rootfs");
        assert_eq!(guest["mounts"][0]["source"], "proc");
        assert_eq!(
            (&guest["mounts"][1]["source"], &guest["mounts"][2]["source"]),
            (&json!("/run/caisson/share/c/mounts/0"), &json!("/run/caisson/share/c/mounts/1"))
        );
        assert_eq!(
            binds,
            [
                Bind { source: "/srv/data".into(), recursive: true, name: "0".into() },
                Bind { source: "/tmp/hosts".into(), recursive: false, name: "1".into() }
            ]
        );
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "pid"}]));
        assert!(guest.get("hooks").is_none());
    }

    #[test]
    fn a_container_names_its_pod_by_annotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let pod = |value: Value| {
            std::fs::write(&path, value.to_string()).unwrap();
            pod_of(&path).unwrap()
        };
        assert_eq!(pod(json!({})), None);
        assert_eq!(pod(json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p"}})), None);
        assert_eq!(
            pod(json!({"annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"}})),
            Some("p".into())
        );
    }
}
