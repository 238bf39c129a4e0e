//! Errors of the task service, and the one place where they become ttrpc codes.

use ttrpc::Code;

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such container or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is in use.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// Not possible in this state.
    #[error("{0}")]
    Precondition(String),
    /// The request, its specification or its annotations are not allowed.
    #[error("{0}")]
    Invalid(String),
    /// What we do not have.
    #[error("{0}")]
    Unimplemented(String),
    /// The virtual machine is gone.
    #[error("{0}")]
    Gone(String),
    /// It took too long.
    #[error("{0}")]
    Timeout(String),
    /// Anything else: one sentence with its causes.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// Its causes are in its words: one more context does not say them twice.
impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Of every operation on a pod.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::Precondition(_) => Code::FAILED_PRECONDITION,
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Gone(_) => Code::UNAVAILABLE,
            Error::Timeout(_) => Code::DEADLINE_EXCEEDED,
            Error::Failed(_) => Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}

/// Most characters of what somebody says whom we do not trust.
pub const MAX_SAID: usize = 4096;

/// What the guest's agent or a jailed process says, for a log and a terminal: one line of bounded length, whatever it says.
pub fn one_line(text: &str) -> String {
    text.chars().take(MAX_SAID).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// What the agent answered, as an error of ours.
impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Gone(format!("the connection to the guest's agent broke: {error}"));
        };
        let message = one_line(status.message());
        match status.code() {
            // The variants add their own words.
            Code::NOT_FOUND => Self::NotFound(message.trim_end_matches(": not found").to_owned()),
            Code::ALREADY_EXISTS => Self::AlreadyExists(message.trim_end_matches(": already exists").to_owned()),
            Code::FAILED_PRECONDITION => Self::Precondition(message),
            Code::INVALID_ARGUMENT => Self::Invalid(message),
            Code::UNIMPLEMENTED => Self::Unimplemented(message),
            _ => Self::Failed(anyhow::Error::msg(message)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_code_and_words_through_both_hops() {
        let from_agent: ttrpc::Error = Error::NotFound("container x".into()).into();
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(Error::from(from_agent)) else { panic!("no status") };
        assert_eq!((status.code(), status.message()), (Code::NOT_FOUND, "container x: not found"));
    }
}
