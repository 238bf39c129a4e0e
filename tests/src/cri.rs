//! Pods through containerd's CRI, as kubelet makes them.

use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatsRequest, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec, Int64Value, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, SecurityProfile,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::Test;
use crate::ctr::{IMAGE, id, shell};

pub const TESTS: &[Test] = &[
    ("containers_of_a_pod_share_name_ipc_and_memory", containers_of_a_pod_share_name_ipc_and_memory),
    ("containers_come_and_go_while_their_pod_lives", containers_come_and_go_while_their_pod_lives),
    ("a_pod_is_reached_at_its_address", a_pod_is_reached_at_its_address),
    ("process_namespaces_are_shared_as_asked", process_namespaces_are_shared_as_asked),
    ("an_exec_beyond_its_time_is_killed", an_exec_beyond_its_time_is_killed),
    ("a_security_context_is_enforced", a_security_context_is_enforced),
    ("seccomp_holds_in_the_container_and_its_execs", seccomp_holds_in_the_container_and_its_execs),
    ("container_limits_are_set_changed_and_reported", container_limits_are_set_changed_and_reported),
    ("a_pods_limits_size_its_machine", a_pods_limits_size_its_machine),
    ("the_hosts_namespaces_are_refused_in_one_sentence", the_hosts_namespaces_are_refused_in_one_sentence),
    ("a_log_has_the_format_of_the_cri", a_log_has_the_format_of_the_cri),
];

pub const SOCKET: &str = "/run/containerd/containerd.sock";
const HANDLER: &str = "caisson";
/// Longer than any call takes under emulation.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// A client of containerd's CRI.
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Cri {
    /// Connects to the containerd behind a socket.
    pub fn connect(socket: &'static str) -> Self {
        let runtime = Runtime::new().unwrap();
        let endpoint = Endpoint::from_static("http://[::]");
        let connect = endpoint
            .connect_with_connector(tower::service_fn(move |_: Uri| async move { UnixStream::connect(socket).await.map(TokioIo::new) }));
        let channel = runtime.block_on(connect).unwrap();
        Self { client: RuntimeServiceClient::new(channel), runtime }
    }

    /// Makes a call and waits for its answer.
    pub fn call<'a, T, F: Future<Output = Answer<T>>>(
        &'a mut self,
        call: impl FnOnce(&'a mut RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T, Status> {
        let Self { runtime, client } = self;
        let answer = runtime.block_on(async { tokio::time::timeout(CALL_LIMIT, call(client)).await });
        let late = |_| Err(Status::deadline_exceeded(format!("containerd did not answer within {CALL_LIMIT:?}")));
        answer.unwrap_or_else(late).map(Response::into_inner)
    }
}

/// A pod, removed when the test ends however it ends.
pub struct Pod {
    pub cri: Cri,
    pub config: PodSandboxConfig,
    pub id: String,
}

impl Pod {
    pub fn start(change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        Self::try_start(change).unwrap()
    }

