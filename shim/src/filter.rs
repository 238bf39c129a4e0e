//! What the shim, and whatever it starts, may never ask of the kernel.
//!
//! A list of what it may ask could not be one: programs that others chose are started from here, as a task's logger is. So
//! this is what nobody needs who runs pods, and what gave away hosts before: loading code into the kernel, others' memory, keys,
//! clocks, and interfaces that are large and seldom used. What is asked for is refused as if the right to it were missing.

use caisson_host::seccomp::{self, SeccompError};

const REFUSED: &[i64] = &[
    // Another kernel, or more of this one.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    // The whole host's memory, accounts, clocks, log, names and terminals.
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    // Ports and segments of the processor.
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // Files without their paths.
    libc::SYS_open_by_handle_at,
    // Keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Large, and not used.
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
];

/// What only the monitor needs, and only where disks are to have rings.
const RINGS: &[i64] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Restricts the process, and all that it starts. Nobody who runs a program from here on gets new privileges by that.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> Result<(), SeccompError> {
    seccomp::refuse("the shim", REFUSED)
}

/// Restricts it further, once it is known that disks are to have no rings.
///
/// # Errors
/// When the kernel refuses.
pub fn refuse_rings() -> Result<(), SeccompError> {
    seccomp::refuse("the shim", RINGS)
}
