//! `[scorer.network]`: the networks, what each is given, and that the whole is a score of pictures.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{After, Picture, Readout, Tokens};
use crate::onnx::Precision;

/// Networks that judge a picture, in the order they run.
///
/// ```toml
/// [scorer.network]
/// precision = "fp32"
/// picture = { named = { preprocess = "pil-bicubic", size = 224 } }
/// score = { scalar = "rating" }
/// [[scorer.network.stages]]
/// file = "image.onnx"
/// inputs = { pixel_values = "picture" }
/// outputs = { image_embeds = "embedding" }
/// [[scorer.network.stages]]
/// file = "head.onnx"
/// inputs = { embedding = { normalised = "embedding" } }
/// outputs = { rating = "rating" }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkScorer {
    /// What the networks' weights are stored in.
    pub precision: Precision,
    /// What an input named `picture` is given.
    pub picture: Picture,
    /// What inputs named `ids`, `mask` and `types` are given, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    /// The networks.
    pub stages: Vec<Stage>,
    /// How the score is read from what they made.
    pub score: Readout,
    /// What the score goes through at the end.
    #[serde(default)]
    pub after: After,
}

/// One network of several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The .onnx file.
    pub file: String,
    /// What each input of the graph is given, by the graph's own names; all of them.
    pub inputs: BTreeMap<String, Source>,
    /// The outputs that are wanted, by the graph's names, each under the name that later stages and the score use.
    pub outputs: BTreeMap<String, String>,
}

/// What an input of a network is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The picture.
    Picture,
    /// The ids of the prompt's tokens, i64 `[batch, length]`.
    Ids,
    /// 1 where there is a token and 0 where there is padding, i64 `[batch, length]`.
    Mask,
    /// The kinds of the tokens, i64 `[batch, length]`.
    Types,
    /// What an earlier stage made.
    Value(String),
    /// What an earlier stage made, each row divided by its length.
    Normalised(String),
}

impl Source {
    fn of_tokens(&self) -> bool {
        matches!(self, Self::Ids | Self::Mask | Self::Types)
    }
}

impl NetworkScorer {
    pub(in crate::onnx) fn check(&self) -> Result<(), String> {
        self.picture.check()?;
        self.tokens.as_ref().map_or(Ok(()), Tokens::check)?;
        self.after.check()?;
        if !(1..=16).contains(&self.stages.len()) {
            return Err(format!("there are {} stages; give 1 to 16", self.stages.len()));
        }
        let reads_tokens = self.stages.iter().flat_map(|stage| stage.inputs.values()).any(Source::of_tokens);
        if reads_tokens != self.tokens.is_some() {
            let fault =
                if reads_tokens { "are read but not described" } else { "are described but no stage reads them" };
            return Err(format!(
                "the prompt's tokens {fault}; `tokens` and the inputs ids, mask, types belong together"
            ));
        }
        let mut of_pictures = BTreeMap::new();
        for stage in &self.stages {
            stage.check(&mut of_pictures)?;
        }
        let mut sees_picture = false;
        for value in self.score.values() {
            let known = || known(&of_pictures);
            sees_picture |= *of_pictures.get(value).ok_or_else(|| format!("the score reads `{value}`; {}", known()))?;
        }
        match sees_picture {
            true => Ok(()),
            false => Err("the score does not depend on the picture; give it to a stage that the score reads".into()),
        }
    }

    /// The values that are the same for all pictures of a prompt: those of stages that never see a picture.
    pub(super) fn values_of_prompts(&self) -> BTreeSet<&str> {
        let mut of_prompts = BTreeSet::new();
        for stage in &self.stages {
            if !stage.sees_picture(|value| !of_prompts.contains(value)) {
                of_prompts.extend(stage.outputs.values().map(String::as_str));
            }
        }
        of_prompts
    }
}

impl Stage {
    fn check(&self, of_pictures: &mut BTreeMap<String, bool>) -> Result<(), String> {
        let Self { file, inputs, outputs } = self;
        if inputs.is_empty() || outputs.is_empty() {
            return Err(format!("stage `{file}` has no inputs or no outputs; name those of its graph"));
        }
        for (input, source) in inputs {
            let (Source::Value(value) | Source::Normalised(value)) = source else { continue };
            if !of_pictures.contains_key(value) {
                return Err(format!("input `{input}` of `{file}` reads `{value}`; {}", known(of_pictures)));
            }
        }
        let sees_picture = self.sees_picture(|value| of_pictures.get(value).copied().unwrap_or(false));
        for value in outputs.values() {
            if of_pictures.insert(value.clone(), sees_picture).is_some() {
                return Err(format!("`{value}` is made twice; give each output a name of its own"));
            }
        }
        Ok(())
    }

    /// Whether this stage differs from picture to picture, given which values do.
    pub(super) fn sees_picture(&self, of_picture: impl Fn(&str) -> bool) -> bool {
        self.inputs.values().any(|source| match source {
            Source::Picture => true,
            Source::Value(value) | Source::Normalised(value) => of_picture(value),
            Source::Ids | Source::Mask | Source::Types => false,
        })
    }
}

fn known(values: &BTreeMap<String, bool>) -> String {
    format!("the stages before it make {:?}", values.keys().collect::<Vec<_>>())
}
