//! Image-text similarity as a reward: CLIP (Radford et al., 2021) and HPSv2 (Wu et al., 2023).
//!
//! Both are two towers in ONNX files with one interface, so one type serves both, and the full-size ViT-H models as well
//! as the embedded miniatures:
//!
//! - `image.onnx`: `pixel_values`, f32 `[batch, 3, S, S]` → `image_embeds`, f32 `[batch, D]`;
//! - `text.onnx`: `input_ids`, i64 `[batch, 77]` → `text_embeds`, f32 `[batch, D]`;
//! - `reward.toml`: the [`Manifest`](crate::onnx::Manifest), with [`ClipScorer`].
//!
//! The score is the raw cosine of the two embeddings. Deviations from published tables: HPSv2's are multiplied by 100,
//! CLIPScore's by 2.5 and cut at 0; neither changes a group's order.

mod preprocess;
mod reward;
mod tokenizer;

pub use preprocess::Preprocess;
pub(crate) use reward::cosine;
pub use reward::{ClipReward, ClipScorer};
pub use tokenizer::{CONTEXT, Tokenizer};
