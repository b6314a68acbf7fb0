//! One line of GenEval's `evaluation_metadata.jsonl`, as a type and as columns of a prompt.

use std::fmt;

use grpo::{Error, Prompt, Result};
use serde::{Deserialize, Serialize};

/// What a picture must and must not hold, with the caption that asks for it.
///
/// ```
/// use grpo_rewards::geneval::{Metadata, Tag};
///
/// let line = r#"{"tag": "counting", "include": [{"class": "clock", "count": 4}],
///                "exclude": [{"class": "clock", "count": 5}], "prompt": "a photo of four clocks"}"#;
/// let metadata: Metadata = serde_json::from_str(line)?;
/// assert_eq!(metadata.tag, Tag::Counting);
/// assert_eq!(Metadata::from_prompt(&metadata.to_prompt()?)?, metadata);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The task it belongs to.
    pub tag: Tag,
    /// All of these must be there.
    pub include: Vec<Include>,
    /// None of these may be there; `count` is the number that is already too many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<Include>,
    /// The caption.
    pub prompt: String,
}

/// A number of objects of one class, perhaps of one colour and in a relation to an earlier entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Include {
    /// The class's name, as the detector says it.
    pub class: String,
    /// How many.
    pub count: usize,
    /// The colour that all of them have, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color: Option<String>,
    /// The relation to the objects of an earlier entry, and that entry's index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<(Relation, usize)>,
}

impl Include {
    /// Objects of a class, of any colour and at any place.
    pub fn new(class: impl Into<String>, count: usize) -> Self {
        Self { class: class.into(), count, color: None, position: None }
    }
}

/// The six tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tag {
    /// One object of a class.
    SingleObject,
    /// Two objects of two classes.
    TwoObject,
    /// So many of a class, and no more.
    Counting,
    /// One object of a class and colour.
    Colors,
    /// Two objects, one in a relation to the other.
    Position,
    /// Two objects, each with its colour.
    ColorAttr,
}

impl Tag {
    /// All six, in the order of the published tables.
    pub const ALL: [Self; 6] =
        [Self::SingleObject, Self::TwoObject, Self::Counting, Self::Colors, Self::Position, Self::ColorAttr];

    /// The name in the metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleObject => "single_object",
            Self::TwoObject => "two_object",
            Self::Counting => "counting",
            Self::Colors => "colors",
            Self::Position => "position",
            Self::ColorAttr => "color_attr",
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where one object stands from another; the vertical axis points down, as in images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Relation {
    /// At a smaller x.
    #[serde(rename = "left of")]
    LeftOf,
    /// At a larger x.
    #[serde(rename = "right of")]
    RightOf,
    /// At a smaller y.
    #[serde(rename = "above")]
    Above,
    /// At a larger y.
    #[serde(rename = "below")]
    Below,
}

impl Relation {
    /// All four.
    pub const ALL: [Self; 4] = [Self::LeftOf, Self::RightOf, Self::Above, Self::Below];

    /// The words in captions and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeftOf => "left of",
            Self::RightOf => "right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    /// The same arrangement seen from the other object.
    #[must_use]
    pub fn opposite(self) -> Self {
        match self {
            Self::LeftOf => Self::RightOf,
            Self::RightOf => Self::LeftOf,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Metadata {
    /// The caption with the columns `tag`, `include` and `exclude`.
    pub fn to_prompt(&self) -> Result<Prompt> {
        self.check()?;
        let column = |name: &str, value: serde_json::Result<serde_json::Value>| {
            value.map_err(|error| Error::Column(format!("column `{name}` of prompt `{}`: {error}", self.prompt)))
        };
        Ok(Prompt::new(&self.prompt)
            .with("tag", column("tag", serde_json::to_value(self.tag))?)
            .with("include", column("include", serde_json::to_value(&self.include))?)
            .with("exclude", column("exclude", serde_json::to_value(&self.exclude))?))
    }

    /// Reads the columns back; `exclude` may be missing.
    pub fn from_prompt(prompt: &Prompt) -> Result<Self> {
        let exclude = match prompt.columns.contains_key("exclude") {
            true => prompt.column("exclude")?,
            false => Vec::new(),
        };
        let (tag, include) = (prompt.column("tag")?, prompt.column("include")?);
        let metadata = Self { tag, include, exclude, prompt: prompt.text.clone() };
        metadata.check()?;
        Ok(metadata)
    }

    /// A position must name an earlier entry: the rules read the entries in order.
    pub(super) fn check(&self) -> Result<()> {
        let late = self.include.iter().enumerate().find_map(|(row, include)| {
            include.position.filter(|&(_, target)| target >= row).map(|(_, target)| (row, target))
        });
        match late {
            None => Ok(()),
            Some((row, target)) => Err(Error::Column(format!(
                "entry {row} of column `include` of prompt `{}` stands in relation to entry {target}; \
                 name an entry before {row}",
                self.prompt
            ))),
        }
    }
}
