//! Idmapped mounts (mount_setattr(2), Linux 5.12): files of a pod with a user namespace of its own
//! carry the owners that they have inside of it, on disk as in the pod.
//!
//! The kernel takes a mapping as a user namespace, and makes one only for a process. So this program
//! starts itself once more, as a process that makes a namespace and waits.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use caisson_protocol::fs::HOST_IDS;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use crate::pod::lock;

/// Ranges that a mapping may have (user_namespaces(7)).
const MAX_RANGES: usize = 340;
/// The argument by which the waiting process is started.
pub const HOLDER: &str = "-hold-user-namespace";

/// A mapping of users and groups, each range as (id on disk, id that is seen, size).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    users: Vec<(u32, u32, u32)>,
    groups: Vec<(u32, u32, u32)>,
}

impl IdMap {
    /// The mapping that has the first [`HOST_IDS`] ids on disk seen as those from `base` on.
    pub fn shifted(base: u32) -> Self {
        let ranges = vec![(0, base, HOST_IDS)];
        Self { users: ranges.clone(), groups: ranges }
    }

    /// The mapping that an object of an OCI specification asks for in `uidMappings` and
    /// `gidMappings`; `None` when in neither.
    ///
    /// # Errors
    /// When only one of the two is there, or a range is not three numbers.
    pub fn of(object: &Value) -> Result<Option<Self>> {
        let number = |range: &Value, key: &str| u32::try_from(range[key].as_u64()?).ok();
        let list = |key: &str| -> Result<Vec<_>> {
            let ranges = object[key].as_array().into_iter().flatten();
            let ranges = ranges.map(|range| Some((number(range, "containerID")?, number(range, "hostID")?, number(range, "size")?)));
            ranges.collect::<Option<_>>().with_context(|| format!("{key}: a range is not three numbers"))
        };
        Self { users: list("uidMappings")?, groups: list("gidMappings")? }.complete()
    }

    /// What a user and a group on disk are seen as, where they are among those that are mapped.
    pub fn seen(&self, user: u32, group: u32) -> (Option<u32>, Option<u32>) {
        let seen = |ranges: &[(u32, u32, u32)], id: u32| {
            ranges.iter().find_map(|(disk, seen, size)| id.checked_sub(*disk).filter(|offset| offset < size).map(|offset| seen + offset))
        };
        (seen(&self.users, user), seen(&self.groups, group))
    }

    /// Whether something on disk is seen as this user.
    pub fn shows(&self, user: u32) -> bool {
        self.users.iter().any(|(_, seen, size)| user.checked_sub(*seen).is_some_and(|offset| offset < *size))
    }

    /// Neither half of a mapping is of use without the other.
    fn complete(self) -> Result<Option<Self>> {
        ensure!(self.users.is_empty() == self.groups.is_empty(), "a mapping of owners needs users and groups");
        Ok(Some(self).filter(|map| !map.users.is_empty()))
    }

    /// Takes the options by which containerd asks for a mapped root file system out of those of a
    /// mount (`uidmap=0:65536:65536`).
    ///
    /// # Errors
    /// When an option is not understood.
    pub fn take_from(options: &mut Vec<&str>) -> Result<Option<Self>> {
        let mut take = |name: &str| -> Result<Vec<(u32, u32, u32)>> {
            let Some(place) = options.iter().position(|option| option.starts_with(name)) else { return Ok(Vec::new()) };
            let option = options.remove(place);
            let range = |text: &str| {
                let mut numbers = text.split(':').map(|number| number.parse().ok());
                let range = (numbers.next()??, numbers.next()??, numbers.next()??);
                numbers.next().is_none().then_some(range)
            };
            let ranges: Option<Vec<_>> = option[name.len()..].split(',').map(range).collect();
            ranges.with_context(|| format!("mount option {option:?}: expected {name}ID:ID:SIZE"))
        };
        Self { users: take("uidmap=")?, groups: take("gidmap=")? }.complete()
    }

    /// A user namespace with this mapping. One is made for each mapping that the pod has, and kept: all
    /// layers and volumes of its containers take the same.
    ///
    /// # Errors
    /// When the kernel refuses the mapping, or has no user namespaces.
    pub fn namespace(&self) -> Result<Arc<OwnedFd>> {
        static MADE: Mutex<Vec<(IdMap, Arc<OwnedFd>)>> = Mutex::new(Vec::new());
        let mut made = lock(&MADE);
        if let Some((_, namespace)) = made.iter().find(|(map, _)| map == self) {
            return Ok(Arc::clone(namespace));
        }
        let namespace = Arc::new(self.make()?);
        made.push((self.clone(), Arc::clone(&namespace)));
        Ok(namespace)
    }

    fn make(&self) -> Result<OwnedFd> {
        for ranges in [&self.users, &self.groups] {
            ensure!((1..=MAX_RANGES).contains(&ranges.len()), "a mapping has {} ranges; allowed are 1 to {MAX_RANGES}", ranges.len());
        }
        // Not by its path: another version may stand there by now.
        let mut holder = Command::new("/proc/self/exe")
            .arg(HOLDER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start a process for a user namespace")?;
        let namespace = self.fill(&mut holder);
        // It ends with its standard input.
        drop(holder.stdin.take());
        // How it ended says nothing more.
        let _ = holder.wait();
        namespace
    }

    fn fill(&self, holder: &mut std::process::Child) -> Result<OwnedFd> {
        let mut ready = [0];
        let stdout = holder.stdout.as_mut().context("hear from the process of a user namespace")?;
        // It ends without a word when the kernel refuses.
        stdout.read_exact(&mut ready).context("make a user namespace: the kernel refused; see user.max_user_namespaces")?;
        let pid = holder.id();
        for (file, ranges) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            let text: String = ranges.iter().map(|(disk, seen, size)| format!("{disk} {seen} {size}\n")).collect();
            std::fs::write(format!("/proc/{pid}/{file}"), &text).with_context(|| format!("write {file} {:?}", text.trim()))?;
        }
        Ok(std::fs::File::open(format!("/proc/{pid}/ns/user")).context("open the user namespace")?.into())
    }
}

/// The waiting process: ends with its standard input.
///
/// # Errors
/// When the kernel makes no user namespace.
pub fn hold() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER).context("make a user namespace")?;
    let mut stdout = std::io::stdout();
    stdout.write_all(b".").and_then(|()| stdout.flush()).context("say so")?;
    std::io::stdin().read_to_end(&mut Vec::new()).context("wait").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_asking_are_understood() {
        let ranges = serde_json::json!([{"containerID": 0, "hostID": 65536, "size": 10}]);
        let map = IdMap::of(&serde_json::json!({"uidMappings": ranges, "gidMappings": ranges})).unwrap().unwrap();
        let mut options = vec!["lowerdir=/a", "uidmap=0:65536:10", "gidmap=0:65536:10"];
        assert_eq!(IdMap::take_from(&mut options).unwrap(), Some(map));
        assert_eq!(options, ["lowerdir=/a"]);
        assert_eq!((IdMap::take_from(&mut options).unwrap(), IdMap::of(&serde_json::json!({})).unwrap()), (None, None));
        assert!(IdMap::of(&serde_json::json!({"uidMappings": ranges})).is_err());
    }

    #[test]
    fn an_option_that_is_no_mapping_is_named() {
        let error = IdMap::take_from(&mut vec!["uidmap=0:x:1"]).unwrap_err();
        assert!(error.to_string().contains("\"uidmap=0:x:1\""), "{error}");
    }
}
