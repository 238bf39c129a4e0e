//! The OCI specification of a container, as containerd wrote it and as the guest gets it.
//!
//! It is handled as JSON, not as a type of ours: what we do not know passes through to the agent.

mod namespaces;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use caisson_protocol::agent::MemoryVolume;
use caisson_protocol::config::HostNamespaces;
use caisson_protocol::guest::{POD_ANNOTATIONS, ROOTFS_DIR, SHARE_DIR, SHM_DIR, shared_mount};
use serde_json::{Map, Value, json};

use crate::cri::PodFile;
use crate::errors::{self, Error};
use crate::idmap::IdMap;
use crate::memory_volumes;
use crate::mounts::{Follow, How, ReadOnly};
use crate::size::Limits;

/// A larger specification does not fit into a message to the agent (ttrpc: 4 MiB).
const MAX_BYTES: u64 = 3 << 20;

/// A folder or file of the host that a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// What its copy in the share is like.
    pub how: How,
    /// Name in the container's `mounts` folder.
    pub name: String,
}

/// A container's specification.
#[derive(Debug, Clone)]
pub struct Spec(Value);

/// A specification as the guest gets it, and what it takes to honour it.
#[derive(Debug, PartialEq)]
pub struct GuestSpec {
    /// `config.json`.
    pub spec: Value,
    /// What is bound into the share.
    pub binds: Vec<Bind>,
    /// Volumes that the guest makes of its own memory.
    pub memory_volumes: Vec<MemoryVolume>,
}

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A pod of its own, as `ctr` makes them.
    Single,
    /// The one that holds a pod's namespaces and network (Kubernetes' pause container).
    Sandbox,
    /// One of the containers of the named pod.
    Member(String),
}

/// The pod's other containers, as a specification refers to them.
pub trait Siblings {
    /// The guest's id of the process that has this id on the host.
    fn guest_pid(&self, host_pid: u32) -> Option<u32>;
    /// The guest's id of the sandbox's own process.
    fn sandbox_pid(&self) -> Option<u32>;
    /// The files that the guest keeps for all of them; none when containerd does.
    fn files(&self) -> &[PodFile];
}

/// The pod that a bundle's container belongs to; `None` when it is a pod of its own, or no
/// container: a sandbox that the shim is to make has no specification.
///
/// # Errors
/// When the specification cannot be read.
pub fn pod_of(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    Ok(match Spec::read(path)?.kind() {
        Kind::Single | Kind::Sandbox => None,
        Kind::Member(pod) => Some(pod),
    })
}

/// An exec's process object that has a terminal or none as the request says, which is what its
/// streams are made by.
///
/// # Errors
/// When it is no JSON object.
pub fn with_terminal(process: &[u8], terminal: bool) -> errors::Result<Vec<u8>> {
    let parsed: Option<Map<String, Value>> = serde_json::from_slice(process).ok();
    let mut process = parsed.ok_or_else(|| Error::Invalid("the exec's process is no JSON object".into()))?;
    process.insert("terminal".into(), terminal.into());
    Ok(Value::from(process).to_string().into_bytes())
}

impl Spec {
    /// A specification that was not read from a file.
    pub const fn from_value(value: Value) -> Self {
        Self(value)
    }

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

    /// What it is to its pod.
    pub fn kind(&self) -> Kind {
        let annotation = |name: &str| self.0["annotations"][name].as_str();
        for (kind, pod) in POD_ANNOTATIONS {
            match (annotation(kind), annotation(pod)) {
                (Some("sandbox"), _) => return Kind::Sandbox,
                (Some("container"), Some(pod)) => return Kind::Member(pod.to_owned()),
                _ => {}
            }
        }
        Kind::Single
    }

    /// What the pod may use when it starts.
    ///
    /// For a pod of several containers these are annotations of its sandbox, which containerd
    /// writes from what kubelet adds up; a container of its own has its own limits.
    pub fn pod_limits(&self) -> Limits {
        if self.kind() == Kind::Single {
            return self.limits();
        }
        let annotation = |name: &str| self.0["annotations"][format!("io.kubernetes.cri.sandbox-{name}")].as_str()?.parse().ok();
        Limits::new(annotation("memory"), annotation("cpu-quota"), annotation("cpu-period"))
    }

