//! A control socket as the daemon waits for it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use caisson_host::control::Control;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

/// One end of a control socket, watched by the runtime.
pub struct Channel(AsyncFd<Control>);

impl Channel {
    /// Has the runtime watch it.
    ///
    /// # Errors
    /// When it cannot be watched.
    #[expect(unsafe_code, reason = "the runtime wants a promise that the descriptor stays the same")]
    pub fn new(control: Control) -> io::Result<Self> {
        // SAFETY: Control owns its descriptor, keeps it for life and always returns the same one.
        unsafe { AsyncFd::register(control) }.map(Self).map_err(Into::into)
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// When the other side is gone.
    pub async fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|control| control.get_ref().send(message, fds, false)) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// The next message; `None` when the other side is gone.
    ///
    /// # Errors
    /// `InvalidData` for a message that is not what was expected.
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        self.when_ready(|control| control.receive(false)).await
    }

    /// The next connection to a listening socket.
    ///
    /// # Errors
    /// The socket's.
    pub async fn accept(&self) -> io::Result<Control> {
        self.when_ready(Control::accept).await
    }

    async fn when_ready<T>(&self, take: impl Fn(&Control) -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|control| take(control.get_ref())) {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}
