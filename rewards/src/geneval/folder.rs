//! The published layout of images: `DIR/00000/metadata.jsonl` and `DIR/00000/samples/0000.png`, four images a prompt.

use std::path::{Path, PathBuf};

use grpo::{Error, Result};

use super::metadata::Metadata;

/// One prompt's folder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PromptFolder {
    /// The folder's name, digits.
    pub name: String,
    /// What its images should show.
    pub metadata: Metadata,
    /// The files in `samples` whose names are digits and `.png`, in the order of the names.
    pub images: Vec<PathBuf>,
}

impl PromptFolder {
    /// An image's name from the folder of images, with slashes on every system.
    pub fn image_name(&self, image: &Path) -> String {
        let file = image.file_name().unwrap_or_default().to_string_lossy();
        format!("{}/samples/{file}", self.name)
    }
}

/// Reads a folder of images; folders whose names are not digits are none of the benchmark's.
///
/// A folder without a readable `metadata.jsonl` is an error, for nothing says what its images should show; a folder
/// without images is not.
pub fn read_folders(dir: &Path) -> Result<Vec<PromptFolder>> {
    let mut names = entries(dir)?;
    names.retain(|name| is_digits(name) && dir.join(name).is_dir());
    names.sort_by_cached_key(|name| (name.len(), name.clone()));
    if names.is_empty() {
        let layout = "expected DIR/00000/metadata.jsonl and DIR/00000/samples/0.png";
        return Err(Error::file(dir, format!("no folder in it is named by digits; {layout}")));
    }
    names.into_iter().map(|name| read_folder(dir, name)).collect()
}

fn read_folder(dir: &Path, name: String) -> Result<PromptFolder> {
    let path = dir.join(&name).join("metadata.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    let bad =
        |error: &dyn std::fmt::Display| Error::file(&path, format!("{error}; give one line of GenEval's metadata"));
    let metadata: Metadata = serde_json::from_str(&text).map_err(|error| bad(&error))?;
    metadata.check().map_err(|error| bad(&error))?;
    let samples = dir.join(&name).join("samples");
    let mut images = if samples.is_dir() { entries(&samples)? } else { Vec::new() };
    images.retain(|image| image.strip_suffix(".png").is_some_and(is_digits) && samples.join(image).is_file());
    images.sort_by_cached_key(|image| (image.len(), image.clone()));
    let images = images.into_iter().map(|image| samples.join(image)).collect();
    Ok(PromptFolder { name, metadata, images })
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The names in a folder that are text; others are nobody's.
fn entries(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::file(dir, error);
    let names = std::fs::read_dir(dir).map_err(failed)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names: std::io::Result<Vec<Option<String>>> = names.collect();
    Ok(names.map_err(failed)?.into_iter().flatten().collect())
}
