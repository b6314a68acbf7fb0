//! Benchmarks' results in one form: what was asked for, what was there, what failed, and the numbers.
//!
//! A number that leaves out what could not be judged looks better than it is, so every [`Report`] names the images
//! that are missing or failed, and gives the score with those counted as wrong beside the score of the rest.

mod files;
mod markdown;

use std::collections::BTreeMap;

use serde::Serialize;

#[cfg(feature = "onnx")]
pub(crate) use files::{check_inside, sha256_once};
pub use files::{sampler_settings, sha256};

/// What a benchmark found, and on what.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The benchmark's name.
    pub benchmark: String,
    /// Which of the benchmark's ways of counting.
    pub mode: String,
    /// The published number, over what could be judged; `None` where nothing could.
    pub overall: Option<f64>,
    /// The same with every image of [`Report::missing`] and [`Report::failed`] counted as wrong; `None` where the benchmark has no
    /// number for a wrong image.
    pub pessimistic: Option<f64>,
    /// The parts of the number, in the benchmark's order.
    pub rows: Vec<Row>,
    /// How many images.
    pub images: Counts,
    /// The images that should be there and are not; GenEval's are those of the folders there, and a note says which
    /// share of its prompts has one.
    pub missing: Vec<String>,
    /// The images that could not be judged.
    pub failed: Vec<FailedImage>,
    /// What a reader must know to compare the number.
    pub notes: Vec<String>,
    /// The files that judged, by name, with their SHA-256.
    pub models: BTreeMap<String, String>,
    /// How the images were drawn, where their folder says it.
    pub sampler: Option<serde_json::Value>,
    /// The programs that computed the numbers.
    pub versions: BTreeMap<String, String>,
}

/// One part of a number: a task, a category, a style.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Row {
    /// Which table it belongs to; empty where the benchmark has one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// The task, category or style.
    pub name: String,
    /// The number.
    pub score: f64,
    /// The number with images that are missing or failed counted as wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pessimistic: Option<f64>,
    /// A spread, where the benchmark prints one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<f64>,
    /// How many images or answers it is a mean over.
    pub n: usize,
}

impl Row {
    /// A number over `n` images or answers.
    pub fn new(name: impl Into<String>, score: f64, n: usize) -> Self {
        Self { name: name.into(), score, n, ..Self::default() }
    }
}

/// How many images were asked for, found and judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// As many as the benchmark asks for.
    pub expected: usize,
    /// As many as there are.
    pub found: usize,
    /// As many as were judged.
    pub scored: usize,
}

/// An image that could not be judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailedImage {
    /// Its file, from the folder of images.
    pub image: String,
    /// Why.
    pub reason: String,
}

impl FailedImage {
    /// An image with the error that it met.
    pub fn new(image: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self { image: image.into(), reason: reason.to_string() }
    }
}

impl Report {
    /// A report without numbers yet.
    pub fn new(benchmark: &str, mode: &str) -> Self {
        let versions = [("grpo-rewards".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into();
        Self { benchmark: benchmark.into(), mode: mode.into(), versions, ..Self::default() }
    }
}

/// The mean; `None` of nothing.
pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
