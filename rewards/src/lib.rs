//! Rewards for [`grpo`]: what images are judged by.
//!
//! | module | what |
//! |---|---|
//! | `clip` (feature `onnx`) | CLIP and HPS: preprocessing, tokenizer, cosine of embeddings |
//! | `onnx` (feature `onnx`) | any folder with a `reward.toml`; finding ONNX Runtime, checked sessions |
//! | `ocr` (feature `onnx`) | how much of a text can be read in a picture |
//! | `detectors` (feature `onnx`) | COCO detectors and the classifier of colours for GenEval |
//! | `remote` (feature `http`) | a scorer behind HTTP as a reward, and a server for any reward |
//! | [`process`] | a program of one's own, such as a Python script, as a reward |
//! | [`exchange`] | the message that both speak |
//! | [`geneval`] | GenEval's published rules behind a `Detector` trait |
//! | [`dpg`], [`hps_benchmark`] | DPG-Bench and the HPSv2 benchmark on folders of images |
//! | [`evaluation`] | the form in which benchmarks report |
//! | [`shapes`] | the embedded world: scenes, renderer, captions, prompts, exact detector |
//! | [`Brightness`], [`JpegCompressibility`] | two rewards that show whether anything is learnt at all |
//! | [`Random`] | a reward that knows nothing, the negative control of an ablation |

#[cfg(feature = "onnx")]
pub mod clip;
#[cfg(feature = "onnx")]
pub mod detectors;
#[cfg(feature = "onnx")]
pub mod ocr;
#[cfg(feature = "onnx")]
pub mod onnx;
#[cfg(feature = "http")]
pub mod remote;

mod brightness;
mod compressibility;
pub mod dpg;
pub mod evaluation;
pub mod exchange;
pub mod geneval;
pub mod hps_benchmark;
pub mod process;
mod random;
pub mod shapes;

pub use brightness::Brightness;
pub use compressibility::JpegCompressibility;
pub use random::Random;
