//! Tries from inside what the monitor's jail and the filters of its threads forbid, and prints what came of each attempt:
//! `WHERE: ATTEMPT: OUTCOME`. A node test reads that; nothing installs this program.
//!
//! `jail-probe ID PID`: the user that the monitor would be, and a process outside of the jail.
//!
//! `jail-probe cost ID`: what the jail costs instead, for a benchmark, as lines of a name and a number.
//!
//! `jail-probe lists`: the numbers of the system calls that each role may make.
#![expect(unsafe_code, reason = "system calls as somebody makes them who has taken the monitor over")]

use std::fs::File;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::Instant;

use anyhow::{Context, Result};
use caisson_host::jail::{Empty, Side};
use caisson_host::seccomp::SeccompError;
use caisson_vmm::filters;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

type Attempt = (&'static str, fn(Pid) -> io::Result<()>);

/// What namespaces, the empty root, the user and Landlock refuse.
const ATTEMPTS: &[Attempt] = &[
    ("open the root folder", |_| File::open("/").map(drop)),
    ("open a path", |_| File::open("/proc/self/mem").map(drop)),
    ("make a file", |_| File::create("/file").map(drop)),
    ("connect to the host", |_| TcpStream::connect("127.0.0.1:22").map(drop)),
    ("listen", |_| TcpListener::bind("0.0.0.0:8080").map(drop)),
    ("connect to an abstract socket", |_| {
        use std::os::linux::net::SocketAddrExt;
        std::os::unix::net::UnixStream::connect_addr(&SocketAddr::from_abstract_name("caisson-jail-probe")?).map(drop)
    }),
    ("signal a process outside", |outside| Ok(kill(outside, None)?)),
    ("become root", |_| Ok(nix::unistd::setresuid(0.into(), 0.into(), 0.into())?)),
    ("make a user namespace", |_| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?)),
    ("mount", |_| Ok(nix::mount::mount(Some("x"), "/", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)?)),
    ("raise a limit", |_| Ok(nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 1, 1)?)),
    ("start a program", |_| {
        Err(nix::unistd::execve(c"/proc/self/exe", &[c"x"], &[c"x"]).err().map_or_else(io::Error::last_os_error, Into::into))
    }),
];

/// System calls with arguments that no role may make.
const CALLS: &[(&str, libc::c_long, [libc::c_long; 3])] = &[
    ("open", libc::SYS_openat, [-100, 0, 0]),
    ("socket", libc::SYS_socket, [1, 1, 0]),
    ("execve", libc::SYS_execve, [0; 3]),
    ("fork", libc::SYS_fork, [0; 3]),
    ("kill", libc::SYS_kill, [0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [0; 3]),
    ("mount", libc::SYS_mount, [0; 3]),
    ("setns", libc::SYS_setns, [0; 3]),
    ("unshare", libc::SYS_unshare, [0; 3]),
    ("bpf", libc::SYS_bpf, [0; 3]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 3]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 3]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [0; 3]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [0; 3]),
    ("memfd_create", libc::SYS_memfd_create, [0; 3]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, [0, libc::TIOCSTI as libc::c_long, 0]),
    ("mmap to execute", libc::SYS_mmap, [0, 4096, 5]),
    ("mprotect to execute", libc::SYS_mprotect, [0, 4096, 5]),
    ("prctl PR_SET_DUMPABLE", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as libc::c_long, 1, 0]),
    ("fcntl F_SETOWN", libc::SYS_fcntl, [0, libc::F_SETOWN as libc::c_long, 1]),
];

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("lists") => return lists(),
        Some("cost") => return cost(std::env::args().nth(2).context("the user's id is missing")?.parse()?),
        _ => {}
    }
    let mut arguments = std::env::args().skip(1).filter_map(|word| word.parse().ok());
    let (id, outside) = (arguments.next().context("the user's id is missing")?, arguments.next().context("the process is missing")?);
    let inside = match (Empty { id }).unshare()? {
        Side::Outside(child) => {
            waitpid(child, None)?;
            return Ok(());
        }
        Side::Inside(inside) => inside,
    };
    // That one is there which nobody may reach from the jail's network namespace.
    let _listener = listen_abstract();
    inside.enter()?;
    for (name, attempt) in ATTEMPTS {
        let outcome = attempt(Pid::from_raw(outside.cast_signed()));
        println!("jail: {name}: {}", outcome.map_or_else(|error| format!("refused, {error}"), |()| "DONE".into()));
    }
    for (role, install, _) in filters::ROLES {
        for (name, call, arguments) in CALLS {
            println!("{role}: {name}: {}", filtered(install, *call, arguments)?);
        }
    }
    Ok(())
}

fn listen_abstract() -> Result<UnixListener> {
    use std::os::linux::net::SocketAddrExt;
    Ok(UnixListener::bind_addr(&SocketAddr::from_abstract_name("caisson-jail-probe")?)?)
}

fn lists() -> Result<()> {
    for (role, _, lists) in filters::ROLES {
        println!("{role} {}", filters::calls(lists).iter().map(i64::to_string).collect::<Vec<_>>().join(" "));
    }
    Ok(())
}

/// System calls that are timed.
const CALLS_TIMED: u32 = 200_000;

/// Prints how long it takes to enter the jail, and what a system call takes without a filter and behind the longest one.
fn cost(id: u32) -> Result<()> {
    let file = File::open("/dev/zero")?;
    let timed = |name: &str| {
        let begin = Instant::now();
        for _ in 0..CALLS_TIMED {
            let mut byte = [0];
            let _ = (&file).read(&mut byte);
        }
        println!("{name} {}", begin.elapsed().as_nanos() / u128::from(CALLS_TIMED));
    };
    timed("jail-call.free");
    // SAFETY: there is one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        waitpid(child, None)?;
        let begin = Instant::now();
        return match (Empty { id }).unshare()? {
            Side::Outside(child) => Ok(waitpid(child, None).map(drop)?),
            Side::Inside(inside) => {
                inside.enter()?;
                println!("jail-enter {}", begin.elapsed().as_micros());
                Ok(())
            }
        };
    }
    filters::control()?;
    timed("jail-call.filtered");
    Ok(())
}

/// What becomes of a process that makes a system call behind a filter.
fn filtered(install: fn() -> std::result::Result<(), SeccompError>, call: libc::c_long, arguments: &[libc::c_long; 3]) -> Result<String> {
    // SAFETY: there is one thread.
    match unsafe { fork() }? {
        ForkResult::Child => {
            if install().is_err() {
                std::process::exit(2);
            }
            let [first, second, third] = arguments;
            // SAFETY: whatever the kernel would make of these arguments is the process's end or an error.
            let _ = unsafe { libc::syscall(call, *first, *second, *third, 0, 0, 0) };
            std::process::exit(0);
        }
        ForkResult::Parent { child } => Ok(match waitpid(child, None)? {
            WaitStatus::Signaled(_, Signal::SIGSYS, _) => "killed".into(),
            other => format!("DONE ({other:?})"),
        }),
    }
}
