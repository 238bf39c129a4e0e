//! The requests of a queue that are under way: in a ring as many as that has room for, without one none, as each is answered
//! when it is started.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::backing::Backing;
use super::request::Request;
use super::ring::{DEPTH, Ring};

/// Requests under way.
pub struct UnderWay<'r, 'm> {
    ring: Option<&'r mut Ring>,
    /// By their keys.
    started: Vec<Option<Started<'m>>>,
    count: u32,
}

struct Started<'m> {
    head: u16,
    request: Request<'m>,
    /// What the kernel has of it, which stays where it is.
    vectors: Vec<libc::iovec>,
}

impl<'r, 'm> UnderWay<'r, 'm> {
    /// None yet.
    pub fn new(ring: Option<&'r mut Ring>) -> Self {
        Self { ring, started: Vec::new(), count: 0 }
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether each is answered when it is started.
    pub const fn is_at_once(&self) -> bool {
        self.ring.is_none()
    }

    /// Whether there may be one more.
    pub const fn has_room(&self) -> bool {
        self.count < DEPTH
    }

    /// Readable while there are some that have ended.
    pub fn ended(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|ring| ring.as_raw_fd())
    }

    /// Starts a request; when it is answered already, returns how many bytes were written.
    pub fn start(&mut self, backing: &Backing, head: u16, mut request: Request<'m>) -> Option<u32> {
        backing.pay(request.bytes());
        let Some(ring) = self.ring.as_mut() else { return Some(request.answer(backing)) };
        let key = self.started.iter().position(Option::is_none).unwrap_or(self.started.len());
        let Some(vectors) = request.start(backing, ring, key as u64) else { return Some(request.answer(backing)) };
        if key == self.started.len() {
            self.started.push(None);
        }
        self.started[key] = Some(Started { head, request, vectors });
        self.count += 1;
        None
    }

    /// Hands the kernel what was started; whether that was something.
    ///
    /// # Errors
    /// When it does not take it now.
    pub fn submit(&mut self) -> io::Result<bool> {
        self.ring.as_mut().map_or(Ok(false), |ring| ring.submit())
    }

    /// The next request that has ended: its head, and how many bytes were written.
    pub fn next_ended(&mut self, backing: &Backing) -> Option<(u16, u32)> {
        let (key, result) = self.ring.as_mut()?.next_ended()?;
        let Started { head, mut request, vectors } = self.started.get_mut(key as usize)?.take()?;
        self.count -= 1;
        let wanted: usize = vectors.iter().map(|vector| vector.iov_len).sum();
        let written = match usize::try_from(result) {
            Ok(done) if done == wanted => request.finish(Ok(())),
            // Linux tells of an error in writing out once: who asks again hears of none.
            Err(_) if wanted == 0 => request.finish(Err(io::Error::from_raw_os_error(-result))),
            // Of what the kernel did in part, or could not do so, the other way says what becomes of it.
            _ => request.answer(backing),
        };
        Some((head, written))
    }
}
