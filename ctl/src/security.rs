//! `caisson check --security`: what holds a pod's processes, read from `/proc`, as it is and not as it was meant to be.
//!
//! Each process of a pod has a list of [`Check`]s by its role.
//! A check reads one thing and says whether it is as docs/THREAT-MODEL.md promises.

mod cores;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use caisson_host::{records, rights};
use caisson_protocol::config::Config;
use caisson_protocol::record::PodRecord;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use procfs::process::{FDTarget, LimitValue, MMPermissions, Process, Status};
use serde::Serialize;

use crate::folders::top_of;

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it is meant to be.
    Ok,
    /// As configured, though it could be stricter.
    Weak,
    /// Not as it is meant to be.
    Wrong,
}

/// A verdict, and what was found.
type Found = (Verdict, String);

/// A check: what it looks at, and how.
type Check = (&'static str, fn(&Subject<'_>) -> Result<Found>);

/// What one check of one process came to.
#[derive(Debug, Serialize)]
struct Finding {
    namespace: String,
    pod: String,
    process: String,
    pid: u32,
    check: &'static str,
    verdict: Verdict,
    found: String,
}

/// A process that is looked at.
struct Subject<'h> {
    host: &'h Host,
    config: &'h Config,
    record: &'h PodRecord,
    folder: &'h Path,
    process: Process,
    /// One of each thread.
    threads: Vec<Status>,
}

/// What the pods' processes are told apart from, and from one another.
struct Host {
    namespaces: Namespaces,
    /// How many pods have a process in a namespace, and how many have a user id.
    inhabitants: BTreeMap<u64, u32>,
    users: BTreeMap<u32, u32>,
    /// The monitor of each pod, with the pod and its tenant.
    monitors: Vec<(u32, PodRecord)>,
}

/// Kinds of namespaces with their numbers.
type Namespaces = BTreeMap<OsString, u64>;

const MONITOR: &[Check] = &[
    ("user", user),
    ("capabilities", |subject| capabilities(subject, &[])),
    ("new privileges", new_privileges),
    ("system calls", system_calls),
    ("namespaces", |subject| namespaces(subject, &["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"])),
    ("root folder", empty_root),
    ("cgroup", |subject| cgroup(subject, "machine")),
    ("core dumps", core_dumps),
    ("tracing", tracing),
    ("limits", limits),
    ("environment", environment),
    ("open files", open_files),
    ("guest memory", guest_memory),
    ("cores", cores::look),
    ("executable memory", executable_memory),
];

const FILE_SERVER: &[Check] = &[
    ("user", ids_of_its_own),
    ("capabilities", |subject| capabilities(subject, rights::FILE_SERVER)),
    ("new privileges", new_privileges),
    ("system calls", system_calls),
    ("namespaces", |subject| namespaces(subject, &["mnt", "pid", "net", "ipc", "uts", "cgroup"])),
    ("root folder", share_root),
    ("cgroup", |subject| cgroup(subject, "machine")),
    ("core dumps", core_dumps),
    ("environment", environment),
    ("open files", open_files_of_share),
    ("executable memory", executable_memory),
];

const STAND_IN: &[Check] = &[
    ("user", user),
    ("capabilities", |subject| capabilities(subject, &[])),
    ("new privileges", new_privileges),
    ("system calls", system_calls),
    ("namespaces", |subject| namespaces(subject, &["mnt", "pid", "ipc", "uts", "cgroup"])),
    ("root folder", own_proc),
    ("cgroup", |subject| cgroup(subject, "machine")),
    ("core dumps", core_dumps),
    ("tracing", tracing),
    ("environment", environment),
    ("open files", open_files),
];

/// passt's own doing, but for the first and the last.
const NETWORK: &[Check] = &[
    ("user", user),
    ("capabilities", capabilities_in_use),
    ("new privileges", new_privileges),
    ("system calls", system_calls),
    ("namespaces", |subject| namespaces(subject, &["user", "mnt", "ipc", "uts"])),
    ("root folder", empty_root),
    ("environment", environment),
];

