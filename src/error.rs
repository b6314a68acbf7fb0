//! What can go wrong, and whose it was: every error names the thing, the value and the remedy.

use std::path::PathBuf;

/// The error a researcher's own code returns: anything that `?` accepts.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The result of this library's constructors and functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure attributed to the part that caused it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that cannot be meant; the message says which value to take.
    #[error("{0}")]
    Config(String),
    /// A data-set column that a reward asked for is missing or of another type.
    #[error("{0}")]
    Column(String),
    /// A reward failed, or returned scores that cannot be used.
    #[error("reward `{name}`: {message}")]
    Reward {
        /// The reward's own name.
        name: String,
        /// What it did, for which prompt and row.
        message: String,
        /// The reward's error, where it returned one.
        source: Option<BoxError>,
    },
    /// The policy failed in one of its duties.
    #[error("policy: {action}: {source}")]
    Policy {
        /// What the policy was asked for.
        action: &'static str,
        /// The policy's error.
        source: BoxError,
    },
    /// The policy cannot be trained as it stands; found before the first step.
    #[error("self-check before training: {0}")]
    SelfCheck(String),
    /// An implementation of one of the traits does what it must not; found by the testing kit.
    #[error("{what} breaks its contract: {message}")]
    Contract {
        /// The policy or the reward.
        what: String,
        /// What it did, and where.
        message: String,
    },
    /// A loss or a gradient that is not finite; the update it was for was not taken.
    #[error("{0}")]
    NotFinite(String),
    /// Too many updates in a row were not finite.
    #[error("training has diverged: {0}")]
    Diverged(String),
    /// A checkpoint that cannot be written or read.
    #[error("checkpoint {}: {message}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A file that cannot be opened, read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// Two shapes that should agree do not.
    #[error("{what} has shape {got:?}; expected {expected:?}")]
    Shape {
        /// The tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// The shape it must have.
        expected: Vec<usize>,
    },
    /// An operation of the tensor library failed.
    #[error("tensor: {0}")]
    Tensor(#[from] candle_core::Error),
    /// An observer failed to record a step.
    #[error("observer: {0}")]
    Observer(BoxError),
}

impl Error {
    /// A [`Error::Config`] from anything printable.
    pub fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }

    /// A [`Error::File`] from an IO error, or any other that can be printed.
    pub fn file(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), message: message.to_string() }
    }

    /// A [`Error::Checkpoint`] with its remedy.
    pub fn checkpoint(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.into(), message: message.into() }
    }

    /// Attributes a reward's own error to it.
    pub fn reward(name: &str, source: BoxError) -> Self {
        Self::Reward { name: name.into(), message: source.to_string(), source: Some(source) }
    }

    /// Attributes a policy's own error to what it was asked for.
    pub fn policy(action: &'static str, source: BoxError) -> Self {
        Self::Policy { action, source }
    }

    /// Whether the user can mend this (exit code 2) or we must (exit code 1).
    pub fn is_users(&self) -> bool {
        !matches!(self, Self::Tensor(_) | Self::Shape { .. } | Self::Observer(_))
    }
}
