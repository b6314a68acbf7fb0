//! DPG-Bench: long prompts taken apart into questions, which a model answers from the picture.
//!
//! Paper: Hu et al., 2024, "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment". Each prompt is one
//! file with up to four pictures in a grid of two columns. Per picture every question is asked; "yes" is 1, any other
//! answer 0; a question whose parent question scored 0 scores 0 too, in the order of the table, so that zeros travel
//! down. A picture's score is the mean of its questions, a file's the mean of its pictures, and the benchmark's 100
//! times the mean of the files.
//!
//! [`Mode::Official`] is the published program, number for number, with what it gets wrong:
//!
//! 1. The first row of the table is never asked; a question that depends on it fails its file.
//! 2. Categories are averaged over the last picture of each file alone, before zeros travel.
//! 3. Pictures are cut at multiples of the resolution even where a grid has borders between them.
//! 4. A file that fails is left out in silence. Here the number leaves it out too, and the report names it.
//!
//! [`Mode::Fixed`] asks every row, averages categories over all pictures after zeros have travelled, and finds the
//! borders of a grid from its size.
//!
//! The published answers are mPLUG-large's; other models answer otherwise, and their numbers do not compare.

mod benchmark;
mod crops;
mod questions;
mod score;
mod vqa;

pub use benchmark::{Benchmark, Settings};
pub use questions::{Item, Mode, Question, Questions};
pub use vqa::{Crop, RecordedAnswers, ScoredAnswers, Vqa};