const SHIM: &[Check] = &[
    ("capabilities", |subject| capabilities(subject, rights::SHIM)),
    ("new privileges", new_privileges),
    ("system calls", system_calls),
    ("pod folder", pod_folder),
    ("mounts", mounts),
    ("cgroup", |subject| cgroup(subject, "shim")),
    ("socket", socket),
    ("executable memory", executable_memory),
];

/// Prints what holds each pod's processes; true when all is as it is meant to be.
///
/// # Errors
/// When the pods' records or `/proc` cannot be read.
pub fn print(config: &Config, json: bool) -> Result<bool> {
    let pods = records::all(&config.run_dir).with_context(|| format!("read {}", config.run_dir.display()))?;
    let host = Host::of(&pods)?;
    let findings: Vec<Finding> = pods.iter().flat_map(|pod| of_pod(&host, config, pod)).collect();
    let wrong = findings.iter().filter(|finding| finding.verdict == Verdict::Wrong).count();
    if json {
        for finding in &findings {
            println!("{}", serde_json::to_string(finding)?);
        }
        return Ok(wrong == 0);
    }
    let mut shown = String::new();
    for finding in &findings {
        let process = format!("{}/{} {} {}", finding.namespace, finding.pod, finding.process, finding.pid);
        if process != shown {
            println!("{process}");
            shown = process;
        }
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Weak => "weak",
            Verdict::Wrong => "WRONG",
        };
        println!("  {verdict:<6}{:<18} {}", finding.check, finding.found);
    }
    let (pods, checks) = (pods.len(), findings.len());
    println!("{pods} pods, {checks} checks: {}", if wrong == 0 { "all hold".to_owned() } else { format!("{wrong} do not hold") });
    Ok(wrong == 0)
}

fn of_pod(host: &Host, config: &Config, record: &PodRecord) -> Vec<Finding> {
    let folder = records::pod_dir(&config.run_dir, &record.namespace, &record.pod);
    let mut findings = Vec::new();
    // A process that ended, or ends while we look, is nobody's danger.
    for process in record.processes.iter().filter(|process| records::is_alive(process)) {
        let checks = match process.role.as_str() {
            "vmm" => MONITOR,
            "fs" => FILE_SERVER,
            "shim" => SHIM,
            "network" => NETWORK,
            "stand-in" => STAND_IN,
            _ => continue,
        };
        let Ok((subject, threads)) = look_at(process.pid) else { continue };
        let subject = Subject { host, config, record, folder: &folder, process: subject, threads };
        for (check, look) in checks {
            let (verdict, found) = match look(&subject) {
                Ok(found) => found,
                Err(_) if !records::is_alive(process) => break,
                Err(error) => (Verdict::Wrong, format!("{error:#}")),
            };
            findings.push(Finding {
                namespace: record.namespace.clone(),
                pod: record.pod.clone(),
                process: process.role.clone(),
                pid: process.pid,
                check,
                verdict,
                found,
            });
        }
    }
    findings
}

/// A process, and the status of each of its threads.
fn look_at(pid: u32) -> Result<(Process, Vec<Status>)> {
    let process = Process::new(pid.cast_signed())?;
    // A thread that ends while we look is left out.
    let threads = process.tasks()?.filter_map(|task| task.ok()?.status().ok()).collect();
    Ok((process, threads))
}

