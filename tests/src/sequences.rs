//! Random sequences of task calls, legal and illegal, against a model of what containerd relies on.
//!
//! The calls go to a pod's shim as containerd makes them. `CAISSON_TEST_SEED` chooses the sequence and
//! `CAISSON_TEST_CALLS` its length; a failure names the seed and the calls that led to it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount, PauseRequest, ResumeRequest, StartRequest, StateRequest,
    Status, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{self, Code, context};
use containerd_shim_protos::{Client, TaskClient};
use serde_json::json;

use crate::Test;
use crate::ctr::{Pod, shell};
use crate::host::{Inventory, assert_nothing_left, number};

pub const ALONE: &[Test] =
    &[("any_sequence_of_calls_is_answered_as_the_state_allows", any_sequence_of_calls_is_answered_as_the_state_allows)];

/// No call may take longer, whatever came before it.
const LIMIT: Duration = Duration::from_secs(60);
pub const CONTAINERS: usize = 3;
const EXECS: usize = 2;

/// Numbers that are the same for the same seed (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Running,
    Paused,
    Stopped(u32),
}

/// What a container must be by what was called.
#[derive(Debug)]
struct Container {
    state: State,
    /// Whether its program ends by itself, with 3.
    ends: bool,
    execs: BTreeMap<String, State>,
}

/// A pod's shim, called as containerd calls it.
pub struct Shim {
    pod: String,
    task: TaskClient,
    containers: BTreeMap<String, Container>,
    calls: Vec<String>,
}

type Answer<T> = Result<T, Code>;

/// The names of each container's execs.
pub fn execs() -> impl Iterator<Item = String> {
    (0..EXECS).map(|number| format!("exec-{number}"))
}

impl Shim {
    /// The shim of a pod, through a connection of its own.
    pub fn connect(pod: &Pod) -> Self {
        shell("mkdir -p /tmp/sequences/root/bin /tmp/sequences/root/proc && cp -n /bin/busybox /tmp/sequences/root/bin/");
        let address = shell(&format!("cat /run/containerd/io.containerd.runtime.v2.task/default/{}/address", pod.id));
        let task = TaskClient::new(Client::connect(&address).unwrap());
        Self { pod: pod.id.clone(), task, containers: BTreeMap::new(), calls: Vec::new() }
    }

    /// Some call, whatever its answer.
    pub fn any_call(&mut self, random: &mut Random) {
        let id = format!("seq-{}", random.below(CONTAINERS));
        let exec = format!("exec-{}", random.below(EXECS));
        let _answer = match random.below(11) {
            0..=1 => self.create(&id, random.below(2) == 0),
            2..=3 => self.start(&id, ""),
            4 => self.kill(&id),
            5 => self.delete(&id, "").map(drop),
            6 => self.pause(&id, true),
            7 => self.pause(&id, false),
            8 => self.exec(&id, &exec),
            9 => self.start(&id, &exec),
            _ => self.delete(&id, &exec).map(drop),
        };
    }

    /// Whether there is such a container.
    pub fn exists(&mut self, id: &str) -> bool {
        let request = StateRequest { id: id.into(), ..StateRequest::default() };
        self.call(&request, |task, context, request| task.state(context, request)) != Err(Code::NOT_FOUND)
    }