    pub fn try_start(change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Self, Status> {
        Self::start_with(SOCKET, HANDLER, change)
    }

    /// Starts a pod with a handler of the containerd behind a socket.
    pub fn start_with(socket: &'static str, handler: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Self, Status> {
        let mut cri = Cri::connect(socket);
        let name = id("pod");
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: name.clone(), uid: name.clone(), namespace: "default".into(), attempt: 0 }),
            hostname: "the-pod".into(),
            log_directory: format!("/tmp/{name}"),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() }),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        change(&mut config);
        std::fs::create_dir_all(&config.log_directory).unwrap();
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = cri.call(|client| client.run_pod_sandbox(request))?.pod_sandbox_id;
        Ok(Self { cri, config, id })
    }

    /// Creates and starts a container that runs a script; returns its id.
    pub fn run(&mut self, name: &str, script: &str, change: impl FnOnce(&mut ContainerConfig)) -> String {
        let container = self.create(name, script, change).unwrap();
        self.try_run(&container).unwrap();
        container
    }

    /// Starts a container that was created.
    pub fn try_run(&mut self, container: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: container.into() };
        self.cri.call(|client| client.start_container(request)).map(drop)
    }

    pub fn create(&mut self, name: &str, script: &str, change: impl FnOnce(&mut ContainerConfig)) -> Result<String, Status> {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..ImageSpec::default() }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: self
                        .config
                        .linux
                        .as_ref()
                        .and_then(|linux| linux.security_context.as_ref()?.namespace_options.clone()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        change(&mut config);
        let request =
            CreateContainerRequest { pod_sandbox_id: self.id.clone(), config: Some(config), sandbox_config: Some(self.config.clone()) };
        Ok(self.cri.call(|client| client.create_container(request))?.container_id)
    }

    pub fn exec(&mut self, container: &str, script: &str) -> ExecSyncResponse {
        self.exec_within(container, script, 60).unwrap()
    }

    pub fn exec_within(&mut self, container: &str, script: &str, seconds: i64) -> Result<ExecSyncResponse, Status> {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = ExecSyncRequest { container_id: container.into(), cmd, timeout: seconds };
        self.cri.call(|client| client.exec_sync(request))
    }

    /// Standard output of an exec that must succeed.
    pub fn output(&mut self, container: &str, script: &str) -> String {
        let answer = self.exec(container, script);
        assert_eq!(answer.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8_lossy(&answer.stdout).trim().to_owned()
    }

    pub fn status(&mut self, container: &str) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: container.into(), verbose: false };
        self.cri.call(|client| client.container_status(request)).unwrap().status.unwrap()
    }

    pub fn wait_for_exit(&mut self, container: &str) -> i32 {
        let start = Instant::now();
        loop {
            let status = self.status(container);
            if status.state() == ContainerState::ContainerExited {
                return status.exit_code;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{container} still runs");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub fn remove(&mut self, container: &str) {
        let stop = StopContainerRequest { container_id: container.into(), timeout: 0 };
        self.cri.call(|client| client.stop_container(stop)).unwrap();
        let remove = RemoveContainerRequest { container_id: container.into() };
        self.cri.call(|client| client.remove_container(remove)).unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let stop = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        let stopped = self.cri.call(|client| client.stop_pod_sandbox(stop));
        let remove = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        let removed = self.cri.call(|client| client.remove_pod_sandbox(remove));
        if !std::thread::panicking() {
            stopped.unwrap();
            removed.unwrap();
        }
    }
}

/// The security context of a container's configuration.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

pub const SLEEP: &str = "trap 'exit 0' TERM; sleep 1000 & wait";

fn containers_of_a_pod_share_name_ipc_and_memory() {
    let mut pod = Pod::start(|_| ());
    let (one, two) = (pod.run("one", SLEEP, |_| ()), pod.run("two", SLEEP, |_| ()));
    assert_eq!(pod.output(&one, "hostname; cat /etc/hostname"), "the-pod\nthe-pod");
    assert_eq!(pod.output(&two, "hostname"), "the-pod");
    pod.output(&one, "echo shared > /dev/shm/file");
    assert_eq!(pod.output(&two, "cat /dev/shm/file; df -k /dev/shm | tail -n 1 | awk '{print $2}'"), "shared\n65536");
    for namespace in ["ipc", "uts", "net"] {
        let link = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(pod.output(&one, &link), pod.output(&two, &link), "{namespace}");
    }
    let mounts = "readlink /proc/self/ns/mnt";
    assert_ne!(pod.output(&one, mounts), pod.output(&two, mounts));
}

fn containers_come_and_go_while_their_pod_lives() {
    let mut pod = Pod::start(|_| ());
    let first = pod.run("first", "exit 7", |_| ());
    assert_eq!(pod.wait_for_exit(&first), 7);
    pod.remove(&first);
    // None is left, and the pod lives.
    let second = pod.run("second", SLEEP, |_| ());
    assert_eq!(pod.output(&second, "echo here"), "here");
    pod.remove(&second);
    let third = pod.run("second", "exit 8", |config| config.metadata.as_mut().unwrap().attempt = 1);
    assert_eq!(pod.wait_for_exit(&third), 8);
    let error = pod.exec_within(&third, "true", 10).unwrap_err();
    assert!(error.message().contains("EXITED"), "{error:?}");
}

fn a_pod_is_reached_at_its_address() {
    let mut pod = Pod::start(|_| ());
    let server = pod.run("server", "while :; do echo from the pod | nc -l -p 80; done", |_| ());
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    let status = pod.cri.call(|client| client.pod_sandbox_status(request)).unwrap().status.unwrap();
    let address = status.network.unwrap().ip;
    assert!(pod.output(&server, "ip addr show dev eth0").contains(&address), "{address}");
    shell(&format!("ping -c 2 {address}"));
    let start = Instant::now();
    while shell(&format!("socat -u TCP:{address}:80 - || true")) != "from the pod" {
        assert!(start.elapsed() < Duration::from_secs(20), "the pod's server does not answer at {address}");
    }
    // Another container of the pod finds it at the loopback address.
    let client = pod.run("client", SLEEP, |_| ());
    let start = Instant::now();
    while pod.exec(&client, "nc 127.0.0.1 80").stdout != b"from the pod\n" {
        assert!(start.elapsed() < Duration::from_secs(20), "the pod's server does not answer at 127.0.0.1");
    }
}

fn process_namespaces_are_shared_as_asked() {
    let shared = NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() };
    let mut pod = Pod::start(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(shared.clone());
    });
    let one = pod.run("one", SLEEP, |_| ());
    let two = pod.run("two", SLEEP, |_| ());
    let seen = pod.output(&two, "ps -o pid,args");
    assert!(seen.contains("1 ") && seen.matches("sleep 1000").count() >= 2, "{seen}");
    assert!(!seen.contains("caisson-agent") && !seen.contains("/init"), "the guest's own processes are seen: {seen}");
    // An orphan of any container is collected by the sandbox's process.
    pod.output(&one, "(sleep 0.1 &) ; sleep 1");
    assert!(!pod.output(&one, "ps -o stat,args").lines().any(|line| line.starts_with('Z')));
    // A container of its own namespace, and one that joins that (a debug container).
    let own = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
    let apart = pod.run("apart", SLEEP, |config| security(config).namespace_options = Some(own));
    assert!(pod.output(&apart, "ps -o pid,args").matches("sleep 1000").count() <= 2);
    let target = NamespaceOption { pid: NamespaceMode::Target.into(), target_id: apart.clone(), ..NamespaceOption::default() };
    let debug = pod.run("debug", SLEEP, |config| security(config).namespace_options = Some(target));
    let link = "readlink /proc/self/ns/pid";
    assert_eq!(pod.output(&debug, link), pod.output(&apart, link));
    assert_ne!(pod.output(&debug, link), pod.output(&one, link));
}

