//! Acting as another user, one thread alone (credentials(7), "NPTL" in setresuid(2)).
#![expect(unsafe_code, reason = "the C library changes the user of all threads at once")]

use std::io;

use nix::errno::Errno;

/// Does something on a thread of its own whose effective user is `user`, and which has no capability meanwhile.
///
/// What the kernel counts by user is then counted for that one.
///
/// # Errors
/// When no thread can be started, or we may not become that user.
pub fn as_user<T: Send>(user: u32, act: impl FnOnce() -> T + Send) -> io::Result<T> {
    const SAME: libc::uid_t = libc::uid_t::MAX;
    std::thread::scope(|scope| {
        let acts = std::thread::Builder::new().spawn_scoped(scope, || {
            // SAFETY: the call takes numbers alone, and changes this thread alone, which ends here.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, SAME, user, SAME) })?;
            Ok(act())
        })?;
        acts.join().map_err(|_| io::Error::other("the thread ended"))?
    })
}
