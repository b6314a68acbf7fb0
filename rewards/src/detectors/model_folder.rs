//! A folder whose files are the ones that were meant.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use grpo::{Error, Result};

use crate::evaluation::{check_inside, sha256};
use crate::onnx::external_files;

/// Checks every file of `SHA256SUMS` and gives the path of `model.onnx`, which must be among them, as must any file that
/// holds its weights.
pub(super) fn verified_model(folder: &Path) -> Result<PathBuf> {
    let sums = folder.join("SHA256SUMS");
    let remedy = "make it with `sha256sum model.onnx > SHA256SUMS` from files that you trust";
    let text = std::fs::read_to_string(&sums).map_err(|error| Error::file(&sums, format!("{error}; {remedy}")))?;
    let mut names = BTreeSet::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let Some((wanted, name)) = line.split_once("  ") else {
            return Err(Error::file(&sums, format!("`{line}` is no line of sha256sum; {remedy}")));
        };
        if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(Error::file(&sums, format!("`{name}` is not the name of a file beside it")));
        }
        let path = folder.join(name);
        check_inside(folder, &path).map_err(|error| Error::file(&path, error))?;
        let found = sha256(&path)?;
        if found != wanted {
            let remedy = "copy it anew, or make it again";
            return Err(Error::file(&path, format!("SHA-256 is {found}, {} says {wanted}; {remedy}", sums.display())));
        }
        names.insert(name.to_string());
    }
    if !names.contains("model.onnx") {
        return Err(Error::file(&sums, format!("it does not name model.onnx; {remedy}")));
    }
    let model = folder.join("model.onnx");
    let graph = std::fs::read(&model).map_err(|error| Error::file(&model, error))?;
    match external_files(&model, &graph)?.into_iter().find(|location| !names.contains(location)) {
        None => Ok(model),
        Some(location) => {
            let message = format!("its weights lie in `{location}`, which {} does not name", sums.display());
            Err(Error::file(&model, message))
        }
    }
}