    /// What the container may use.
    pub fn limits(&self) -> Limits {
        Limits::of(&self.0["linux"]["resources"])
    }

    /// Size of the shared memory that the pod's containers are to have, in bytes; 0 when the
    /// specification does not say.
    pub fn shm_bytes(&self) -> u64 {
        let mounts = self.0["mounts"].as_array().into_iter().flatten();
        // containerd 1.6 has one in a sandbox's specification that is of no folder, before the pod's.
        let sources = mounts.filter(|mount| self.is_pod_shm(mount)).filter_map(|mount| mount["source"].as_str());
        let size = sources.filter(|source| source.starts_with('/')).find_map(|source| nix::sys::statvfs::statvfs(source).ok());
        size.map_or(0, |size| size.blocks() * size.fragment_size())
    }

    /// Whether a mount is the shared memory of a pod, which is in the guest.
    fn is_pod_shm(&self, mount: &Value) -> bool {
        self.kind() != Kind::Single
            && mount["destination"].as_str().is_some_and(|place| Path::new(place) == Path::new(SHM_DIR))
            && mount["source"].as_str().is_some_and(|source| Path::new(source).file_name().is_some_and(|name| name == "shm"))
    }

    /// Its own process.
    pub fn process(&self) -> Option<Map<String, Value>> {
        self.0["process"].as_object().cloned()
    }

    /// The host name it asks for.
    pub fn hostname(&self) -> &str {
        self.0["hostname"].as_str().unwrap_or_default()
    }

    /// The network namespace that it names; `None` when it asks for a new one, or for none.
    pub fn network_namespace(&self) -> Option<&Path> {
        let namespaces = self.0["linux"]["namespaces"].as_array().into_iter().flatten();
        let path = namespaces.filter(|namespace| namespace["type"] == "network").find_map(|namespace| namespace["path"].as_str());
        path.filter(|path| !path.is_empty()).map(Path::new)
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
    ///
    /// # Errors
    /// What of the host it asks for that a machine of its own cannot have.
    pub fn for_guest(&self, container: &str, host: HostNamespaces, siblings: &impl Siblings) -> errors::Result<GuestSpec> {
        let mut spec = self.0.clone();
        let place = format!("{SHARE_DIR}/{container}");
        spec["root"]["path"] = json!(format!("{place}/{ROOTFS_DIR}"));
        let (mut binds, mut of_memory) = (Vec::new(), Vec::new());
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if self.is_pod_shm(mount) {
                mount["source"] = json!(SHM_DIR);
                mount["type"] = json!("bind");
            } else if let Some(volume) = memory_volumes::of(mount) {
                mount["source"] = json!(memory_volumes::place(&volume));
                mount["type"] = json!("bind");
                of_memory.push(volume);
            } else if let Some(bind) =
                host_bind(mount, binds.len()).map_err(|error| Error::Invalid(format!("container {container}: {error:#}")))?
            {
                mount["source"] = json!(shared_mount(container, &bind.name));
                mount["type"] = json!("bind");
                forget_owners(mount);
                binds.push(bind);
            }
        }
        if matches!(self.kind(), Kind::Member(_)) {
            add_pod_files(&mut spec, siblings.files());
        }
        spec["linux"]["namespaces"] = self.guest_namespaces(container, host, siblings)?.into();
        drop_unsupported(&mut spec, container);
        Ok(GuestSpec { spec, binds, memory_volumes: of_memory })
    }

    /// Whether it has users of its own, in a user namespace.
    pub fn has_own_users(&self) -> bool {
        self.0["linux"]["uidMappings"].is_array()
    }
}

