//! How many descriptors the guest holds here: one for each file that its kernel remembers, and one for each that it has open.
//!
//! A guest with much memory remembers more files than a process may have open, and virtio-fs has no word by which its kernel
//! could be told to forget some. So the shim is told, at three quarters of what there may be, and its agent has the kernel
//! do it. When seven eighths are in use, requests that take a descriptor wait for that, each for a bounded time, and none
//! any more once one has waited in vain: then the guest has use for so many.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// For so long a request waits at most, from when it came.
const PATIENCE: Duration = Duration::from_secs(5);
/// While it waits, it looks, and the shim is told again, so often.
const LOOK_EVERY: Duration = Duration::from_millis(1);
const TELL_EVERY: Duration = Duration::from_millis(250);

/// The count.
pub struct Descriptors {
    limit: u64,
    used: AtomicU64,
    /// When so many are in use, the shim is told.
    tell_at: AtomicU64,
    /// Whether a request has waited in vain since there was room.
    in_vain: AtomicBool,
    /// The largest inode that the guest knows: they are numbered as they are found, and no number comes twice. Held
    /// while another is looked up, so that they are seen in that order.
    newest: Mutex<u64>,
    tell: Box<dyn Fn() + Send + Sync>,
}

impl Descriptors {
    /// For so many at most; `tell` has the guest forget what it does not use, and does not wait for that.
    pub fn new(limit: u64, tell: impl Fn() + Send + Sync + 'static) -> Self {
        let (used, tell_at, in_vain) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let new = Self { limit, used, tell_at, in_vain, newest: Mutex::new(0), tell: Box::new(tell) };
        new.begin_anew();
        new
    }

    /// Answers with a file, of the inode that `inode` reads from the answer; it takes a descriptor when the guest does not
    /// know it yet.
    ///
    /// # Errors
    /// Those of `find`.
    pub fn answer<T>(&self, find: impl FnOnce() -> io::Result<T>, inode: impl FnOnce(&T) -> u64) -> io::Result<T> {
        self.answer_or(find, inode, |_| Ok(None))
    }

