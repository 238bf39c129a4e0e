//! `caisson-stand-in`: one process of the host that stands for a container, whose own processes are in a machine.
//!
//! ```text
//! a signal arrives -> its number goes to whoever started us, as a byte
//! a byte arrives   -> the container has ended with this code, and so do we
//! the socket ends  -> nobody is left who could tell: we end as killed
//! ```
//!
//! Who started us has made the room (`caisson_host::stand_in`), where signals wait, and left a socket at descriptor 3. There may be hundreds
//! of these on a host, so a release has no library at all: it is one page of code and one of stack. The filter that it
//! gives itself allows what the loop needs.
#![cfg_attr(panic = "abort", no_std, no_main)]
#![expect(unsafe_code, reason = "system calls without a library")]

use core::arch::asm;

/// The socket, and the code to end with when it ends: that of a process which SIGKILL has killed.
const SOCKET: usize = 3;
const KILLED: usize = 137;

/// Numbers of system calls (asm/unistd_64.h).
const READ: usize = 0;
const WRITE: usize = 1;
const POLL: usize = 7;
const PRCTL: usize = 157;
const EXIT_GROUP: usize = 231;
const SIGNALFD4: usize = 289;
/// All signals.
const ALL: u64 = !0;
/// `POLLIN`.
const READABLE: i16 = 1;
/// Bytes of `struct signalfd_siginfo`, whose first four are the signal's number.
const SIGINFO: usize = 128;
/// `EINTR`, as a system call returns it.
const INTERRUPTED: isize = -4;

/// Makes a system call.
///
/// # Safety
/// Each argument that is an address must be one that the call may read or write as it does.
unsafe fn call(number: usize, arguments: [usize; 4]) -> isize {
    let result;
    // SAFETY: the kernel changes rax, rcx and r11, and what the caller promises that it may.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            // prctl(2) wants its last argument to be nothing.
            in("r8") 0_usize,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

fn exit(code: usize) -> ! {
    loop {
        // SAFETY: the call takes a number.
        unsafe { call(EXIT_GROUP, [code, 0, 0, 0]) };
    }
}

/// An instruction of a filter (linux/filter.h, `struct sock_filter`).
#[repr(C)]
struct Instruction(u16, u8, u8, u32);

/// `struct sock_fprog`.
#[repr(C)]
struct Program {
    length: u16,
    instructions: *const Instruction,
}

/// `BPF_LD|BPF_W|BPF_ABS`, `BPF_JMP|BPF_JEQ|BPF_K`, `BPF_RET|BPF_K`.
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `AUDIT_ARCH_X86_64`, `SECCOMP_RET_ALLOW`, `SECCOMP_RET_KILL_PROCESS`.
const X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
/// Calls that the loop makes, with `restart_syscall` that the kernel makes of a stopped one.
const RESTART_SYSCALL: usize = 219;

static FILTER: [Instruction; 10] = [
    // `struct seccomp_data`: the number is at 0, the architecture at 4.
    Instruction(LOAD, 0, 0, 4),
    Instruction(EQUAL, 0, 6, X86_64),
    Instruction(LOAD, 0, 0, 0),
    Instruction(EQUAL, 5, 0, READ as u32),
    Instruction(EQUAL, 4, 0, WRITE as u32),
    Instruction(EQUAL, 3, 0, POLL as u32),
    Instruction(EQUAL, 2, 0, EXIT_GROUP as u32),
    Instruction(EQUAL, 1, 0, RESTART_SYSCALL as u32),
    Instruction(RETURN, 0, 0, KILL),
    Instruction(RETURN, 0, 0, ALLOW),
];
/// `PR_SET_NAME`, and the name: the kernel would take that of the descriptor which the program was started by.
const SET_NAME: usize = 15;
const NAME: &[u8] = b"caisson-stand-i\0";
/// `PR_SET_SECCOMP` and `SECCOMP_MODE_FILTER`; `PR_SET_NO_NEW_PRIVS`; `PR_SET_DUMPABLE`.
const SET_SECCOMP: usize = 22;
const MODE_FILTER: usize = 2;
const SET_NO_NEW_PRIVS: usize = 38;
const SET_DUMPABLE: usize = 4;

/// Gives up what is not needed from here on; returns whether the kernel has agreed.
fn restrict() -> bool {
    let program = Program { length: FILTER.len() as u16, instructions: FILTER.as_ptr() };
    // SAFETY: the calls take numbers, a name with its zero, and a program that lives through the last of them.
    unsafe {
        call(PRCTL, [SET_NAME, NAME.as_ptr() as usize, 0, 0]) == 0
            && call(PRCTL, [SET_DUMPABLE, 0, 0, 0]) == 0
            && call(PRCTL, [SET_NO_NEW_PRIVS, 1, 0, 0]) == 0
            && call(PRCTL, [SET_SECCOMP, MODE_FILTER, (&raw const program) as usize, 0]) == 0
    }
}

/// `struct pollfd`.
#[repr(C)]
struct Polled {
    descriptor: i32,
    events: i16,
    returned: i16,
}

fn stand() -> ! {
    let all = ALL;
    // SAFETY: the call reads a set of signals that lives through it, of the size that the third argument names.
    let signals = unsafe { call(SIGNALFD4, [usize::MAX, (&raw const all) as usize, size_of::<u64>(), 0]) };
    if signals < 0 || !restrict() {
        exit(KILLED);
    }
    let mut polled = [SOCKET as i32, signals as i32].map(|descriptor| Polled { descriptor, events: READABLE, returned: 0 });
    let mut info = [0_u8; SIGINFO];
    loop {
        // SAFETY: the array lives through the call and has two entries.
        let ready = unsafe { call(POLL, [polled.as_mut_ptr() as usize, 2, usize::MAX, 0]) };
        if ready < 0 && ready != INTERRUPTED {
            exit(KILLED);
        }
        if polled[1].returned != 0 {
            // SAFETY: the buffer lives through the calls; one byte of it is written to the socket.
            unsafe {
                call(READ, [signals as usize, info.as_mut_ptr() as usize, SIGINFO, 0]);
                call(WRITE, [SOCKET, info.as_ptr() as usize, 1, 0]);
            }
        }
        if polled[0].returned != 0 {
            // SAFETY: the buffer lives through the call.
            let read = unsafe { call(READ, [SOCKET, info.as_mut_ptr() as usize, 1, 0]) };
            exit(if read == 1 { info[0].into() } else { KILLED });
        }
    }
}

/// Where the kernel starts a release.
#[cfg(panic = "abort")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    core::arch::naked_asm!("and rsp, -16", "call {stand}", "ud2", stand = sym begin)
}

#[cfg(panic = "abort")]
extern "C" fn begin() -> ! {
    stand()
}

#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(KILLED)
}

#[cfg(not(panic = "abort"))]
fn main() {
    stand()
}
