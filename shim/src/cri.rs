//! A pod whose sandbox containerd leaves to the shim (`sandboxer = "shim"`): from kubelet's
//! description to the specification of the container that holds its namespaces.
//!
//! With containerd's own sandboxes the specification comes from containerd, and so do the files in
//! /etc; here there is neither, nor an image.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::cri::{IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig};
use caisson_protocol::guest::{PAUSE, POD_ANNOTATIONS, POD_FILES_DIR};
use protobuf::{Enum, Message};
use serde_json::{Map, Value, json};

use crate::spec::Spec;

/// By which containerd says of a sandbox where its containers' output goes.
pub const LOG_FOLDER: &str = "io.kubernetes.cri.sandbox-log-directory";

/// The type of [`PodSandboxConfig`] in a request.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// What a pod's network allows everyone, as containerd 2 sets it for sandboxes of its own.
const SYSCTLS: &[(&str, &str)] = &[("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
/// Longest file in /etc that is made for a pod: kubelet's own limits keep below it.
const MAX_FILE: usize = 64 << 10;

/// A file that the guest keeps for all containers of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFile {
    /// Its name in the guest's [`POD_FILES_DIR`].
    pub name: &'static str,
    /// Where containers see it.
    pub destination: &'static str,
    /// What it holds.
    pub content: Vec<u8>,
}

impl PodFile {
    /// The mount by which a container sees it.
    pub fn mount(&self, read_only: bool) -> Value {
        let access = if read_only { "ro" } else { "rw" };
        json!({"destination": self.destination, "type": "bind", "source": format!("{POD_FILES_DIR}/{}", self.name),
            "options": ["bind", "rprivate", access]})
    }
}

/// What a request to create a sandbox says.
#[derive(Debug, Clone)]
pub struct PodSandbox {
    /// containerd's folder for it.
    pub bundle: String,
    /// The container that holds the pod's namespaces.
    pub spec: Spec,
    /// What its containers find in /etc.
    pub files: Vec<PodFile>,
    /// The user and group, in the guest, that its root is.
    pub root: (u32, u32),
}

impl PodSandbox {
    /// Reads kubelet's description of a pod.
    ///
    /// `kind` and `value` are the request's options; `netns` is the network namespace that was
    /// made for it, empty for none; `bundle` is containerd's folder for it.
    ///
    /// # Errors
    /// When it is no such description, or a file for /etc would be too long.
    pub fn read(id: &str, kind: &str, value: &[u8], netns: &str, bundle: &str) -> Result<Self> {
        ensure!(kind.ends_with(CONFIG_TYPE), "the sandbox's options are of type {kind:?}; expected is {CONFIG_TYPE}");
        let config = PodSandboxConfig::parse_from_bytes(value).context("read the pod's configuration")?;
        let files = files(&config)?;
        let spec = specification(id, &config, netns)?;
        let root = |mappings: &str| {
            let mut ranges = spec["linux"][mappings].as_array().into_iter().flatten();
            ranges.find(|range| range["containerID"] == 0).and_then(|range| u32::try_from(range["hostID"].as_u64()?).ok()).unwrap_or(0)
        };
        let root = (root("uidMappings"), root("gidMappings"));
        Ok(Self { bundle: bundle.to_owned(), spec: Spec::from_value(spec), files, root })
    }
}

fn specification(id: &str, config: &PodSandboxConfig, netns: &str) -> Result<Value> {
    let options = &config.linux.security_context.namespace_options;
    let is_hosts = |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode.value() == NamespaceMode::NODE.value();
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "uts"})];
    if !is_hosts(options.network) {
        namespaces.push(json!({"type": "network", "path": netns}));
    }
    for (kind, mode) in [("pid", options.pid), ("ipc", options.ipc)] {
        if !is_hosts(mode) {
            namespaces.push(json!({"type": kind}));
        }
    }
    let mut sysctls: Map<String, Value> = SYSCTLS.iter().map(|(name, value)| ((*name).into(), json!(value))).collect();
    sysctls.extend(config.linux.sysctls.iter().map(|(name, value)| (name.clone(), json!(value))));
    let mut linux = json!({"cgroupsPath": cgroups_path(&config.linux.cgroup_parent, id), "sysctl": sysctls});
    if let Some((uids, gids)) = user_mappings(options)? {
        namespaces.push(json!({"type": "user"}));
        (linux["uidMappings"], linux["gidMappings"]) = (uids, gids);
    }
    linux["namespaces"] = namespaces.into();
    Ok(json!({
        "ociVersion": "1.1.0",
        "hostname": hostname(config),
        "root": {"path": "rootfs", "readonly": true},
        "process": {"args": [PAUSE], "cwd": "/", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": true},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}],
        "annotations": annotations(id, config),
        "linux": linux,
    }))
}

