//! What each thread of the VMM may ask of the kernel once it is set up.

use std::collections::BTreeSet;

use caisson_host::seccomp::Allow::{Call, CallWith};
use caisson_host::seccomp::{Allow, SeccompError, THREAD_START, install};

/// What Rust's runtime and allocator need in any thread.
const RUNTIME: &[Allow] = &[
    Call(libc::SYS_brk),
    Call(libc::SYS_clock_gettime),
    Call(libc::SYS_close),
    Call(libc::SYS_exit),
    Call(libc::SYS_exit_group),
    Call(libc::SYS_futex),
    Call(libc::SYS_getrandom),
    Call(libc::SYS_madvise),
    // Memory for the allocator and files for the guest, never executable.
    CallWith(libc::SYS_mmap, 2, &[0, 1, 3]),
    CallWith(libc::SYS_mprotect, 2, &[0, 1, 3]),
    Call(libc::SYS_mremap),
    Call(libc::SYS_munmap),
    Call(libc::SYS_restart_syscall),
    Call(libc::SYS_rt_sigprocmask),
    Call(libc::SYS_rt_sigreturn),
    Call(libc::SYS_sched_getaffinity),
    Call(libc::SYS_sched_yield),
    Call(libc::SYS_sendmsg),
    Call(libc::SYS_sigaltstack),
    Call(libc::SYS_write),
];

/// Requests of the shim; for some of them `KVM_SET_USER_MEMORY_REGION`, `KVM_IRQFD` and `KVM_IOEVENTFD`.
const CONTROL: &[Allow] =
    &[Call(libc::SYS_eventfd2), CallWith(libc::SYS_ioctl, 1, &[0x4020_ae46, 0x4020_ae76, 0x4040_ae79]), Call(libc::SYS_recvmsg)];

/// What the virtio-fs server asks to be mapped.
const FILES: &[Allow] = &[Call(libc::SYS_recvmsg), CallWith(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFD as u64])];

/// `KVM_RUN`, how long a file is that the guest has mapped, and the vhost-user conversation of a device's activation.
const VCPU: &[Allow] =
    &[CallWith(libc::SYS_ioctl, 1, &[0xae80]), Call(libc::SYS_lseek), CallWith(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64])];

/// What makes a vCPU: `KVM_CREATE_VCPU`, `KVM_SET_CPUID2`, `KVM_SET_MSRS`, `KVM_GET_LAPIC`, `KVM_SET_LAPIC`.
const SPARE: &[Allow] = &[CallWith(libc::SYS_ioctl, 1, &[0xae41, 0x4008_ae90, 0x4008_ae89, 0x8400_ae8e, 0x4400_ae8f])];

/// A thread's start, its name, its filter. What it may do, who starts it may do: filters add up.
const THREADS: &[Allow] = &[
    THREAD_START[0],
    THREAD_START[1],
    Call(libc::SYS_gettid),
    Call(libc::SYS_rseq),
    Call(libc::SYS_set_robust_list),
    CallWith(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64]),
    CallWith(libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER as u64]),
];

/// A disk's requests.
const DISK: &[Allow] = &[
    // By which a debug build checks what it closes.
    CallWith(libc::SYS_fcntl, 1, &[libc::F_GETFD as u64]),
    Call(libc::SYS_poll),
    Call(libc::SYS_preadv),
    Call(libc::SYS_read),
    Call(libc::SYS_pwritev),
    Call(libc::SYS_fdatasync),
    Call(libc::SYS_fallocate),
    Call(libc::SYS_fadvise64),
    // For rings that were made before; nobody may make one.
    Call(libc::SYS_io_uring_enter),
];

/// Queues and streams.
const IO: &[Allow] = &[
    Call(libc::SYS_epoll_ctl),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_read),
    // TUNSETOFFLOAD, TUNSETQUEUE; an interface's hand-over to vhost-net: owner, features (both ways), memory, a queue's
    // size, addresses, base, notification, interrupt, and its tap.
    CallWith(
        libc::SYS_ioctl,
        1,
        &[
            0x4004_54d0,
            0x4004_54d9,
            0xaf01,
            0x8008_af00,
            0x4008_af00,
            0x4008_af03,
            0x4008_af10,
            0x4028_af11,
            0x4008_af12,
            0x4008_af20,
            0x4008_af21,
            0x4008_af30,
        ],
    ),
    CallWith(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFL as u64, libc::F_SETFL as u64, libc::F_GETFD as u64]),
    Call(libc::SYS_shutdown),
];

