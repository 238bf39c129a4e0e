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
    let program = build(calls).map_err(|source| SeccompError::Build { role, source })?;
    seccompiler::apply_filter(&program).map_err(|source| SeccompError::Install { role, source })
}

/// Refuses `calls` to all threads of the process and all that they start, as if a right were missing, for good.
///
/// # Errors
/// When the filter cannot be built or the kernel refuses it.
pub fn refuse(role: &'static str, calls: &[i64]) -> Result<(), SeccompError> {
    // The same calls have other numbers with 32-bit pointers, where the kernel knows these.
    let rules = calls.iter().flat_map(|call| [*call, *call | X32_CALL]).map(|call| (call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64);
    let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(|source| SeccompError::Build { role, source })?;
    seccompiler::apply_filter_all_threads(&program).map_err(|source| SeccompError::Install { role, source })
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
