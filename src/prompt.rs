//! What a policy is asked for: a clean caption and the data set's own columns.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// A caption as a person wrote it, never with template tokens, and whatever columns came with it.
///
/// ```
/// use grpo::Prompt;
/// let prompt = Prompt::new("two red squares").with("count", 2);
/// let count: usize = prompt.column("count")?;
/// assert_eq!(count, 2);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// The caption that rewards judge against.
    pub text: String,
    /// Every other column of the data set, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: BTreeMap<String, Value>,
}

impl Prompt {
    /// A prompt without columns.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), columns: BTreeMap::new() }
    }

    /// Adds a column.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.columns.insert(name.into(), value.into());
        self
    }

    /// A column as the type the reward wants; the error names the column, its value and the columns there are.
    pub fn column<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.columns.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.columns.keys().map(String::as_str).collect();
            Error::Column(format!("prompt `{}` has no column `{name}`; its columns are {known:?}", self.text))
        })?;
        T::deserialize(value)
            .map_err(|error| Error::Column(format!("column `{name}` of prompt `{}` is {value}: {error}", self.text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_column_names_those_there_are() {
        let error = Prompt::new("a cat").with("count", 1).column::<u32>("colour").unwrap_err().to_string();
        assert_eq!(error, r#"prompt `a cat` has no column `colour`; its columns are ["count"]"#);
    }

    #[test]
    fn a_column_of_another_type_names_the_value() {
        let error = Prompt::new("a cat").with("count", "many").column::<u32>("count").unwrap_err().to_string();
        assert!(error.contains("\"many\"") && error.contains("u32"), "{error}");
    }
}
