//! What a picture says, against what it should say: text rendering as a reward (Flow-GRPO; Liu et al., 2025).
//!
//! A detector finds regions of text (Differentiable Binarization; Liao et al., 2020), a recogniser reads each line (CTC;
//! Graves et al., 2006), and the score is 1 less the edit distance to the prompt's text as a share of its length. The
//! networks are PP-OCRv4's; `rewards/export/fetch_ocr.py` fetches them. Deviations from rapidocr-onnxruntime 1.4.4, the
//! program that carries them:
//!
//! 1. No classifier for lines that stand on their heads, and no letterbox round very flat pictures.
//! 2. A line is read alone, so its padding does not depend on its neighbours.
//! 3. Resizing is in floats, where OpenCV's is in fixed point; a region's score is the mean over pixel centres.
//! 4. Holes inside a region are no regions of their own.
//! 5. The detector's long side ends at 4096 pixels, and lines are cut out of the picture itself where it was reduced.

mod detect;
mod lines;
mod recognise;
mod reward;
mod scorer;
#[cfg(test)]
mod tests;

pub use reward::{OcrReward, Reading};
pub use scorer::OcrScorer;
