//! Ablations of rewards one can trust: the same prompts and draws in every arm, several seeds, and a report that says what
//! changed, by how much, and how sure that is.
//!
//! [`Ablation`] trains each arm under each seed into a folder, and goes on where it was broken off; [`Report`] reads run
//! folders, whoever wrote them, and makes a page of them. The `grpo ablate` and `grpo report` commands are these two with
//! names in TOML files for parts; `examples/compare_rewards.rs` uses them with rewards of its own.

pub mod ablation;
mod intervals;
pub mod report;

pub use ablation::{Ablation, Arm, Cell};
pub use intervals::Interval;
pub use report::Report;