impl Host {
    fn of(pods: &[PodRecord]) -> Result<Self> {
        let first = Process::new(1).context("look at process 1")?;
        let namespaces = namespaces_of(&first).context("read the host's namespaces; run as root, on the host itself")?;
        let (mut inhabitants, mut users) = (BTreeMap::new(), BTreeMap::new());
        for pod in pods {
            let alive = pod.processes.iter().filter(|process| records::is_alive(process));
            let jailed = alive.filter(|process| process.role != "shim").filter_map(|process| look_at(process.pid).ok());
            let (mut of_pod, mut users_of_pod) = (BTreeSet::new(), BTreeSet::new());
            for (process, threads) in jailed {
                of_pod.extend(namespaces_of(&process).unwrap_or_default().into_values());
                users_of_pod.extend(threads.first().map(|status| status.ruid));
            }
            of_pod.into_iter().for_each(|namespace| *inhabitants.entry(namespace).or_default() += 1);
            users_of_pod.into_iter().for_each(|user| *users.entry(user).or_default() += 1);
        }
        let monitor = |pod: &PodRecord| pod.processes.iter().find(|process| process.role == "vmm").map(|process| process.pid);
        let monitors = pods.iter().filter_map(|pod| Some((monitor(pod)?, pod.clone()))).collect();
        Ok(Self { namespaces, inhabitants, users, monitors })
    }
}

fn namespaces_of(process: &Process) -> Result<Namespaces> {
    let folder = format!("/proc/{}/ns", process.pid());
    let entries = std::fs::read_dir(&folder).with_context(|| folder.clone())?.flatten();
    let number = |entry: &std::fs::DirEntry| std::fs::metadata(entry.path()).map(|meta| meta.ino());
    // One that is made for children has no number before there are any.
    Ok(entries.filter_map(|entry| Some((entry.file_name(), number(&entry).ok()?))).collect())
}

fn verdict(holds: bool) -> Verdict {
    if holds { Verdict::Ok } else { Verdict::Wrong }
}

/// The same of all threads, by how many it holds.
fn of_threads(subject: &Subject<'_>, what: &str, holds: impl Fn(&Status) -> bool) -> Found {
    let (all, holding) = (subject.threads.len(), subject.threads.iter().filter(|thread| holds(thread)).count());
    (verdict(all > 0 && holding == all), format!("{what} for {holding} of {all} threads"))
}

fn user(subject: &Subject<'_>) -> Result<Found> {
    let reserved = subject.record.uid.context("the pod's record names no user id")?;
    let is_it = |thread: &Status| {
        let ids = [thread.ruid, thread.euid, thread.suid, thread.fuid, thread.rgid, thread.egid, thread.sgid, thread.fgid];
        ids.iter().all(|id| *id == reserved && *id != 0) && thread.groups.is_empty()
    };
    let alone = subject.host.users.get(&reserved).copied() == Some(1);
    let (verdict, found) = of_threads(subject, &format!("user and group {reserved}, which no other pod has,"), is_it);
    Ok(if alone { (verdict, found) } else { (Verdict::Wrong, format!("user {reserved} is that of another pod, too")) })
}

fn ids_of_its_own(subject: &Subject<'_>) -> Result<Found> {
    let map = std::fs::read_to_string(format!("/proc/{}/uid_map", subject.process.pid())).context("read its user ids")?;
    let fields: Vec<u64> = map.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    Ok(match fields[..] {
        [0, 0, ..] => (Verdict::Weak, "root of the host, in the share alone; set fs.id_base for users of its own".into()),
        [0, first, count] => (verdict(first >= count), format!("ids {first} to {} of the host", first + count - 1)),
        _ => (Verdict::Wrong, format!("ids {map}")),
    })
}

fn capabilities(subject: &Subject<'_>, allowed: &[caps::Capability]) -> Result<Found> {
    let sets = |thread: &Status| thread.capprm | thread.capeff | thread.capinh | thread.capbnd.unwrap_or(0) | thread.capamb.unwrap_or(0);
    let all = subject.threads.iter().fold(0, |all, thread| all | sets(thread));
    let beyond = all & !rights::mask(allowed);
    Ok(match (beyond, all.count_ones()) {
        (0, 0) => (Verdict::Ok, "none".into()),
        (0, count) => (Verdict::Ok, format!("{count}, none but those that it needs")),
        (beyond, _) => (Verdict::Wrong, format!("{beyond:#x} beyond those that it needs")),
    })
}

