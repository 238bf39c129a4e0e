//! Streaming through the CRI: exec, attach and port-forward, over WebSockets as `kubectl` uses them
//! (`v4.channel.k8s.io`: the first byte of a message is its channel).

use std::net::TcpStream;
use std::time::{Duration, Instant};

use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

use crate::Test;
use crate::cri::{Pod, SLEEP};
use crate::host::eventually;

pub const TESTS: &[Test] = &[
    ("an_exec_is_a_conversation_with_an_exit_code", an_exec_is_a_conversation_with_an_exit_code),
    ("an_exec_with_a_terminal_has_its_size", an_exec_with_a_terminal_has_its_size),
    ("a_container_can_be_attached_to_again", a_container_can_be_attached_to_again),
    ("standard_input_that_is_given_once_ends_with_who_gave_it", standard_input_that_is_given_once_ends_with_who_gave_it),
    ("forwarded_ports_reach_the_pod", forwarded_ports_reach_the_pod),
];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// How it ended, as a Kubernetes status.
const ENDED: u8 = 3;
const RESIZE: u8 = 4;
const LIMIT: Duration = Duration::from_secs(30);

/// A conversation with what a streaming call started.
struct Stream {
    socket: WebSocket<TcpStream>,
    /// What came on each channel.
    received: [Vec<u8>; 5],
}

impl Stream {
    fn open(url: &str) -> Self {
        let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", "v4.channel.k8s.io".parse().unwrap());
        let host = request.uri().authority().unwrap().to_string();
        let tcp = TcpStream::connect(&host).unwrap();
        tcp.set_read_timeout(Some(LIMIT)).unwrap();
        let (socket, _) = tungstenite::client(request, tcp).unwrap();
        Self { socket, received: Default::default() }
    }

    fn send(&mut self, channel: u8, data: &[u8]) {
        self.socket.send(Message::binary([&[channel], data].concat())).unwrap();
    }

    /// Takes the next message in; false after the last one.
    fn receive(&mut self) -> bool {
        match self.socket.read() {
            Ok(Message::Binary(data)) => {
                if let Some((channel, data)) = data.split_first() {
                    self.received[usize::from(*channel)].extend_from_slice(data);
                }
                true
            }
            Ok(Message::Close(_)) => false,
            Ok(_) => true,
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed | tungstenite::Error::Protocol(_)) => false,
            Err(error) => panic!("{error}; received so far: {:?}", self.texts()),
        }
    }

    fn texts(&self) -> Vec<String> {
        self.received.iter().map(|data| String::from_utf8_lossy(data).into_owned()).collect()
    }

    /// Waits until a channel has brought a text.
    fn wait_for(&mut self, channel: u8, text: &str) {
        while !self.texts()[usize::from(channel)].contains(text) {
            assert!(self.receive(), "it ended without {text:?}: {:?}", self.texts());
        }
    }

    /// All that comes until the end.
    fn finish(mut self) -> Vec<String> {
        while self.receive() {}
        self.texts()
    }
}

fn exec(pod: &mut Pod, container: &str, command: &[&str], tty: bool) -> Stream {
    let cmd = command.iter().map(|&word| word.to_owned()).collect();
    let request = ExecRequest { container_id: container.into(), cmd, tty, stdin: true, stdout: true, stderr: !tty };
    Stream::open(&pod.cri.call(|client| client.exec(request)).unwrap().url)
}