fn an_exec_beyond_its_time_is_killed() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("slow", SLEEP, |_| ());
    let start = Instant::now();
    let error = pod.exec_within(&container, "sleep 555", 2).unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(pod.output(&container, "ps -o args | grep -c '[s]leep 555' || true"), "0");
    let missing = ExecSyncRequest { container_id: container.clone(), cmd: vec!["/no/such/program".into()], timeout: 10 };
    let answer = pod.cri.call(|client| client.exec_sync(missing));
    assert!(answer.as_ref().is_err_and(|error| error.message().contains("/no/such/program")), "{answer:?}");
}

fn a_security_context_is_enforced() {
    // What allows a privileged container beside the others.
    let mut pod = Pod::start(|config| config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true);
    let container = pod.run("bound", SLEEP, |config| {
        let context = security(config);
        context.run_as_user = Some(Int64Value { value: 1234 });
        context.run_as_group = Some(Int64Value { value: 2345 });
        context.supplemental_groups = vec![3456];
        context.readonly_rootfs = true;
        context.no_new_privs = true;
        context.capabilities =
            Some(Capability { add_capabilities: vec!["NET_ADMIN".into()], drop_capabilities: vec!["ALL".into()], ..Capability::default() });
        context.masked_paths = vec!["/proc/kcore".into(), "/proc/interrupts".into(), "/sys/firmware".into()];
        context.readonly_paths = vec!["/proc/sys".into()];
    });
    let status = pod.output(&container, "id -u; id -g; id -G; grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status");
    let words: Vec<&str> = status.split_whitespace().collect();
    assert_eq!(&words[..4], ["1234", "2345", "2345", "3456"], "{status}");
    assert!(status.contains("CapBnd:\t0000000000001000") && status.contains("CapEff:\t0000000000000000"), "{status}");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert_ne!(pod.exec(&container, "touch /x").exit_code, 0);
    assert_eq!(pod.output(&container, "wc -c < /proc/interrupts"), "0");
    assert_ne!(pod.exec(&container, "echo 1 > /proc/sys/kernel/pid_max").exit_code, 0);
    let root = pod.run("root", SLEEP, |config| security(config).readonly_paths = vec!["/proc/sys".into()]);
    let refused = pod.exec(&root, "echo 4194304 > /proc/sys/kernel/pid_max");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{refused:?}");
    // What needs capabilities that a container does not have.
    for forbidden in ["mount -t tmpfs none /mnt", "hostname other", "mknod /tmp/sda b 8 0 && cat /tmp/sda", "chroot / true && reboot -f"] {
        assert_ne!(pod.exec(&root, forbidden).exit_code, 0, "{forbidden}");
    }
    let privileged = pod.run("privileged", SLEEP, |config| security(config).privileged = true);
    pod.output(&privileged, "mkdir -p /m && mount -t tmpfs none /m && echo 4194304 > /proc/sys/kernel/pid_max");
}

