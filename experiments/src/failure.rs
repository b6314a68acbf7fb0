//! How a command fails: one line that says what to do, and whose mistake it was.

use std::fmt;

/// The result of a command.
pub type Outcome<T> = Result<T, Failure>;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    error: anyhow::Error,
    user: bool,
}

impl Failure {
    /// A mistake that the user can mend: exit code 2.
    pub fn user(message: impl Into<String>) -> Self {
        Self { error: anyhow::anyhow!(message.into()), user: true }
    }

    /// The same with the thing it is of before it.
    pub fn of(self, thing: &str) -> Self {
        Self { error: self.error.context(thing.to_string()), ..self }
    }

    /// 2 for the user's mistake, 1 for ours.
    pub fn exit_code(&self) -> u8 {
        if self.user { 2 } else { 1 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl From<grpo::Error> for Failure {
    fn from(error: grpo::Error) -> Self {
        // The library's messages already carry their causes.
        Self { user: error.is_users(), error: anyhow::anyhow!(error.to_string()) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, user: false }
    }
}

impl From<grpo::BoxError> for Failure {
    fn from(error: grpo::BoxError) -> Self {
        Self { error: anyhow::anyhow!(error.to_string()), user: true }
    }
}
