//! What is wrong with a configuration.

use super::{ANNOTATION_PREFIX, KEYS};

/// What is wrong with a configuration, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML.
    #[error("{origin}: {cause}")]
    Syntax {
        /// File.
        origin: String,
        /// The parser's words, on one line.
        cause: String,
    },
    /// No such setting.
    #[error("{origin}: unknown key {key}; known keys are {}", known_keys())]
    UnknownKey {
        /// File or annotation.
        origin: String,
        /// As written.
        key: String,
    },
    /// Of the wrong type or out of limits.
    #[error("{origin}: {key} = {value} is not allowed; allowed is {allowed}")]
    BadValue {
        /// File or annotation.
        origin: String,
        /// The setting.
        key: String,
        /// As written.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A pod of one tenant that says it is of another.
    #[error("annotation {ANNOTATION_PREFIX}tenant.name is {asked:?}, and the configuration has the pod belong to {tenant:?}")]
    OfAnother {
        /// By the annotation.
        asked: String,
        /// By the configuration.
        tenant: String,
    },
    /// The configuration does not let pods set this.
    #[error("annotation {ANNOTATION_PREFIX}{key} is not allowed on this host; annotations.allowed lists {allowed}")]
    NotAllowed {
        /// The setting.
        key: String,
        /// What the configuration allows.
        allowed: String,
    },
}

fn known_keys() -> String {
    KEYS.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")
}