    fn call<Q: std::fmt::Debug, A>(
        &mut self,
        request: &Q,
        call: impl FnOnce(&TaskClient, context::Context, &Q) -> ttrpc::Result<A>,
    ) -> Answer<A> {
        let begin = Instant::now();
        let answer = call(&self.task, context::with_timeout(LIMIT.as_nanos() as i64), request);
        assert!(begin.elapsed() < LIMIT, "{request:?} took {:?} after {:#?}", begin.elapsed(), self.calls);
        answer.map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => {
                // Of what no model expects the reason is wanted.
                if status.code() == Code::UNKNOWN {
                    self.calls.push(status.message().to_owned());
                }
                status.code()
            }
            error => panic!("{request:?}: {error} after {:#?}", self.calls),
        })
    }

    fn create(&mut self, id: &str, ends: bool) -> Answer<()> {
        let bundle = format!("/tmp/sequences/{id}");
        let script = if ends { "exit 3" } else { "exec sleep 1000" };
        let namespaces: Vec<_> = ["pid", "ipc", "network", "mount"].iter().map(|kind| json!({"type": kind})).collect();
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/busybox", "sh", "-c", script], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.pod},
            "linux": {"namespaces": namespaces},
        });
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(format!("{bundle}/config.json"), spec.to_string()).unwrap();
        let rootfs = Mount {
            type_: "bind".into(),
            source: "/tmp/sequences/root".into(),
            options: vec!["rbind".into(), "rw".into()],
            ..Mount::default()
        };
        let request = CreateTaskRequest { id: id.into(), bundle, rootfs: vec![rootfs], ..CreateTaskRequest::default() };
        self.call(&request, |task, context, request| task.create(context, request)).map(drop)
    }

    fn exec(&mut self, id: &str, exec: &str) -> Answer<()> {
        let process = json!({"args": ["/bin/busybox", "true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]});
        let spec = Any { type_url: "types.containerd.io/process".into(), value: process.to_string().into_bytes(), ..Any::default() };
        let request = ExecProcessRequest { id: id.into(), exec_id: exec.into(), spec: Some(spec).into(), ..ExecProcessRequest::default() };
        self.call(&request, |task, context, request| task.exec(context, request)).map(drop)
    }

    fn start(&mut self, id: &str, exec: &str) -> Answer<()> {
        let request = StartRequest { id: id.into(), exec_id: exec.into(), ..StartRequest::default() };
        self.call(&request, |task, context, request| task.start(context, request)).map(drop)
    }

    pub fn kill(&mut self, id: &str) -> Answer<()> {
        let request = KillRequest { id: id.into(), signal: 9, ..KillRequest::default() };
        self.call(&request, |task, context, request| task.kill(context, request)).map(drop)
    }

    fn wait(&mut self, id: &str, exec: &str) -> u32 {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..WaitRequest::default() };
        self.call(&request, |task, context, request| task.wait(context, request)).unwrap().exit_status
    }

    pub fn delete(&mut self, id: &str, exec: &str) -> Answer<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec.into(), ..DeleteRequest::default() };
        self.call(&request, |task, context, request| task.delete(context, request)).map(|answer| answer.exit_status)
    }

    fn pause(&mut self, id: &str, paused: bool) -> Answer<()> {
        if paused {
            let request = PauseRequest { id: id.into(), ..PauseRequest::default() };
            self.call(&request, |task, context, request| task.pause(context, request)).map(drop)
        } else {
            let request = ResumeRequest { id: id.into(), ..ResumeRequest::default() };
            self.call(&request, |task, context, request| task.resume(context, request)).map(drop)
        }
    }

    /// Compares a container's state with the model's.
    fn check(&mut self, id: &str) {
        let request = StateRequest { id: id.into(), ..StateRequest::default() };
        let answer = self.call(&request, |task, context, request| task.state(context, request));
        let seen = answer.map(|answer| (answer.status.enum_value_or_default(), answer.exit_status));
        let expected = self.containers.get(id).map(|container| match container.state {
            State::Created => (Status::CREATED, 0),
            State::Running => (Status::RUNNING, 0),
            State::Paused => (Status::PAUSED, 0),
            State::Stopped(code) => (Status::STOPPED, code),
        });
        assert_eq!(seen, expected.ok_or(Code::NOT_FOUND), "{id} after {:#?}", self.calls);
    }

    /// Notes a call with its answer, which must be the expected one; returns whether it succeeded.
    fn expect<T: std::fmt::Debug + PartialEq>(&mut self, call: String, seen: Answer<T>, expected: Answer<T>) -> bool {
        self.calls.push(format!("{call} -> {seen:?}"));
        assert_eq!(seen, expected, "the last of {:#?}", self.calls);
        seen.is_ok()
    }

    fn set(&mut self, id: &str, state: State) {
        self.containers.get_mut(id).unwrap().state = state;
    }

    /// Makes one random call and checks its answer against the model.
    fn step(&mut self, random: &mut Random) {
        let id = format!("seq-{}", random.below(CONTAINERS));
        let exec = format!("exec-{}", random.below(EXECS));
        match random.below(20) {
            choice @ 0..15 => self.step_container(&id, choice, random.below(3) == 0),
            choice => self.step_exec(&id, &exec, choice),
        }
        self.check(&id);
    }

    fn step_container(&mut self, id: &str, choice: usize, ends: bool) {
        let state = self.containers.get(id).map(|container| container.state);
        match choice {
            0..=3 => {
                let expected = if state.is_some() { Err(Code::ALREADY_EXISTS) } else { Ok(()) };
                let seen = self.create(id, ends);
                if self.expect(format!("create {id}"), seen, expected) {
                    self.containers.insert(id.to_owned(), Container { state: State::Created, ends, execs: BTreeMap::new() });
                }
            }
            4..=7 => {
                let expected = match state {
                    None => Err(Code::NOT_FOUND),
                    Some(State::Created) => Ok(()),
                    Some(_) => Err(Code::FAILED_PRECONDITION),
                };
                let seen = self.start(id, "");
                if self.expect(format!("start {id}"), seen, expected) {
                    let ends = self.containers[id].ends;
                    let now = if ends { State::Stopped(self.wait(id, "")) } else { State::Running };
                    assert!(!ends || now == State::Stopped(3), "{now:?}");
                    self.set(id, now);
                }
            }
            8..=9 => {
                let gone = matches!(state, None | Some(State::Stopped(_)));
                let seen = self.kill(id);
                if self.expect(format!("kill {id}"), seen, if gone { Err(Code::NOT_FOUND) } else { Ok(()) }) {
                    assert_eq!(self.wait(id, ""), 137, "after {:#?}", self.calls);
                    self.set(id, State::Stopped(137));
                }
            }
            10..=12 => {
                let expected = match state {
                    None => Err(Code::NOT_FOUND),
                    Some(State::Created) => Ok(137),
                    Some(State::Stopped(code)) => Ok(code),
                    Some(State::Running | State::Paused) => Err(Code::FAILED_PRECONDITION),
                };
                let seen = self.delete(id, "");
                if self.expect(format!("delete {id}"), seen, expected) {
                    self.containers.remove(id);
                }
            }
            _ => {
                let pause = choice == 13;
                let expected = match state {
                    None => Err(Code::NOT_FOUND),
                    Some(State::Running | State::Paused) => Ok(()),
                    Some(_) => Err(Code::FAILED_PRECONDITION),
                };
                let seen = self.pause(id, pause);
                if self.expect(format!("{} {id}", if pause { "pause" } else { "resume" }), seen, expected) {
                    self.set(id, if pause { State::Paused } else { State::Running });
                }
            }
        }
    }

    fn step_exec(&mut self, id: &str, exec: &str, choice: usize) {
        let container = self.containers.get(id);
        let state = container.map(|container| container.state);
        let exec_state = container.and_then(|container| container.execs.get(exec).copied());
        let now = match choice {
            15..=16 => {
                let expected = match (state, exec_state) {
                    (None | Some(State::Stopped(_)), _) => Err(Code::NOT_FOUND),
                    (Some(State::Paused), _) => Err(Code::FAILED_PRECONDITION),
                    (_, Some(_)) => Err(Code::ALREADY_EXISTS),
                    (_, None) => Ok(()),
                };
                let seen = self.exec(id, exec);
                self.expect(format!("exec {id} {exec}"), seen, expected).then_some(State::Created)
            }
            17..=18 => {
                let expected = match (state, exec_state) {
                    (None, _) | (_, None) => Err(Code::NOT_FOUND),
                    (Some(State::Running | State::Created), Some(State::Created)) => Ok(()),
                    _ => Err(Code::FAILED_PRECONDITION),
                };
                let seen = self.start(id, exec);
                if self.expect(format!("start {id} {exec}"), seen, expected) {
                    assert_eq!(self.wait(id, exec), 0, "after {:#?}", self.calls);
                    Some(State::Stopped(0))
                } else {
                    // One that was tried has failed; a paused container's is not.
                    (exec_state == Some(State::Created) && state != Some(State::Paused)).then_some(State::Stopped(255))
                }
            }
            _ => {
                let expected = match exec_state {
                    None => Err(Code::NOT_FOUND),
                    Some(State::Stopped(code)) => Ok(code),
                    Some(_) => Ok(0),
                };
                let seen = self.delete(id, exec);
                if self.expect(format!("delete {id} {exec}"), seen, expected) {
                    self.containers.get_mut(id).unwrap().execs.remove(exec);
                }
                None
            }
        };
        if let Some(now) = now {
            self.containers.get_mut(id).unwrap().execs.insert(exec.to_owned(), now);
        }
    }
}

fn any_sequence_of_calls_is_answered_as_the_state_allows() {
    let seed = number("CAISSON_TEST_SEED", 20_261_123);
    let calls = number("CAISSON_TEST_CALLS", 150);
    let before = Inventory::take();
    {
        let pod = Pod::start("sequences", &[], "exec sleep 1000");
        let mut shim = Shim::connect(&pod);
        shim.calls.push(format!("seed {seed}"));
        let mut random = Random(seed.max(1));
        for _ in 0..calls {
            shim.step(&mut random);
        }
        // A machine that dies under whatever there is: every call is answered, and everything can be deleted.
        shell(&format!("kill -9 {}", pod.host_pid("vmm")));
        for (id, container) in std::mem::take(&mut shim.containers) {
            let code = shim.wait(&id, "");
            assert!(code == 137 || container.state == State::Stopped(code), "{id}: {code} after {:#?}", shim.calls);
            assert_eq!(shim.kill(&id), Err(Code::NOT_FOUND));
            assert_eq!(shim.delete(&id, ""), Ok(code), "{id} after {:#?}", shim.calls);
        }
    }
    shell("rm -r /tmp/sequences");
    assert_nothing_left(&before);
}