/// What it could take up by starting a program, it cannot without new privileges.
fn capabilities_in_use(subject: &Subject<'_>) -> Result<Found> {
    let none = |thread: &Status| thread.capprm | thread.capeff | thread.capinh | thread.capamb.unwrap_or(0) == 0;
    Ok(of_threads(subject, "none in use", none))
}

fn new_privileges(subject: &Subject<'_>) -> Result<Found> {
    Ok(of_threads(subject, "none to be had", |thread| thread.nonewprivs == Some(1)))
}

fn system_calls(subject: &Subject<'_>) -> Result<Found> {
    Ok(of_threads(subject, "filtered", |thread| thread.seccomp == Some(2)))
}

fn namespaces(subject: &Subject<'_>, own: &[&str]) -> Result<Found> {
    let its = namespaces_of(&subject.process)?;
    let shared = own.iter().filter(|kind| {
        let namespace = its.get(std::ffi::OsStr::new(kind));
        let alone = namespace.is_some_and(|namespace| subject.host.inhabitants.get(namespace).copied() == Some(1));
        !alone || namespace == subject.host.namespaces.get(std::ffi::OsStr::new(kind))
    });
    let shared: Vec<&str> = shared.copied().collect();
    Ok(if shared.is_empty() {
        (Verdict::Ok, format!("its own: {}", own.join(" ")))
    } else {
        (Verdict::Wrong, format!("not its own: {}", shared.join(" ")))
    })
}

fn empty_root(subject: &Subject<'_>) -> Result<Found> {
    let root = format!("/proc/{}/root", subject.process.pid());
    let entries = std::fs::read_dir(&root).context("read its root folder")?.count();
    let mounts: Vec<_> = subject.process.mountinfo()?.into_iter().collect();
    let read_only = mounts.iter().all(|mount| mount.mount_options.contains_key("ro"));
    let holds = entries == 0 && mounts.len() == 1 && read_only;
    let how = if read_only { "read-only" } else { "writable" };
    Ok((verdict(holds), format!("{how}, with {entries} files; {} mounts", mounts.len())))
}

/// The share alone: a file system of the pod's own, read-only, in which nothing gives rights on the host.
fn share_root(subject: &Subject<'_>) -> Result<Found> {
    let mounts: Vec<_> = subject.process.mountinfo()?.into_iter().collect();
    let root = mounts.iter().rev().find(|mount| mount.mount_point == Path::new("/")).context("it has no root")?;
    let holds = root.fs_type == "tmpfs" && root.mount_options.contains_key("ro");
    let what = format!("{} on {}, {} mounts", root.fs_type, if holds { "the share, read-only" } else { "another root" }, mounts.len());
    Ok((verdict(holds), what))
}

/// A root that is empty but for a /proc of its own.
fn own_proc(subject: &Subject<'_>) -> Result<Found> {
    let root = format!("/proc/{}/root", subject.process.pid());
    let names: BTreeSet<_> = std::fs::read_dir(&root).context("read its root folder")?.flatten().map(|entry| entry.file_name()).collect();
    let mounts: Vec<_> = subject.process.mountinfo()?.into_iter().collect();
    let read_only = mounts.iter().all(|mount| mount.mount_options.contains_key("ro"));
    let own = std::fs::metadata(format!("{root}/proc")).and_then(|proc| Ok(proc.dev() != std::fs::metadata("/proc")?.dev()))?;
    let holds = names == BTreeSet::from([OsString::from("proc")]) && mounts.len() == 2 && read_only && own;
    Ok((verdict(holds), format!("{} files, {} mounts{}", names.len(), mounts.len(), if own { "" } else { ", the host's /proc" })))
}

/// Mounts of a pod are in its own namespace; in the host's, other programs would take them for the host's file systems.
fn mounts(subject: &Subject<'_>) -> Result<Found> {
    let mounts = Process::new(1)?.mountinfo().context("read the host's mounts")?;
    let count = mounts.into_iter().filter(|mount| mount.mount_point.starts_with(subject.folder)).count();
    Ok((verdict(count == 0), if count == 0 { "none in the host's namespace".into() } else { format!("{count} in the host's namespace") }))
}

