//! Panics of other people's parsers, turned into errors that name the file.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use grpo::{Error, Result};

/// Runs what may panic on a damaged file; nothing it had in hand is used afterwards.
pub(crate) fn guarded<T>(path: &Path, call: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(call).unwrap_or_else(|text| {
        let message = format!("its reader gave up in a panic ({text}); the file is damaged, so copy or export it anew");
        Err(Error::file(path, message))
    })
}

/// What the call gives, or the text of its panic.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_names_the_file() {
        let fails = || -> Result<()> { panic!("no helper {}", 7) };
        let error = guarded(Path::new("folder/tokenizer.json"), fails).unwrap_err().to_string();
        assert!(error.starts_with("folder/tokenizer.json: ") && error.contains("(no helper 7)"), "{error}");
    }
}
