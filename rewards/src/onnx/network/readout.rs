//! From what the networks made to one number.

use std::path::PathBuf;

use grpo::{Error, Prompt, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::onnx::Folder;

/// How a score is read from the values of the stages, one row of each for a sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Readout {
    /// The only number of a row.
    Scalar(String),
    /// One number of a row, counted from 0.
    Column {
        /// The value.
        value: String,
        /// Which number.
        index: usize,
    },
    /// The probability of one class, where a row holds logits.
    Softmax {
        /// The value.
        value: String,
        /// Which class.
        class: Class,
    },
    /// The cosine between the rows of two values.
    Cosine([String; 2]),
}

/// Which class of a [`Readout::Softmax`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Class {
    /// The same for every prompt, counted from 0.
    Index(usize),
    /// The one that a column of the prompt names: a label as the file has it, or its number counted from 0.
    Prompt {
        /// The column.
        column: String,
        /// The labels in the order of the logits, one a line; listed in `[files]`.
        labels: String,
    },
}

/// What a score goes through at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum After {
    /// Nothing.
    #[default]
    Unchanged,
    /// `scale * score + offset`.
    Affine {
        /// The factor.
        scale: f64,
        /// What is added.
        offset: f64,
    },
    /// `(score - mean) / std`, with the figures that a model was published with.
    Standardise {
        /// The mean.
        mean: f64,
        /// The deviation.
        std: f64,
    },
}

impl After {
    pub(super) fn check(self) -> Result<(), String> {
        let (first, second) = match self {
            Self::Unchanged => return Ok(()),
            Self::Affine { scale, offset } => (scale, offset),
            Self::Standardise { std, .. } if std <= 0.0 => return Err(format!("std is {std}; give more than 0")),
            Self::Standardise { mean, std } => (mean, std),
        };
        match first.is_finite() && second.is_finite() {
            true => Ok(()),
            false => Err(format!("after holds {first} and {second}; give finite numbers")),
        }
    }

    pub(super) fn apply(self, score: f64) -> f64 {
        match self {
            Self::Unchanged => score,
            Self::Affine { scale, offset } => scale * score + offset,
            Self::Standardise { mean, std } => (score - mean) / std,
        }
    }
}

impl Readout {
    /// The values it reads.
    pub(super) fn values(&self) -> Vec<&str> {
        match self {
            Self::Scalar(value) | Self::Column { value, .. } | Self::Softmax { value, .. } => vec![value],
            Self::Cosine([first, second]) => vec![first, second],
        }
    }

    /// The labels, where a column of the prompt names one.
    pub(super) fn labels(&self, folder: &Folder) -> Result<Labels> {
        let Self::Softmax { class: Class::Prompt { labels, .. }, .. } = self else { return Ok(Labels::default()) };
        let source = folder.path_of(labels);
        let text = folder.read(labels)?;
        let text = std::str::from_utf8(&text).map_err(|error| Error::file(&source, error))?;
        let names: Vec<String> = text.lines().map(|line| line.trim().to_string()).collect();
        if names.is_empty() {
            return Err(Error::file(&source, "it holds no label; give one a line, in the order of the logits"));
        }
        Ok(Labels { source, names })
    }

    /// The score of one sample from its rows, in the order of [`Readout::values`].
    pub(super) fn read(&self, rows: &[&[f32]], prompt: &Prompt, labels: &Labels) -> Result<f64> {
        let fault = |value: &str, row: &[f32], needs: String| {
            Err(Error::config(format!("a row of `{value}` has {} numbers; {needs}", row.len())))
        };
        match (self, rows) {
            (Self::Scalar(_), [[score]]) => Ok(f64::from(*score)),
            (Self::Scalar(value), [row]) => fault(value, row, "a scalar has 1, so name a column or a class".into()),
            (Self::Column { value, index }, [row]) => match row.get(*index) {
                Some(&score) => Ok(f64::from(score)),
                None => fault(value, row, format!("column {index} is read; count from 0")),
            },
            (Self::Softmax { value, class }, [row]) => {
                let class = match class {
                    Class::Index(class) => *class,
                    Class::Prompt { column, .. } if row.len() == labels.names.len() => labels.class(prompt, column)?,
                    Class::Prompt { .. } => {
                        return fault(value, row, format!("{} holds {}", labels.source.display(), labels.names.len()));
                    }
                };
                match row.get(class) {
                    Some(_) => Ok(softmax(row, class)),
                    None => fault(value, row, format!("class {class} is read; count from 0")),
                }
            }
            (Self::Cosine(_), [first, second]) if first.len() == second.len() => Ok(crate::clip::cosine(first, second)),
            (Self::Cosine([value, other]), [first, second]) => {
                fault(value, first, format!("`{other}` has {}; a cosine needs as many", second.len()))
            }
            _ => Err(Error::config(format!("{} rows were read for {:?}", rows.len(), self.values()))),
        }
    }
}

/// The names of the classes.
#[derive(Clone, Debug, Default)]
pub(super) struct Labels {
    source: PathBuf,
    names: Vec<String>,
}

impl Labels {
    fn class(&self, prompt: &Prompt, column: &str) -> Result<usize> {
        let fault = |message: String| Error::Column(format!("column `{column}` of prompt `{}` {message}", prompt.text));
        let wanted = match prompt.column::<Value>(column)? {
            Value::String(label) => label.trim().to_string(),
            number => {
                let class = number.as_u64().and_then(|class| usize::try_from(class).ok());
                let known = class.filter(|&class| class < self.names.len());
                let limit = format!("is {number}; give a label, or a number below {}", self.names.len());
                return known.ok_or_else(|| fault(limit));
            }
        };
        let matching = |name: &String| name.eq_ignore_ascii_case(&wanted);
        let found = self.names.iter().enumerate().filter(|(_, name)| matching(name)).map(|(class, _)| class);
        let found: Vec<usize> = found.collect();
        match found[..] {
            [class] => Ok(class),
            [] => Err(fault(format!("is `{wanted}`; give a label of {}", self.source.display()))),
            _ => Err(fault(format!("is `{wanted}`, the label of classes {found:?}; give the number of one"))),
        }
    }
}

/// The probability of a class, in f64 and from the largest logit, so that nothing overflows.
fn softmax(logits: &[f32], class: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| f64::from(logit - largest).exp();
    weight(logits[class]) / logits.iter().map(|&logit| weight(logit)).sum::<f64>()
}