/// What the pod costs is the pod's to pay. A pod that has ended has left its cgroup, and rootless ones may have none.
fn cgroup(subject: &Subject<'_>, leaf: &str) -> Result<Found> {
    let Some(wanted) = &subject.record.cgroup else { return Ok((Verdict::Weak, "the pod has none of its own".into())) };
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", subject.process.pid())).context("read its cgroups")?;
    // proc(5): HIERARCHY:CONTROLLERS:PATH
    let paths: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).collect();
    let wanted = format!("{}/{leaf}", wanted.trim_end_matches('/'));
    let ended = leaf == "shim" && paths.contains(&"/caisson");
    let holds = paths.contains(&wanted.as_str()) || ended;
    if leaf == "machine" && std::fs::read_to_string(format!("/sys/fs/cgroup{wanted}/pids.max")).is_ok_and(|most| most.trim() == "max") {
        return Ok((Verdict::Wrong, format!("{wanted}, in which there may be any number of threads (pids.max)")));
    }
    Ok((verdict(holds), if holds { (if ended { "/caisson" } else { &wanted }).to_owned() } else { format!("not in {wanted}") }))
}

fn core_dumps(subject: &Subject<'_>) -> Result<Found> {
    let limit = subject.process.limits()?.max_core_file_size;
    let none = matches!((limit.soft_limit, limit.hard_limit), (LimitValue::Value(0), LimitValue::Value(0)));
    Ok((verdict(none), if none { "none".into() } else { "allowed".into() }))
}

/// What belongs to a process that may not be traced is the host's root's (proc(5)).
fn tracing(subject: &Subject<'_>) -> Result<Found> {
    let path = format!("/proc/{}/status", subject.process.pid());
    let owner = std::fs::metadata(&path).with_context(|| path.clone())?.uid();
    Ok((verdict(owner == 0), format!("by user {owner} alone")))
}

fn limits(subject: &Subject<'_>) -> Result<Found> {
    let limits = subject.process.limits()?;
    let number = |limit: &LimitValue| match limit {
        LimitValue::Value(number) => number.to_string(),
        LimitValue::Unlimited => "any number of".into(),
    };
    let bounded = [&limits.max_processes, &limits.max_open_files].iter().all(|limit| matches!(limit.hard_limit, LimitValue::Value(_)));
    let locked = limits.max_locked_memory.hard_limit;
    let holds = bounded && matches!(locked, LimitValue::Value(0));
    let [threads, files, locked] = [limits.max_processes.hard_limit, limits.max_open_files.hard_limit, locked].map(|limit| number(&limit));
    Ok((verdict(holds), format!("{threads} threads, {files} files, {locked} bytes of locked memory")))
}

fn environment(subject: &Subject<'_>) -> Result<Found> {
    let variables = subject.process.environ()?.len();
    Ok((verdict(variables == 0), format!("{variables} variables")))
}

