//! Policies for [`grpo`]: generators that can be sampled, replayed and differentiated.
//!
//! | module | what |
//! |---|---|
//! | [`simplear`] | SimpleAR: text in, image out; its sampling law, its stages, its checkpoints |
//! | [`text_lm`] | a causal language model: text in, text out; chat templates, Hugging Face folders |
//! | [`decoder`] | the Qwen2.5-shaped decoder, trainable and with a cache for sampling |
//! | [`cosmos`] | the visual tokenizer: images to codes and back |
//! | [`safetensors_file`] | strict reading and writing of weights |

mod allocator;
pub mod cosmos;
pub mod decoder;
mod ops;
pub mod safetensors_file;
mod sampling;
pub mod simplear;
pub mod text_lm;
mod torch_file;

pub use allocator::keep_freed_memory;