    /// Answers with a file, as [`Self::answer`] does. `replace` sees each file that the guest does not know, and returns
    /// the answer that the guest gets instead, if it is another. It runs while no other file is found.
    ///
    /// # Errors
    /// Those of `find` and of `replace`.
    pub fn answer_or<T>(
        &self,
        find: impl FnOnce() -> io::Result<T>,
        inode: impl FnOnce(&T) -> u64,
        replace: impl FnOnce(&T) -> io::Result<Option<T>>,
    ) -> io::Result<T> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.mind(find())?;
        let inode = inode(&found);
        if inode <= *newest {
            return Ok(found);
        }
        *newest = inode;
        let other = self.mind(replace(&found))?;
        self.take();
        Ok(other.unwrap_or(found))
    }

    /// Does something while no file is found.
    pub fn alone<T>(&self, act: impl FnOnce() -> T) -> T {
        let _newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        act()
    }

    /// Has the guest told when a request found no descriptor left, whatever the count says: a file that was found by a
    /// request that failed after all is not in it.
    ///
    /// # Errors
    /// Those of `outcome`.
    pub fn mind<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        if outcome.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENFILE)) {
            (self.tell)();
        }
        outcome
    }

    /// Another is in use.
    pub fn take(&self) {
        let used = self.used.fetch_add(1, Ordering::Relaxed) + 1;
        if used >= self.tell_at.load(Ordering::Relaxed) {
            // Not again for each further one, where the guest has use for so many.
            self.tell_at.store(used + self.limit / 32, Ordering::Relaxed);
            (self.tell)();
        }
    }

    /// One is no more.
    pub fn give_back(&self) {
        // Never below none, whatever a guest says that it forgets.
        let used = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_sub(1));
        if used.is_ok_and(|used| used == self.limit / 8 * 5) {
            self.begin_anew();
        }
    }

    /// None is in use any more.
    pub fn clear(&self) {
        self.used.store(0, Ordering::Relaxed);
        self.begin_anew();
    }

    /// There is room: what was said and waited for until now does not count any more.
    fn begin_anew(&self) {
        self.tell_at.store(self.limit / 4 * 3, Ordering::Relaxed);
        self.in_vain.store(false, Ordering::Relaxed);
    }

    /// Whether a request that takes one had better wait.
    pub fn are_short(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.limit / 8 * 7 && !self.in_vain.load(Ordering::Relaxed)
    }

    /// Has a request wait that came at `begin`, until the guest has forgotten enough, or for a bounded time: what is tried
    /// then may find none left.
    pub fn wait(&self, begin: Instant) {
        let mut told = None::<Instant>;
        while self.are_short() {
            if begin.elapsed() > PATIENCE {
                self.in_vain.store(true, Ordering::Relaxed);
                return;
            }
            if told.is_none_or(|told| told.elapsed() > TELL_EVERY) {
                (self.tell)();
                told = Some(Instant::now());
            }
            thread::park_timeout(LOOK_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Of 64 at most, and how often the guest was told to forget.
    fn counted() -> (Descriptors, Arc<AtomicU64>) {
        let told = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&told);
        let tell = move || {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        (Descriptors::new(64, tell), told)
    }

    #[test]
    fn a_file_that_the_guest_knows_takes_none() {
        let (descriptors, _) = counted();
        for inode in [2, 3, 2, 3, 4] {
            descriptors.answer(|| Ok(inode), |inode| *inode).unwrap();
        }
        assert!(descriptors.answer(|| Err(io::ErrorKind::NotFound.into()), |inode| *inode).is_err());
        assert_eq!(descriptors.used.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn the_guest_is_told_when_many_are_used_and_again_when_it_has_forgotten_some() {
        let (descriptors, told) = counted();
        let told = || told.load(Ordering::Relaxed);
        (0..47).for_each(|_| descriptors.take());
        assert_eq!(told(), 0);
        descriptors.take();
        assert_eq!((told(), descriptors.are_short()), (1, false));
        // It has use for them.
        descriptors.take();
        assert_eq!(told(), 1);
        (0..7).for_each(|_| descriptors.take());
        assert_eq!((told(), descriptors.are_short()), (5, true));
        (0..40).for_each(|_| descriptors.give_back());
        assert!(!descriptors.are_short());
        (0..32).for_each(|_| descriptors.take());
        assert_eq!(told(), 6);
    }

    #[test]
    fn nobody_waits_after_one_that_waited_in_vain_until_there_was_room() {
        let (descriptors, _) = counted();
        (0..60).for_each(|_| descriptors.take());
        assert!(descriptors.are_short());
        descriptors.wait(Instant::now().checked_sub(PATIENCE).unwrap());
        assert!(!descriptors.are_short());
        (0..21).for_each(|_| descriptors.give_back());
        (0..21).for_each(|_| descriptors.take());
        assert!(descriptors.are_short());
    }

    #[test]
    fn a_request_that_finds_none_left_has_the_guest_told() {
        let (descriptors, told) = counted();
        let fail = |error| assert!(descriptors.mind(Err::<(), _>(io::Error::from_raw_os_error(error))).is_err());
        fail(libc::ENOENT);
        assert_eq!(told.load(Ordering::Relaxed), 0);
        fail(libc::ENFILE);
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn who_waits_goes_on_when_there_is_room() {
        let (descriptors, told) = counted();
        let descriptors = &descriptors;
        (0..60).for_each(|_| descriptors.take());
        let before = told.load(Ordering::Relaxed);
        thread::scope(|scope| {
            let begin = Instant::now();
            let waits = scope.spawn(move || {
                descriptors.wait(begin);
                begin.elapsed()
            });
            while told.load(Ordering::Relaxed) == before {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(!waits.is_finished());
            (0..40).for_each(|_| descriptors.give_back());
            assert!(waits.join().unwrap() < PATIENCE);
        });
        // A guest that forgets more than it has is none the richer.
        (0..100).for_each(|_| descriptors.give_back());
        assert_eq!(descriptors.used.load(Ordering::Relaxed), 0);
    }
}