/// Adds what containerd leaves out when it did not make the pod's sandbox: the files in /etc that
/// no volume covers, and the pod's shared memory.
fn add_pod_files(spec: &mut Value, files: &[PodFile]) {
    if files.is_empty() {
        return;
    }
    let read_only = spec["root"]["readonly"].as_bool().unwrap_or_default();
    let Some(mounts) = spec["mounts"].as_array_mut() else { return };
    for file in files {
        if !mounts.iter().any(|mount| mount["destination"] == file.destination) {
            mounts.push(file.mount(read_only));
        }
    }
    for mount in mounts.iter_mut().filter(|mount| mount["destination"] == SHM_DIR && mount["type"] == "tmpfs") {
        *mount = json!({"destination": SHM_DIR, "type": "bind", "source": SHM_DIR, "options": ["rbind", "rprivate"]});
    }
}

/// The bind mount of a host path that a mount entry asks for.
fn host_bind(mount: &Value, index: usize) -> Result<Option<Bind>> {
    let options: Vec<&str> = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let has = |word: &str| options.contains(&word);
    let below = has("rbind");
    let Some(source) = mount["source"].as_str().filter(|_| mount["type"] == "bind" || below || has("bind")) else { return Ok(None) };
    let follows = ["slave", "rslave", "shared", "rshared"].into_iter().any(has);
    let read_only = match options.iter().rev().find(|option| matches!(**option, "ro" | "rw")) {
        _ if has("rro") => ReadOnly::All,
        Some(&"ro") => ReadOnly::Top,
        _ => ReadOnly::No,
    };
    let owners = IdMap::of(mount).with_context(|| format!("mount {}", mount["destination"]))?;
    anyhow::ensure!(
        owners.is_some() || !(has("idmap") || has("ridmap")),
        "mount {}: idmap is asked for without uidMappings and gidMappings",
        mount["destination"]
    );
    let follow = if follows { Follow::Host } else { Follow::No };
    let how = How { below, follow, read_only, owners, owners_below: has("ridmap"), ..How::default() };
    let destination = mount["destination"].as_str().unwrap_or_default().into();
    Ok(Some(Bind { source: source.into(), destination, how, name: index.to_string() }))
}

