//! Rewards that `reward.toml` describes alone: networks from a picture and a prompt to one number.
//!
//! `[scorer.network]` names how the picture and the prompt become numbers, the networks in the order they run, and how
//! their last output is read. It describes two towers with a cosine (PickScore; Kirstain et al., 2023), a head on a
//! normalised embedding (the LAION aesthetic predictor), a picture judged together with tokens and a mask (ImageReward;
//! Xu et al., 2023) and the probability of a class. `rewards/tests/golden/onnx/` holds one folder of each kind.

mod picture;
mod readout;
mod reward;
mod scorer;
mod tokens;

pub use picture::{Channels, Fit, Layout, Picture, PlainPicture, Range, Resampling};
pub use readout::{After, Class, Readout};
pub use reward::OnnxReward;
pub use scorer::{NetworkScorer, Source, Stage};
pub use tokens::Tokens;
