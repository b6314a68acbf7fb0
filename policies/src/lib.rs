//! Policies for [`grpo`]: generators that can be sampled, replayed and differentiated.
//!
//! | module | what |
//! |---|---|
//! | [`simplear`] | SimpleAR: text in, image out; its sampling law, its stages, its checkpoints |
//! | [`text_lm`] | a causal language model: text in, text out; chat templates, Hugging Face folders |
//! | [`decoder`] | the Qwen2.5-shaped decoder, trainable and with a cache for sampling |
//! | [`cosmos`] | the visual tokenizer: images to codes and back |
//! | [`corpus`] | what SimpleAR is pretrained on: archives, lists and token folders of images with captions |
//! | `cuda` | NVIDIA's cards, with the feature of that name |
//! | [`tokens`] | corpora as codes on disk, and the order in which training reads them |
//! | [`stage`] | the loop of a supervised stage: curves, checkpoints, exact resume |
//! | [`safetensors_file`] | strict reading and writing of weights |

mod allocator;
pub mod corpus;
pub mod cosmos;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decoder;
#[cfg(feature = "benches")]
#[doc(hidden)]
pub mod for_benches;
mod ops;
pub mod safetensors_file;
mod sampling;
pub mod simplear;
pub mod stage;
pub mod text_lm;
pub mod tokens;
mod torch_file;

pub use allocator::keep_freed_memory;

/// Bytes as text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The optimiser's work in code of our own: what [`grpo::Policy::device_optimiser`] gives.
pub(crate) fn device_optimiser() -> Option<std::sync::Arc<dyn grpo::DeviceOptimiser>> {
    #[cfg(feature = "cuda")]
    let optimiser: Option<std::sync::Arc<dyn grpo::DeviceOptimiser>> = Some(std::sync::Arc::new(cuda::CudaOptimiser));
    #[cfg(not(feature = "cuda"))]
    let optimiser = None;
    optimiser
}
