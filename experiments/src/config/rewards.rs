//! What a TOML file may say of rewards.

use std::collections::BTreeSet;

use grpo::{Change, Joining};
use serde::{Deserialize, Serialize};

/// One reward of a mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardSource {
    /// Cosine of CLIP's image and text embeddings: the embedded miniature, or the folder of `--scorer clip=DIR`.
    Clip(Weighed),
    /// The same of the human-preference score's.
    Hps(Weighed),
    /// Whether GenEval's rules hold, by the Shapes world's exact detector.
    Geneval(Weighed),
    /// Mean luminance.
    Brightness(Weighed),
    /// A number that says nothing: the negative control.
    Random(Weighed),
    /// Negative kilobytes as JPEG.
    Compressibility(Weighed),
    /// The scorer of `--scorer NAME=WHERE`.
    Given(GivenFile),
    /// Several rewards as one.
    Joined(JoinedFile),
}

/// How much a reward counts, and after which arithmetic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weighed {
    /// Its factor in the sum.
    pub weight: f32,
    /// What is done to its scores, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// What a sample must have before this reward counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<Box<GateFile>>,
}

impl Default for Weighed {
    fn default() -> Self {
        Self { weight: 1.0, changes: Vec::new(), gate: None }
    }
}

/// A threshold on another reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateFile {
    /// The other reward; its weight has no say.
    pub reward: RewardSource,
    /// The least score that lets a sample through.
    pub at_least: f32,
    /// The score of a sample that is kept out.
    #[serde(default)]
    pub otherwise: f32,
}

/// A reward whose scorer a flag names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivenFile {
    /// Its name in logs, and in `--scorer NAME=WHERE`.
    pub name: String,
    /// How much it counts.
    #[serde(default)]
    pub counts: Weighed,
}

/// Several rewards as one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinedFile {
    /// Its name in logs.
    pub name: String,
    /// At least two; their weights have no say.
    pub of: Vec<RewardSource>,
    /// How they become one.
    pub by: Joining,
    /// How much it counts.
    #[serde(default)]
    pub counts: Weighed,
}

impl RewardSource {
    /// The names of the scorers that may stand behind this reward, its gate and its parts.
    pub fn scorers(&self) -> BTreeSet<String> {
        let mut names = match self {
            Self::Clip(_) => BTreeSet::from(["clip".into()]),
            Self::Hps(_) => BTreeSet::from(["hps".into()]),
            Self::Given(given) => BTreeSet::from([given.name.clone()]),
            Self::Joined(joined) => joined.of.iter().flat_map(Self::scorers).collect(),
            Self::Geneval(_) | Self::Brightness(_) | Self::Random(_) | Self::Compressibility(_) => BTreeSet::new(),
        };
        names.extend(self.counts().gate.iter().flat_map(|gate| gate.reward.scorers()));
        names
    }

    /// Refuses a weight where it has no say: inside a gate, and in what is joined.
    pub fn check(&self) -> Result<(), String> {
        let joined = if let Self::Joined(joined) = self { joined.of.as_slice() } else { &[] };
        let gate = self.counts().gate.iter().map(|gate| &gate.reward);
        for inner in gate.chain(joined) {
            let weight = inner.counts().weight;
            if weight != 1.0 {
                return Err(format!(
                    "weight {weight} stands inside a gate or a joined reward, where it has no say; leave it out"
                ));
            }
            inner.check()?;
        }
        Ok(())
    }

    /// Its name in logs.
    pub fn name(&self) -> &str {
        match self {
            Self::Clip(_) => "clip",
            Self::Hps(_) => "hps",
            Self::Geneval(_) => "geneval",
            Self::Brightness(_) => "brightness",
            Self::Random(_) => "random",
            Self::Compressibility(_) => "jpeg_compressibility",
            Self::Given(given) => &given.name,
            Self::Joined(joined) => &joined.name,
        }
    }

    /// Whether it is scored as it is: without changes and gate.
    pub fn is_plain(&self) -> bool {
        self.counts().changes.is_empty() && self.counts().gate.is_none()
    }

    /// The same reward as it is watched: of weight 1, without changes and gate.
    pub fn plain(&self) -> Self {
        let counts = Weighed::default();
        match self {
            Self::Clip(_) => Self::Clip(counts),
            Self::Hps(_) => Self::Hps(counts),
            Self::Geneval(_) => Self::Geneval(counts),
            Self::Brightness(_) => Self::Brightness(counts),
            Self::Random(_) => Self::Random(counts),
            Self::Compressibility(_) => Self::Compressibility(counts),
            Self::Given(given) => Self::Given(GivenFile { name: given.name.clone(), counts }),
            Self::Joined(joined) => Self::Joined(JoinedFile { counts, ..joined.clone() }),
        }
    }

    /// How much it counts.
    pub fn counts(&self) -> &Weighed {
        match self {
            Self::Clip(counts)
            | Self::Hps(counts)
            | Self::Geneval(counts)
            | Self::Brightness(counts)
            | Self::Random(counts)
            | Self::Compressibility(counts) => counts,
            Self::Given(given) => &given.counts,
            Self::Joined(joined) => &joined.counts,
        }
    }
}