fn seccomp_holds_in_the_container_and_its_execs() {
    let mut pod = Pod::start(|_| ());
    let profile = |profile: ProfileType, path: &str| Some(SecurityProfile { profile_type: profile.into(), localhost_ref: path.into() });
    let default = pod.run("default", SLEEP, |config| security(config).seccomp = profile(ProfileType::RuntimeDefault, ""));
    assert_eq!(pod.output(&default, "grep Seccomp: /proc/self/status"), "Seccomp:\t2");
    // Without the capability for it the default profile lets nobody make namespaces.
    assert_ne!(pod.exec(&default, "unshare -U true").exit_code, 0);
    let free = pod.run("free", SLEEP, |config| security(config).seccomp = profile(ProfileType::Unconfined, ""));
    assert_eq!(pod.output(&free, "grep Seccomp: /proc/self/status; unshare -U true"), "Seccomp:\t0");
    let path = format!("/tmp/{}.json", id("profile"));
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}]}"#;
    std::fs::write(&path, text).unwrap();
    let local = pod.run("local", SLEEP, |config| security(config).seccomp = profile(ProfileType::Localhost, &path));
    let refused = pod.exec(&local, "mkdir /made");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("No space left on device"), "{refused:?}");
}

fn container_limits_are_set_changed_and_reported() {
    let mut pod = Pod::start(|_| ());
    let limits = |memory: i64, quota: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: quota,
        cpu_shares: 512,
        memory_limit_in_bytes: memory,
        unified: [("pids.max", "77"), ("io.weight", "default 50")].map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..LinuxContainerResources::default()
    };
    let container = pod.run("limited", SLEEP, |config| config.linux.as_mut().unwrap().resources = Some(limits(64 << 20, 50_000)));
    let read = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max io.weight";
    assert_eq!(pod.output(&container, read), format!("{}\n50000 100000\n20\n77\ndefault 50", 64 << 20));
    let request = UpdateContainerResourcesRequest {
        container_id: container.clone(),
        linux: Some(limits(96 << 20, 70_000)),
        ..UpdateContainerResourcesRequest::default()
    };
    pod.cri.call(|client| client.update_container_resources(request)).unwrap();
    assert_eq!(pod.output(&container, "cd /sys/fs/cgroup; cat memory.max cpu.max"), format!("{}\n70000 100000", 96 << 20));
    let request = ContainerStatsRequest { container_id: container.clone() };
    let stats = pod.cri.call(|client| client.container_stats(request)).unwrap().stats.unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let memory = stats.memory.unwrap();
    assert!(memory.working_set_bytes.unwrap().value > 0 && memory.usage_bytes.unwrap().value < 96 << 20);
}

fn a_pods_limits_size_its_machine() {
    let limits = LinuxContainerResources {
        memory_limit_in_bytes: 400 << 20,
        cpu_quota: 150_000,
        cpu_period: 100_000,
        ..LinuxContainerResources::default()
    };
    let mut pod = Pod::start(|config| config.linux.as_mut().unwrap().resources = Some(limits));
    let container = pod.run("sized", SLEEP, |_| ());
    let seen = pod.output(&container, "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo");
    let numbers: Vec<u64> = seen.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers[0], 2);
    assert!((400 << 10..496 << 10).contains(&numbers[1]), "{seen}");
}

fn the_hosts_namespaces_are_refused_in_one_sentence() {
    let Err(error) = Pod::try_start(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
            Some(NamespaceOption { pid: NamespaceMode::Node.into(), ..NamespaceOption::default() });
    }) else {
        panic!("a pod with the host's process ids was started")
    };
    assert!(error.message().contains("the host's process ids") && error.message().contains("pod.host_namespaces"), "{error:?}");
}

fn a_log_has_the_format_of_the_cri() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("talk", "echo one; echo two >&2", |_| ());
    assert_eq!(pod.wait_for_exit(&container), 0);
    let path = format!("{}/talk.log", pod.config.log_directory);
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.contains(" stdout F one\n") && text.contains(" stderr F two\n") {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{text:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