fn an_exec_is_a_conversation_with_an_exit_code() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("first", SLEEP, |_| ());
    let script = "read one; echo got $one; echo aside >&2; read two; echo got $two; exit 42";
    let mut stream = exec(&mut pod, &container, &["sh", "-c", script], false);
    stream.send(STDIN, b"hello\n");
    stream.wait_for(STDOUT, "got hello\n");
    stream.wait_for(STDERR, "aside\n");
    stream.send(STDIN, b"again\n");
    let texts = stream.finish();
    assert_eq!(texts[usize::from(STDOUT)], "got hello\ngot again\n");
    assert_eq!(texts[usize::from(STDERR)], "aside\n");
    let ended = &texts[usize::from(ENDED)];
    assert!(ended.contains("NonZeroExitCode") && ended.contains("\"42\""), "{ended}");

    // A program that is not there is said at once, not waited for.
    let start = Instant::now();
    let texts = exec(&mut pod, &container, &["/no/such/program"], false).finish();
    let ended = &texts[usize::from(ENDED)];
    assert!(ended.contains("/no/such/program") || ended.contains("\"127\""), "{texts:?}");
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
}

fn an_exec_with_a_terminal_has_its_size() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("first", SLEEP, |_| ());
    let mut stream = exec(&mut pod, &container, &["sh"], true);
    stream.send(RESIZE, br#"{"Width":133,"Height":37}"#);
    stream.send(STDIN, b"until [ \"$(stty size)\" = '37 133' ]; do sleep 0.1; done; echo as$((40 + 2))ked\n");
    stream.wait_for(STDOUT, "as42ked");
    stream.send(STDIN, b"exit 3\n");
    let texts = stream.finish();
    assert!(texts[usize::from(ENDED)].contains("\"3\""), "{texts:?}");
}

fn a_container_can_be_attached_to_again() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("first", "while read line; do echo said $line; echo aside >&2; done", |config| config.stdin = true);
    for word in ["one", "two"] {
        let request = AttachRequest { container_id: container.clone(), stdin: true, tty: false, stdout: true, stderr: true };
        let mut stream = Stream::open(&pod.cri.call(|client| client.attach(request)).unwrap().url);
        stream.send(STDIN, format!("{word}\n").as_bytes());
        stream.wait_for(STDOUT, &format!("said {word}\n"));
        stream.wait_for(STDERR, "aside\n");
        assert!(!stream.texts()[usize::from(STDOUT)].contains("one") || word == "one", "{:?}", stream.texts());
    }
    // What was said while somebody was attached is in the log as well, where containerd writes it in its own time.
    let log = || std::fs::read_to_string(format!("{}/first.log", pod.config.log_directory)).unwrap();
    let all = ["stdout F said one", "stdout F said two", "stderr F aside"];
    eventually(|| all.iter().all(|line| log().contains(line)), "the log lacks what was said");
}

fn standard_input_that_is_given_once_ends_with_who_gave_it() {
    let mut pod = Pod::start(|_| ());
    let container = pod.run("once", "cat; exit 5", |config| (config.stdin, config.stdin_once) = (true, true));
    let request = AttachRequest { container_id: container.clone(), stdin: true, tty: false, stdout: true, stderr: true };
    let mut stream = Stream::open(&pod.cri.call(|client| client.attach(request)).unwrap().url);
    stream.send(STDIN, b"a word\n");
    stream.wait_for(STDOUT, "a word\n");
    stream.socket.close(None).unwrap();
    assert_eq!(pod.wait_for_exit(&container), 5);
}

fn forwarded_ports_reach_the_pod() {
    let mut pod = Pod::start(|_| ());
    pod.run("server", "while :; do nc -l -p 8080 -e sh -c 'read word; echo heard $word'; done", |_| ());
    // Each channel begins with the port's number.
    let expected = [&8080_u16.to_le_bytes(), &b"heard something\n"[..]].concat();
    let start = Instant::now();
    loop {
        let request = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
        let mut stream = Stream::open(&format!("{}?port=8080", pod.cri.call(|client| client.port_forward(request)).unwrap().url));
        stream.send(STDIN, b"something\n");
        while stream.received[0] != expected && stream.receive() {}
        if stream.received[0] == expected {
            break;
        }
        // The server may not listen yet; then the connection ends.
        assert!(start.elapsed() < LIMIT, "{:?}", stream.texts());
        std::thread::sleep(Duration::from_millis(300));
    }
}
