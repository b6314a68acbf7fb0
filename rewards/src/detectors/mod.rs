//! Detectors of the 80 classes of COCO as ONNX files, and the classifier of colours, behind GenEval's `Detector`.
//!
//! | detector | scores compare with published ones |
//! |---|---|
//! | [`Mask2Former`] | with the weights of the published evaluation (mmdet's `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`), yes |
//! | [`CenterNet`] | no: a small, weak network that is easy to come by, for trying things out |
//!
//! A detector is a folder with `model.onnx` and `SHA256SUMS`, a line of `sha256sum` for each file; the sums are checked
//! before the model is read. GenEval asks CLIP for colours: [`Colored`] puts [`ClipColors`] beside any detector.

mod bilinear;
mod centernet;
mod colors;
mod mask2former;
mod model_folder;

pub use centernet::{CenterNet, peaks};
pub use colors::{ClipColors, Colored, crop};
pub use mask2former::{Mask2Former, Queries, Sizes, instances, network_input};
