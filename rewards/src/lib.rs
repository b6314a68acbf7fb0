//! Rewards for [`grpo`]: what images are judged by.
//!
//! | module | what |
//! |---|---|
//! | [`geneval`] | GenEval's published rules behind a `Detector` trait |
//! | [`resize`] | Pillow's bicubic resizing, bit for bit |
//! | [`shapes`] | the embedded world: scenes, renderer, captions, prompts, exact detector |
//! | `clip` (feature `onnx`) | CLIP and HPS: preprocessing, tokenizer, cosine of embeddings |
//! | `onnx` (feature `onnx`) | finding ONNX Runtime, checked sessions |
//! | [`Brightness`], [`JpegCompressibility`] | two rewards that show whether anything is learnt at all |

#[cfg(feature = "onnx")]
pub mod clip;
#[cfg(feature = "onnx")]
pub mod onnx;

mod brightness;
mod compressibility;
pub mod geneval;
pub mod resize;
pub mod shapes;

pub use brightness::Brightness;
pub use compressibility::JpegCompressibility;
