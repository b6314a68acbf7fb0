//! `reward.toml`: what a folder of ONNX files is, and which files exactly.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

use super::NetworkScorer;
use super::guard::guarded;
use crate::clip::ClipScorer;
use crate::ocr::OcrScorer;

/// The manifest's name in every folder.
pub(super) const FILE: &str = "reward.toml";
/// The only version of the format there is.
const FORMAT: u32 = 1;
/// Hashes of a few dozen files fit many times.
const MAX_BYTES: u64 = 1 << 20;

/// The contents of `reward.toml`.
///
/// ```toml
/// format = 1
/// name = "clip"
/// [scorer.clip]
/// image = "image.onnx"
/// text = "text.onnx"
/// image_size = 224
/// preprocess = "pil-bicubic"
/// embed_dim = 1024
/// logit_scale = 100.0
/// precision = "fp32"
/// [files]
/// "image.onnx" = "0123…"
/// "text.onnx" = "4567…"
/// [provenance]
/// command = "…"
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the format, 1.
    pub format: u32,
    /// The reward's name in logs and panels.
    pub name: String,
    /// How the networks make a score.
    pub scorer: Scorer,
    /// The sha256 of every file that is read, by its path inside the folder.
    pub files: BTreeMap<String, String>,
    /// How the files were made: command, versions, parity; free form, never read here.
    #[serde(default)]
    pub provenance: serde_json::Value,
}

/// How the networks of a folder make a score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scorer {
    /// The cosine between the embeddings of CLIP's two towers.
    Clip(ClipScorer),
    /// Any other networks from a picture to a number.
    Network(NetworkScorer),
    /// A detector and a recogniser of text.
    Ocr(OcrScorer),
}

impl Manifest {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let read = |path: &Path| {
            let length = std::fs::metadata(path)?.len();
            if length > MAX_BYTES {
                return Err(std::io::Error::other(format!("{length} bytes long; at most {MAX_BYTES} are read")));
            }
            std::fs::read_to_string(path)
        };
        let text = read(path).map_err(|error| {
            Error::file(path, format!("{error}; a reward's folder holds {FILE} beside its .onnx files"))
        })?;
        Self::parse(path, &text)
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        /// The version is looked at first: a later one has fields that would be called unknown.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let fault = |error: toml::de::Error| Error::file(path, error.to_string().trim_end());
        let Version { format } = guarded(path, || toml::from_str(text).map_err(fault))?;
        if format != FORMAT {
            return Err(Error::file(path, format!("format is {format}; this program reads format {FORMAT}")));
        }
        let manifest: Self = guarded(path, || toml::from_str(text).map_err(fault))?;
        manifest.check().map_err(|message| Error::file(path, message))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.name.trim().is_empty() {
            return Err("name is empty; give the name that logs shall show".into());
        }
        for (file, sha256) in &self.files {
            check_name(file).map_err(|fault| format!("[files] lists `{file}`, {fault}"))?;
            if sha256.len() != 64 || !sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(format!(
                    "[files] gives `{file}` the sha256 `{sha256}`; 64 lower-case hex digits are meant"
                ));
            }
        }
        match &self.scorer {
            Scorer::Clip(clip) => clip.check(),
            Scorer::Network(network) => network.check(),
            Scorer::Ocr(ocr) => ocr.check(),
        }
    }

    /// That a file may be read: it is listed, so it was verified.
    pub(super) fn check_listed(&self, file: &str) -> Result<(), String> {
        if self.files.contains_key(file) {
            return Ok(());
        }
        let listed: Vec<&String> = self.files.keys().collect();
        Err(format!("`{file}` is read, but [files] lists {listed:?}; list it with its sha256"))
    }
}

/// That a name stays inside the folder it is joined to.
pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    let plain = |part| matches!(part, Component::Normal(_));
    if name.is_empty() || name.contains(['\\', '\0', ':']) || !Path::new(name).components().all(plain) {
        return Err("which does not stay inside the folder; name a file below it, without `..`");
    }
    Ok(())
}
