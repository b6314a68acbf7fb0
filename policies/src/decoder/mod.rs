//! The Qwen2.5-shaped decoder: trainable, replayable, and sampled from with a cache.
//!
//! Training and replay go through [`Decoder::score`], which on the CPU drives its layers by hand, forward and in
//! [`Tape::backward`], without a graph. [`Decoder::forward`] and [`Decoder::log_probs_of`] build candle's graph out of the
//! same operations, for whatever is composed otherwise. Sampling goes through a [`Snapshot`], which packs the
//! weights of one moment and has no graph: a prompt is read once, its [`Cache`] repeated for each draw, and a
//! row's numbers are the same to the bit whatever rows it is decoded with.
//!
//! Weights come from Hugging Face folders ([`Decoder::load`]) and go to such ([`Decoder::save`]).
//! [`Decoder::with_lora`] freezes the weights and trains low-rank adapters on them, in PEFT's file format.
//!
//! Architecture: Qwen2.5 technical report, arXiv 2412.15115, section 2; names and layout of weights are those of
//! Hugging Face's `Qwen2ForCausalLM`.

mod cache;
mod compute;
mod config;
mod device;
pub(crate) mod folder;
mod host;
mod host_tape;
mod lora;
mod model;
mod pass;
mod recompute;
mod snapshot;
mod tape;
mod tile;
mod weights;

pub use cache::Cache;
pub use compute::Compute;
pub use config::{DecoderConfig, ImagePositions};
pub use lora::{LoraConfig, LoraTarget};
pub use model::Decoder;
pub use snapshot::{Snapshot, repeat_rows};
pub use tape::{Scores, Tape, Targets};
pub(crate) use tile::DecodeBuffers;
#[cfg(feature = "cuda")]
pub(crate) use {model::EMBEDDING, weights::Layer};