/// Has every thread allocate from the process's one heap, to be called before any is started: the C
/// library opens a file before it gives memory of a thread's own heap back (`overcommit_memory`), and
/// the filters let nobody open.
#[expect(unsafe_code, reason = "mallopt has no safe wrapper")]
pub fn use_one_heap() {
    // SAFETY: takes two numbers, and no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The lists of each role.
const CONTROL_LISTS: &[&[Allow]] = &[RUNTIME, CONTROL, THREADS, DISK];
const DISK_LISTS: &[&[Allow]] = &[RUNTIME, DISK];
const FILES_LISTS: &[&[Allow]] = &[RUNTIME, FILES];
const VCPU_LISTS: &[&[Allow]] = &[RUNTIME, VCPU];
const SPARE_LISTS: &[&[Allow]] = &[RUNTIME, VCPU, SPARE, THREADS];
const IO_LISTS: &[&[Allow]] = &[RUNTIME, IO];

/// A role: its name, what restricts a thread to it, the lists of what that may ask.
pub type Role = (&'static str, fn() -> Result<(), SeccompError>, &'static [&'static [Allow]]);

/// All of them.
pub const ROLES: [Role; 6] = [
    ("control", control, CONTROL_LISTS),
    ("devices", io, IO_LISTS),
    ("disk", disk, DISK_LISTS),
    ("files", files, FILES_LISTS),
    ("vcpu", vcpu, VCPU_LISTS),
    ("spare", spare_vcpu, SPARE_LISTS),
];

/// The numbers of the system calls in lists.
pub fn calls(lists: &[&[Allow]]) -> BTreeSet<i64> {
    let number = |allow: &Allow| match allow {
        Call(number) | CallWith(number, ..) => *number,
    };
    lists.iter().copied().flatten().map(number).collect()
}

/// Restricts the main thread, which receives requests and starts the threads of disks.
pub fn control() -> Result<(), SeccompError> {
    install("the control thread", CONTROL_LISTS)
}

/// Restricts a thread that serves a disk's queue.
pub fn disk() -> Result<(), SeccompError> {
    install("a disk's thread", DISK_LISTS)
}

/// Restricts the thread that maps files for the guest.
pub fn files() -> Result<(), SeccompError> {
    install("the thread that maps files", FILES_LISTS)
}

/// Restricts a vCPU's thread.
pub fn vcpu() -> Result<(), SeccompError> {
    install("a vCPU thread", VCPU_LISTS)
}

/// Restricts the thread that will be the next vCPU's.
pub fn spare_vcpu() -> Result<(), SeccompError> {
    install("the spare vCPU thread", SPARE_LISTS)
}

/// Restricts the thread that serves queues and streams.
pub fn io() -> Result<(), SeccompError> {
    install("the device thread", IO_LISTS)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Arc;

    use super::*;

    use caisson_host::control::Control;
    use caisson_protocol::vmm::Event;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use crate::devices::blk::Place;
    use crate::devices::blk::request::tests::{disk, file};

    const CHILD: &str = "CAISSON_TEST_FILTERED";

    /// Runs a test's body in a process of its own, as a filter's answer to what it forbids is the
    /// process's end; says whether the process lived.
    fn survives(name: &str, body: fn()) -> bool {
        if std::env::var_os(CHILD).is_some() {
            body();
            std::process::exit(0);
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(["--exact", &format!("filters::tests::{name}"), "--test-threads=1"])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        child.status().unwrap().success()
    }

    #[test]
    fn a_filtered_thread_gives_much_memory_back() {
        assert!(survives("a_filtered_thread_gives_much_memory_back", || {
            use_one_heap();
            let thread = std::thread::spawn(|| {
                io().unwrap();
                for _ in 0..4 {
                    // Below the size at which the C library maps each piece by itself.
                    let pieces: Vec<Vec<u8>> = (0..1024).map(|_| vec![1; 64 << 10]).collect();
                    drop(pieces);
                }
            });
            thread.join().unwrap();
        }));
    }

    #[test]
    fn the_control_thread_can_start_and_end_the_threads_of_a_disk() {
        assert!(survives("the_control_thread_can_start_and_end_the_threads_of_a_disk", || {
            let (shim, other) = Control::pair().unwrap();
            let (place, other) = (Place::default(), Arc::new(other));
            let (disk, files) = (disk(false), vec![file()]);
            control().unwrap();
            place.attach(disk, files, 4, &other).unwrap();
            place.detach();
            assert!(shim.receive::<Event>(true).unwrap().is_some());
        }));
    }

    #[test]
    fn lists_are_short() {
        let most = ROLES.iter().map(|(.., lists)| calls(lists).len()).max();
        assert!(calls(VCPU_LISTS).len() <= 30 && most <= Some(45), "{} {most:?}", calls(VCPU_LISTS).len());
    }

    /// Beyond the last system call that Linux has.
    const END: i64 = 512;
    /// uretprobe and uprobe, which Linux keeps from filters, and which end whoever is no trampoline of theirs.
    const PROBES: [i64; 2] = [335, 336];

    #[test]
    #[expect(unsafe_code, reason = "system calls that no role may make")]
    fn every_call_that_is_not_listed_ends_the_process() {
        for (role, install, lists) in ROLES {
            let listed = calls(lists);
            for call in (0..END).filter(|call| !listed.contains(call) && !PROBES.contains(call)) {
                // SAFETY: the child makes the filter's system calls, one more, and ends.
                let child = match unsafe { fork() }.unwrap() {
                    ForkResult::Child => unsafe {
                        // SAFETY: without room for anything to be done by it, the call fails where it does not end the process.
                        let _ = install().map(|()| libc::syscall(call, 0, 0, 0, 0, 0, 0));
                        libc::_exit(0)
                    },
                    ForkResult::Parent { child } => child,
                };
                let ended = waitpid(child, None).unwrap();
                assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "role {role}, call {call}: {ended:?}");
            }
        }
    }

    #[test]
    fn a_filtered_thread_cannot_open_a_file() {
        assert!(!survives("a_filtered_thread_cannot_open_a_file", || {
            control().unwrap();
            let _ = std::fs::File::open("/");
        }));
    }
}
