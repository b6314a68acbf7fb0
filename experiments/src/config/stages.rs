//! Files of the stages before GRPO.

use grpo_policies::cosmos::{CosmosConfig, ReconstructionPlan};
use grpo_policies::decoder::{DecoderConfig, ImagePositions};
use grpo_policies::simplear::BatchPlan;
use grpo_policies::stage::StagePlan;
use grpo_policies::tokens;
use serde::{Deserialize, Serialize};

/// Training of a visual tokenizer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerFile {
    /// The run's name; its folder is `{out}/{name}/{seed}`.
    pub name: String,
    /// The visual tokenizer's sizes.
    pub cosmos: CosmosConfig,
    /// How pictures are read and cut.
    pub corpus: tokens::Settings,
    /// Pictures that are held in memory and trained on: the corpus's first.
    pub n_images: usize,
    /// What a step sees.
    pub data: ReconstructionPlan,
    /// How long and how fast.
    pub stage: StagePlan,
}

/// Pretraining of a decoder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainFile {
    /// The run's name; its folder is `{out}/{name}/{seed}`.
    pub name: String,
    /// What the decoder starts from: the paper's table 2.
    pub decoder: DecoderSource,
    /// What a step learns from.
    pub data: BatchPlan,
    /// How long and how fast.
    pub stage: StagePlan,
}

/// Supervised fine-tuning of a policy, which `--policy` names.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftFile {
    /// The run's name; its folder is `{out}/{name}/{seed}`.
    pub name: String,
    /// What a step learns from.
    pub data: BatchPlan,
    /// How long and how fast.
    pub stage: StagePlan,
}

/// What a decoder starts from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DecoderSource {
    /// Fresh weights; its text is that of `--text-tokenizer`, or one id a word of the captions. The vocabulary follows.
    FromScratch(DecoderSizes),
    /// The Qwen2.5 folder of `--language-model`, with its tokenizer.
    LanguageModel {
        /// How the tokens of an image are numbered: the paper's table 3.
        #[serde(default)]
        image_positions: ImagePositions,
    },
}

/// The decoder's sizes but for its vocabulary.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderSizes {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Longest row.
    pub max_position_embeddings: usize,
    /// Words that captions say at least so often have an id; the others are one unknown word.
    #[serde(default = "min_word_count")]
    pub min_word_count: usize,
    /// How the tokens of an image are numbered: the paper's table 3.
    #[serde(default)]
    pub image_positions: ImagePositions,
}

fn min_word_count() -> usize {
    1
}

impl DecoderSizes {
    /// The configuration of a decoder with these sizes.
    pub fn with_vocabulary(self, vocab_size: usize) -> DecoderConfig {
        DecoderConfig {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            max_position_embeddings: self.max_position_embeddings,
            image_positions: self.image_positions,
            ..DecoderConfig::default()
        }
    }
}
