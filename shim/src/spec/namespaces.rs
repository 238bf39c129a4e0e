//! The namespaces that a container asks for, and those of the guest that stand for them.

use caisson_protocol::config::HostNamespaces;
use serde_json::{Value, json};

use super::{Kind, Siblings, Spec};
use crate::errors::{self, Error};

impl Spec {
    fn lacks_namespace(&self, kind: &str) -> bool {
        !self.0["linux"]["namespaces"].as_array().into_iter().flatten().any(|namespace| namespace["type"] == kind)
    }

    fn sees_cgroups_read_only(&self) -> bool {
        let mut mounts = self.0["mounts"].as_array().into_iter().flatten().filter(|mount| mount["type"] == "cgroup");
        mounts.any(|mount| mount["options"].as_array().into_iter().flatten().any(|option| option == "ro"))
    }

    /// Refuses what of the host a machine of its own cannot have.
    ///
    /// # Errors
    /// Which namespaces it asks for, unless it is to have the pod's own instead.
    pub fn refuse_host_namespaces(&self, container: &str, host: HostNamespaces) -> errors::Result<()> {
        for (kind, what) in [("network", "network"), ("pid", "process ids"), ("ipc", "IPC")] {
            if self.lacks_namespace(kind) && host == HostNamespaces::Refuse {
                return Err(Error::Invalid(format!(
                    "container {container}: it asks for the host's {what}, which a virtual machine cannot share; set pod.host_namespaces = \"pod\" to give it the pod's own"
                )));
            }
        }
        Ok(())
    }

    /// The namespaces of the guest that stand for those of the specification.
    pub(super) fn guest_namespaces(&self, container: &str, host: HostNamespaces, siblings: &impl Siblings) -> errors::Result<Vec<Value>> {
        self.refuse_host_namespaces(container, host)?;
        let asked = self.0["linux"]["namespaces"].as_array().map(Vec::as_slice).unwrap_or_default();
        let mut namespaces = Vec::new();
        for namespace in asked {
            let kind = namespace["type"].as_str().unwrap_or_default();
            let path = namespace["path"].as_str().unwrap_or_default();
            if kind == "network" {
                // The pod's network is the machine's.
            } else if path.is_empty() {
                namespaces.push(namespace.clone());
            } else if kind == "user" && !matches!(self.kind(), Kind::Member(_)) && self.has_own_users() {
                // containerd 2 has made one for the pod's network; the guest makes its own, with the same mapping.
                namespaces.push(json!({"type": kind}));
            } else {
                let (pid, file) = process_namespace(path)
                    .and_then(|(pid, file)| Some((siblings.guest_pid(pid)?, file)))
                    .ok_or_else(|| Error::Invalid(format!("container {container}: the {kind} namespace {path} is not one of its pod's")))?;
                namespaces.push(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
            }
        }
        if self.lacks_namespace("pid") {
            // Never the agent's.
            namespaces.push(match siblings.sandbox_pid() {
                Some(pid) => json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")}),
                None => json!({"type": "pid"}),
            });
        }
        if self.lacks_namespace("cgroup") && self.sees_cgroups_read_only() {
            // As on hosts with cgroup v1, where runc shows a container those that are its own.
            namespaces.push(json!({"type": "cgroup"}));
        }
        Ok(namespaces)
    }
}

/// The process and the file of a path `/proc/PID/ns/FILE`.
fn process_namespace(path: &str) -> Option<(u32, &str)> {
    let (pid, file) = path.strip_prefix("/proc/")?.split_once("/ns/")?;
    (!file.contains('/')).then_some((pid.parse().ok()?, file))
}