/// Files that the monitor was given, by what they are; a folder would lead to others.
fn open_files(subject: &Subject<'_>) -> Result<Found> {
    let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
    let mut folders = 0;
    for file in subject.process.fd()?.flatten() {
        let kind = match file.target {
            FDTarget::Path(path) => {
                // A name that is not ours to open says nothing of it.
                folders +=
                    u32::from(std::fs::metadata(format!("/proc/{}/fd/{}", subject.process.pid(), file.fd)).is_ok_and(|meta| meta.is_dir()));
                path.display().to_string()
            }
            FDTarget::Socket(_) | FDTarget::Net(_) => "socket".into(),
            FDTarget::Pipe(_) => "pipe".into(),
            FDTarget::AnonInode(name) => name,
            FDTarget::MemFD(name) => name.trim_start_matches("memfd:").to_owned(),
            FDTarget::Other(name, _) | FDTarget::Unknown(name, _) => name,
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let list: Vec<String> = kinds.into_iter().map(|(kind, count)| if count == 1 { kind } else { format!("{count} {kind}") }).collect();
    Ok((verdict(folders == 0), list.join(", ")))
}

/// Folders that the file server has open lead to the root of the share, or to that of a mount which was taken out of it,
/// and not to the host's.
fn open_files_of_share(subject: &Subject<'_>) -> Result<Found> {
    let pid = subject.process.pid();
    let identity = |path: &str| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).with_context(|| format!("look at {path}"));
    let of_host = [identity("/proc/1/root")?, identity("/proc")?];
    let hosts_proc = of_host[1].0;
    let (mut mounts, mut folders, mut outside) = (BTreeSet::new(), 0, BTreeSet::new());
    for file in subject.process.fd()?.flatten() {
        let path = format!("/proc/{pid}/fd/{}", file.fd);
        if !std::fs::metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            continue;
        }
        folders += 1;
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", file.fd)).unwrap_or_default();
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).unwrap_or_default().trim().to_owned();
        // One folder of each mount is enough to see where it leads.
        if mounts.insert(mount)
            && let Some(top) = top_of(&path)?
            && (of_host.contains(&top) || top.0 == hosts_proc)
        {
            outside.insert(path);
        }
    }
    let found = if outside.is_empty() {
        format!("{folders} folders, all in the share")
    } else {
        format!("folders from which the host's are reached: {}", outside.into_iter().collect::<Vec<_>>().join(", "))
    };
    Ok((verdict(found.ends_with("in the share")), found))
}

/// The machine's memory can neither shrink under who has it mapped nor grow.
fn guest_memory(subject: &Subject<'_>) -> Result<Found> {
    let is_memory = |target: &FDTarget| matches!(target, FDTarget::MemFD(name) if name.contains("guest-memory"));
    let mapped = subject.process.maps()?.into_iter().find_map(|map| match map.pathname {
        procfs::process::MMapPath::Path(path) if path.to_string_lossy().contains("memfd:guest-memory") => Some(map.address),
        _ => None,
    });
    let open = subject.process.fd()?.flatten().find(|file| is_memory(&file.target)).map(|file| format!("fd/{}", file.fd));
    let mapped = mapped.map(|(from, to)| format!("map_files/{from:x}-{to:x}"));
    let path = open.or(mapped).context("it has no memory of a guest")?;
    let file = std::fs::File::open(format!("/proc/{}/{path}", subject.process.pid())).context("open the guest's memory")?;
    let seals = SealFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GET_SEALS).context("ask for the seals of the guest's memory")?);
    let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    Ok((verdict(seals.contains(wanted)), if seals.contains(wanted) { "sealed".into() } else { format!("seals {:#x}", seals.bits()) }))
}

fn executable_memory(subject: &Subject<'_>) -> Result<Found> {
    let both = MMPermissions::WRITE | MMPermissions::EXECUTE;
    let count = subject.process.maps()?.into_iter().filter(|map| map.perms.contains(both)).count();
    Ok((verdict(count == 0), if count == 0 { "none that can be written".into() } else { format!("{count} mappings that can be written") }))
}

fn pod_folder(subject: &Subject<'_>) -> Result<Found> {
    let meta = std::fs::metadata(subject.folder).with_context(|| format!("look at {}", subject.folder.display()))?;
    let (owner, mode) = (meta.uid(), meta.mode() & 0o777);
    // With pod.owners it is its group's to look into.
    Ok((
        verdict(owner == 0 && (mode == 0o700 || mode == 0o750)),
        format!("{}: user {owner}, group {}, mode {mode:o}", subject.folder.display(), meta.gid()),
    ))
}

fn socket(subject: &Subject<'_>) -> Result<Found> {
    let path = subject.record.socket.trim_start_matches("unix://");
    let meta = std::fs::metadata(path).with_context(|| format!("look at {path}"))?;
    let (owner, mode) = (meta.uid(), meta.mode() & 0o777);
    // To connect is to write (unix(7)).
    Ok((verdict(owner == 0 && mode & 0o022 == 0), format!("{path}: user {owner}, mode {mode:o}")))
}
