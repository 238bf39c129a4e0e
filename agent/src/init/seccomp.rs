//! A container's seccomp profile, as the kernel's filter.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator};

/// What a refused call returns unless the profile says otherwise.
const DEFAULT_ERRNO: u32 = libc::EPERM.unsigned_abs();
/// Filters as binary trees: profiles have hundreds of rules, and every call runs them.
const OPTIMIZE_TREE: u32 = 2;

/// Loads a profile into the calling process.
///
/// # Errors
/// What of the profile cannot be enforced: a profile is never loaded in part.
pub fn load(profile: &LinuxSeccomp) -> Result<()> {
    compile(profile)?.load().context("load the seccomp profile")
}

fn compile(profile: &LinuxSeccomp) -> Result<ScmpFilterContext> {
    ensure!(profile.listener_path().is_none(), "seccomp.listenerPath is not supported: there is no listener in the guest");
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).context("make a seccomp filter")?;
    // Whether new privileges are allowed is the process's own setting.
    filter.set_ctl_nnp(false).context("prepare the seccomp filter")?;
    filter.set_ctl_optimize(OPTIMIZE_TREE).context("prepare the seccomp filter")?;
    for flag in profile.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true),
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true),
            // There is one thread.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(&mut filter),
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                bail!("seccomp flag {flag} is not supported: there is no listener")
            }
        }
        .with_context(|| format!("set the seccomp flag {flag}"))?;
    }
    for arch in profile.architectures().iter().flatten() {
        let arch = ScmpArch::from_str(&arch.to_string()).with_context(|| format!("seccomp architecture {arch}"))?;
        filter.add_arch(arch).with_context(|| format!("add the seccomp architecture {arch:?}"))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            // The library refuses a rule that changes nothing.
            continue;
        }
        for name in rule.names() {
            // A call that this library does not know cannot be made to mean anything else than the default.
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            add_rule(&mut filter, action, syscall, rule.args().as_deref().unwrap_or_default())
                .with_context(|| format!("add the seccomp rule of {name}"))?;
        }
    }
    Ok(filter)
}

fn add_rule(filter: &mut ScmpFilterContext, action: ScmpAction, syscall: ScmpSyscall, arguments: &[LinuxSeccompArg]) -> Result<()> {
    let mut compared: Vec<ScmpArgCompare> = Vec::new();
    let repeated = arguments.iter().enumerate().any(|(at, one)| arguments[..at].iter().any(|other| other.index() == one.index()));
    for argument in arguments {
        let index = u32::try_from(argument.index()).context("argument index")?;
        let (operator, value) = match argument.op() {
            LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
            LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
            LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
            LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
            LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
            LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
            LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(argument.value()), argument.value_two().unwrap_or(0)),
        };
        compared.push(ScmpArgCompare::new(index, operator, value));
    }
    if repeated {
        // One argument compared twice in a rule means either, as other runtimes read it: a rule each.
        for one in compared {
            filter.add_rule_conditional(action, syscall, &[one])?;
        }
    } else {
        filter.add_rule_conditional(action, syscall, &compared)?;
    }
    Ok(())
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno.unwrap_or(DEFAULT_ERRNO);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).context("seccomp errnoRet")?),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => bail!("seccomp action {action} is not supported: there is no listener in the guest"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(text: &str) -> Result<ScmpFilterContext> {
        compile(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn a_profile_with_several_actions_and_unknown_calls_compiles() {
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "flags":["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls":[{"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                            {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
                            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
                            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#,
        );
        assert!(filter.unwrap().get_ctl_log().unwrap());
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        let error = compiled(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_NOTIFY"), "{error}");
        assert!(compiled(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}"#).is_err());
    }
}