/// The pod's name; without one, the host's.
fn hostname(config: &PodSandboxConfig) -> String {
    if config.hostname.is_empty() {
        return nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned());
    }
    config.hostname.clone()
}

/// The pod's own annotations, and those by which containerd says what a sandbox is.
fn annotations(id: &str, config: &PodSandboxConfig) -> Map<String, Value> {
    let mut annotations: Map<String, Value> = config.annotations.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let (kind, pod) = POD_ANNOTATIONS[0];
    annotations.insert(kind.into(), json!("sandbox"));
    annotations.insert(pod.into(), json!(id));
    annotations.insert(LOG_FOLDER.into(), json!(config.log_directory));
    let resources = &config.linux.resources;
    for (name, value) in
        [("memory", resources.memory_limit_in_bytes), ("cpu-quota", resources.cpu_quota), ("cpu-period", resources.cpu_period)]
    {
        annotations.insert(format!("io.kubernetes.cri.sandbox-{name}"), json!(value.to_string()));
    }
    annotations
}

/// The cgroup of the pod's processes on the host, as containerd names it for a container.
fn cgroups_path(parent: &str, id: &str) -> String {
    match Path::new(parent).file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".slice")) {
        Some(slice) => format!("{slice}:cri-containerd:{id}"),
        None if parent.is_empty() => String::new(),
        None => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// The user and group mappings of a pod with a user namespace of its own.
///
/// # Errors
/// For what is neither that nor a pod without one.
fn user_mappings(options: &NamespaceOption) -> Result<Option<(Value, Value)>> {
    let Some(user) = options.userns_options.as_ref() else { return Ok(None) };
    let is_mapped = !user.uids.is_empty() && !user.gids.is_empty();
    match user.mode.enum_value() {
        Ok(NamespaceMode::POD) if is_mapped => {}
        Ok(NamespaceMode::NODE) if user.uids.is_empty() && user.gids.is_empty() => return Ok(None),
        mode => bail!(
            "the pod's user namespace has mode {mode:?}, {} mappings of users and {} of groups; allowed are POD with both and NODE with none",
            user.uids.len(),
            user.gids.len()
        ),
    }
    let list = |mappings: &[IDMapping]| -> Value {
        mappings.iter().map(|map| json!({"containerID": map.container_id, "hostID": map.host_id, "size": map.length})).collect()
    };
    Ok(Some((list(&user.uids), list(&user.gids))))
}

/// The files in /etc that containerd makes for sandboxes of its own.
fn files(config: &PodSandboxConfig) -> Result<Vec<PodFile>> {
    let host = |path: &str| std::fs::read(path).unwrap_or_default();
    let resolv_conf = if let Some(dns) = config.dns_config.as_ref() {
        let servers = dns.servers.iter().map(|server| format!("nameserver {server}\n"));
        let list = |word: &str, values: &[String]| if values.is_empty() { String::new() } else { format!("{word} {}\n", values.join(" ")) };
        let text = list("search", &dns.searches) + &servers.collect::<String>() + &list("options", &dns.options);
        text.into_bytes()
    } else {
        host("/etc/resolv.conf")
    };
    let files = [
        ("hostname", "/etc/hostname", format!("{}\n", hostname(config)).into_bytes()),
        ("hosts", "/etc/hosts", host("/etc/hosts")),
        ("resolv.conf", "/etc/resolv.conf", resolv_conf),
    ];
    for (name, _, content) in &files {
        ensure!(content.len() <= MAX_FILE, "the pod's {name} would have {} bytes; at most {MAX_FILE} are allowed", content.len());
    }
    Ok(files.into_iter().map(|(name, destination, content)| PodFile { name, destination, content }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Limits;

    fn config() -> PodSandboxConfig {
        let mut config = PodSandboxConfig { hostname: "web".into(), ..PodSandboxConfig::default() };
        config.dns_config.mut_or_insert_default().servers = vec!["10.0.0.10".into()];
        config.dns_config.mut_or_insert_default().searches = vec!["a.local".into(), "local".into()];
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1".into();
        linux.resources.mut_or_insert_default().memory_limit_in_bytes = 1 << 20;
        config
    }

    fn read(config: &PodSandboxConfig) -> PodSandbox {
        PodSandbox::read("p1", CONFIG_TYPE, &config.write_to_bytes().unwrap(), "/run/netns/x", "/b").unwrap()
    }

    #[test]
    fn a_pods_description_becomes_a_sandbox_of_its_own() {
        let sandbox = read(&config());
        assert_eq!(sandbox.spec.kind(), crate::spec::Kind::Sandbox);
        assert_eq!(sandbox.spec.hostname(), "web");
        assert_eq!(sandbox.spec.network_namespace(), Some(Path::new("/run/netns/x")));
        assert_eq!(sandbox.spec.cgroups_path(), Some("/kubepods/pod1/p1"));
        assert_eq!(sandbox.spec.pod_limits(), Limits::new(Some(1 << 20), None, None));
    }

    #[test]
    fn names_and_addresses_are_in_its_files() {
        let files = read(&config()).files;
        let text = |name: &str| files.iter().find(|file| file.name == name).map(|file| String::from_utf8(file.content.clone()).unwrap());
        assert_eq!(text("hostname").unwrap(), "web\n");
        assert_eq!(text("resolv.conf").unwrap(), "search a.local local\nnameserver 10.0.0.10\n");
    }

    #[test]
    fn options_of_another_type_are_refused() {
        let error = PodSandbox::read("p1", "runtime.v1.Other", &[], "", "").unwrap_err();
        assert!(error.to_string().contains("expected is runtime.v1.PodSandboxConfig"), "{error}");
    }

    #[test]
    fn users_are_the_pods_own_or_the_hosts_and_nothing_between() {
        let spec = |mode: NamespaceMode, mappings: usize| {
            let mut config = config();
            let options =
                config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
            let user = options.userns_options.mut_or_insert_default();
            user.mode = mode.into();
            let mapping = IDMapping { host_id: 70_000, container_id: 0, length: 65_536, ..IDMapping::default() };
            (user.uids, user.gids) = (vec![mapping.clone(); mappings], vec![mapping; mappings]);
            PodSandbox::read("p1", CONFIG_TYPE, &config.write_to_bytes().unwrap(), "", "/b")
        };
        assert_eq!(spec(NamespaceMode::POD, 1).unwrap().root, (70_000, 70_000));
        assert_eq!(spec(NamespaceMode::NODE, 0).unwrap().root, (0, 0));
        for (mode, mappings) in
            [(NamespaceMode::POD, 0), (NamespaceMode::NODE, 1), (NamespaceMode::CONTAINER, 1), (NamespaceMode::TARGET, 0)]
        {
            let error = spec(mode, mappings).unwrap_err().to_string();
            assert!(error.contains("allowed are POD with both and NODE with none"), "{error}");
        }
    }

    #[test]
    fn both_forms_of_a_cgroup_are_built() {
        assert_eq!(cgroups_path("/kubepods.slice/kubepods-pod1.slice", "p"), "kubepods-pod1.slice:cri-containerd:p");
        assert_eq!((cgroups_path("/kubepods/pod1/", "p"), cgroups_path("", "p")), ("/kubepods/pod1/p".into(), String::new()));
    }
}
