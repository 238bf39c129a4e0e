//! System call filters as data: one list for each thread role.
//!
//! A filter is what the role needs after it was set up; anything else kills the process, loudly
//! (`type=SECCOMP` in the host's kernel log names the call's number). Who starts programs that others chose
//! has a list of what is refused instead.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

/// `__X32_SYSCALL_BIT` (asm/unistd.h).
const X32_CALL: i64 = 0x4000_0000;

/// One permitted system call.
#[derive(Debug, Clone, Copy)]
pub enum Allow {
    /// With any arguments.
    Call(i64),
    /// Only when argument `.1` is one of the values `.2`, compared as 32 bits.
    CallWith(i64, u8, &'static [u64]),
}

/// How the C library starts a thread: memory, files and all else are its starter's (pthread_create(3), clone(2)).
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// A thread's start, and no process's or namespace's.
///
/// clone3(2) has its flags in memory, where no filter sees them: [`install`] has it fail as on kernels that do not know
/// it, upon which the C library takes clone(2).
pub const THREAD_START: &[Allow] = &[Allow::Call(libc::SYS_clone3), Allow::CallWith(libc::SYS_clone, 0, &[THREAD])];

/// A filter that could not be built or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The list is not well formed.
    #[error("build the system call filter of {role}")]
    Build {
        /// Thread role.
        role: &'static str,
        /// Why.
        source: seccompiler::BackendError,
    },
    /// The kernel refused it.
    #[error("install the system call filter of {role}")]
    Install {
        /// Thread role.
        role: &'static str,
        /// Why.
        source: seccompiler::Error,
    },
}

/// Restricts the calling thread, and the threads it starts, to `calls`, for good.
///
/// # Errors
/// When the filter cannot be built or the kernel refuses it.
pub fn install(role: &'static str, calls: &[&[Allow]]) -> Result<(), SeccompError> {
    let starts_threads = calls.iter().copied().flatten().any(|call| matches!(call, Allow::Call(libc::SYS_clone3)));
    if starts_threads {
        let unknown = failing(role, &[libc::SYS_clone3], libc::ENOSYS)?;
        seccompiler::apply_filter(&unknown).map_err(|source| SeccompError::Install { role, source })?;
    }
    let program = build(calls).map_err(|source| SeccompError::Build { role, source })?;
    seccompiler::apply_filter(&program).map_err(|source| SeccompError::Install { role, source })
}

/// Refuses `calls` to all threads of the process and all that they start, as if a right were missing, for good.
///
/// # Errors
/// When the filter cannot be built or the kernel refuses it.
pub fn refuse(role: &'static str, calls: &[i64]) -> Result<(), SeccompError> {
    // The same calls have other numbers with 32-bit pointers, where the kernel knows these.
    let calls: Vec<i64> = calls.iter().flat_map(|call| [*call, *call | X32_CALL]).collect();
    let program = failing(role, &calls, libc::EPERM)?;
    seccompiler::apply_filter_all_threads(&program).map_err(|source| SeccompError::Install { role, source })
}

/// A filter by which `calls` fail with an error, and nothing else.
fn failing(role: &'static str, calls: &[i64], errno: i32) -> Result<BpfProgram, SeccompError> {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let action = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(|source| SeccompError::Build { role, source })
}

fn build(calls: &[&[Allow]]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls.iter().copied().flatten() {
        match *call {
            Allow::Call(number) => {
                rules.insert(number, Vec::new());
            }
            Allow::CallWith(number, argument, values) => {
                for value in values {
                    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
                    rules.entry(number).or_default().push(SeccompRule::new(vec![condition])?);
                }
            }
        }
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What any thread of the Rust runtime needs to end.
    const BASE: &[Allow] = &[
        Allow::Call(libc::SYS_exit),
        Allow::Call(libc::SYS_exit_group),
        Allow::Call(libc::SYS_futex),
        Allow::Call(libc::SYS_munmap),
        Allow::Call(libc::SYS_madvise),
        Allow::Call(libc::SYS_sigaltstack),
        Allow::Call(libc::SYS_rt_sigprocmask),
        Allow::Call(libc::SYS_write),
    ];

    #[test]
    fn a_call_that_is_not_listed_is_in_no_filter() {
        let with = build(&[BASE, &[Allow::Call(libc::SYS_getppid)]]).unwrap();
        let without = build(&[BASE]).unwrap();
        assert!(with.len() > without.len());
    }

    #[test]
    fn what_is_refused_fails_and_the_rest_goes_on() {
        let (ask, asked) = std::sync::mpsc::channel();
        let before = std::thread::spawn(move || asked.recv().map(|()| nix::unistd::sethostname("caisson-test").unwrap_err()));
        refuse("a test", &[libc::SYS_sethostname]).unwrap();
        ask.send(()).unwrap();
        assert_eq!(before.join().unwrap(), Ok(nix::errno::Errno::EPERM));
    }

    #[test]
    fn an_argument_restriction_becomes_a_rule() {
        let program = build(&[&[Allow::CallWith(libc::SYS_ioctl, 1, &[0xae80, 0xae81])]]).unwrap();
        assert!(program.iter().any(|insn| insn.k == 0xae80) && program.iter().any(|insn| insn.k == 0xae81));
    }
}