/// Takes out of a mount what was done on the host: the mapping of its files' owners.
fn forget_owners(mount: &mut Value) {
    if let Some(mount) = mount.as_object_mut() {
        mount.remove("uidMappings");
        mount.remove("gidMappings");
    }
    if let Some(options) = mount["options"].as_array_mut() {
        options.retain(|option| option != "idmap" && option != "ridmap");
    }
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

    /// A pod whose sandbox has the id 100 on the host and 7 in the guest.
    struct Pod;

    impl Siblings for Pod {
        fn guest_pid(&self, host_pid: u32) -> Option<u32> {
            (host_pid == 100).then_some(7)
        }

        fn sandbox_pid(&self) -> Option<u32> {
            Some(7)
        }

        fn files(&self) -> &[PodFile] {
            &[]
        }
    }

    fn for_guest(spec: &Spec, host: HostNamespaces) -> errors::Result<(Value, Vec<Bind>)> {
        spec.for_guest("c", host, &Pod).map(|guest| (guest.spec, guest.binds))
    }

    #[test]
    fn host_paths_become_places_in_the_share() {
        let spec = spec(json!({
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro", "rslave"]},
                {"destination": "/etc/hosts", "type": "none", "source": "/tmp/hosts", "options": ["bind"]},
            ],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/var/run/netns/x"}], "cgroupsPath": "/default/c"},
            "hooks": {"prestart": [{"path": "/bin/hook"}]},
        }));
        let (guest, binds) = for_guest(&spec, HostNamespaces::Refuse).unwrap();
        assert_eq!(guest["root"]["path"], "/run/caisson/share/c/rootfs");
        assert_eq!(guest["mounts"][0]["source"], "proc");
        assert_eq!(
            (&guest["mounts"][1]["source"], &guest["mounts"][2]["source"]),
            (&json!("/run/caisson/share/c/mounts/0"), &json!("/run/caisson/share/c/mounts/1"))
        );
        assert_eq!(
            binds,
            [
                Bind {
                    source: "/srv/data".into(),
                    destination: "/data".into(),
                    how: How { below: true, follow: Follow::Host, read_only: ReadOnly::Top, ..How::default() },
                    name: "0".into()
                },
                Bind { source: "/tmp/hosts".into(), destination: "/etc/hosts".into(), how: How::default(), name: "1".into() }
            ]
        );
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "ipc"}]));
        assert!(guest.get("hooks").is_none());
    }

    #[test]
    fn namespaces_of_the_pod_are_those_of_the_guest() {
        let namespaces =
            json!([{"type": "pid"}, {"type": "network", "path": "/proc/100/ns/net"}, {"type": "ipc", "path": "/proc/100/ns/ipc"}]);
        let (guest, _) = for_guest(&spec(json!({"linux": {"namespaces": namespaces}})), HostNamespaces::Refuse).unwrap();
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}]));
        let stranger = json!([{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "network"}, {"type": "ipc"}]);
        let error = for_guest(&spec(json!({"linux": {"namespaces": stranger}})), HostNamespaces::Refuse).unwrap_err();
        assert_eq!(error.to_string(), "container c: the pid namespace /proc/1/ns/pid is not one of its pod's");
    }

    #[test]
    fn cgroups_that_are_to_be_looked_at_are_the_containers_own() {
        let mount = |mode: &str| json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["nosuid", mode]});
        let namespaces = |mode: &str, asked: Value| {
            let spec = spec(json!({"linux": {"namespaces": asked}, "mounts": [mount(mode)]}));
            for_guest(&spec, HostNamespaces::Pod).unwrap().0["linux"]["namespaces"].clone()
        };
        let own = json!([{"type": "pid"}, {"type": "cgroup"}]);
        assert_eq!(namespaces("ro", json!([{"type": "pid"}])), own);
        assert_eq!(namespaces("ro", own.clone()), own);
        assert_eq!(namespaces("rw", json!([{"type": "pid"}])), json!([{"type": "pid"}]));
    }

    #[test]
    fn namespaces_of_the_host_are_refused_or_become_the_pods() {
        let spec = spec(json!({"linux": {"namespaces": [{"type": "ipc"}]}}));
        let error = for_guest(&spec, HostNamespaces::Refuse).unwrap_err();
        assert!(error.to_string().contains("the host's network") && error.to_string().contains("pod.host_namespaces"), "{error}");
        let (guest, _) = for_guest(&spec, HostNamespaces::Pod).unwrap();
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "ipc"}, {"type": "pid", "path": "/proc/7/ns/pid"}]));
    }

    #[test]
    fn shared_memory_of_a_pod_is_the_guests() {
        let spec = spec(json!({
            "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"},
            "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/sandboxes/p/shm", "options": ["rbind"]}],
        }));
        let (guest, binds) = for_guest(&spec, HostNamespaces::Pod).unwrap();
        assert_eq!((&guest["mounts"][0]["source"], binds.len(), spec.shm_bytes()), (&json!("/dev/shm"), 0, 0));
    }

    #[test]
    fn a_pods_limits_are_its_sandboxs_annotations_or_the_containers_own() {
        let kube = |memory: &str| {
            json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-memory": memory,
                "io.kubernetes.cri.sandbox-cpu-quota": "150000", "io.kubernetes.cri.sandbox-cpu-period": "100000"}})
        };
        assert_eq!(spec(kube("1048576")).pod_limits(), Limits::new(Some(1 << 20), Some(150_000), None));
        assert_eq!(spec(kube("0")).pod_limits(), Limits::new(None, Some(150_000), None));
        let single = json!({"linux": {"resources": {"memory": {"limit": 2097152}, "cpu": {"quota": -1, "period": 100000}}}});
        assert_eq!(spec(single).pod_limits(), Limits::new(Some(2 << 20), None, None));
        assert_eq!(spec(json!({})).pod_limits(), Limits::new(None, None, None));
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
