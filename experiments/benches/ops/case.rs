//! The operations by name: what they are of, and what no program can do without.

use anyhow::{Result, bail};
use grpo_policies::decoder::DecoderConfig;
use grpo_policies::for_benches::Operation;

/// All operations.
pub const OPERATIONS: [&str; 7] = ["rms_norm", "swiglu", "linear", "attention", "log_probs", "adamw", "norm"];

const ROWS: usize = 4;
const LENGTH: usize = 512;
const TOKENS: usize = ROWS * LENGTH;
/// Tokens whose logits the composition holds at once.
const SCORED: usize = 256;
/// Codes of the published visual tokenizer, or as many of the miniature as it has ids.
const CODES: usize = 64_000;
/// Columns of what the optimiser moves.
const MOVED: usize = 1024;

/// An operation at the sizes of a decoder.
pub struct Case {
    /// What a graph is made of; `None` of the optimiser's.
    pub operation: Option<Operation>,
    pub operands: Vec<Vec<usize>>,
    pub passes: Vec<Pass>,
    /// How far results may be from the stock side's, relative to them.
    pub tolerance: f64,
}

/// What is timed.
pub struct Pass {
    pub name: &'static str,
    /// Of operands and results.
    pub bytes: f64,
    /// Floating-point operations of products.
    pub operations: f64,
    pub only_reads: bool,
}

impl Case {
    pub fn new(name: &str, config: &DecoderConfig) -> Result<Self> {
        let (hidden, wide, d) = (config.hidden_size, config.intermediate_size, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (t, h, f) = (TOKENS as f64, hidden as f64, wide as f64);
        Ok(match name {
            "rms_norm" => {
                let operands = vec![vec![TOKENS, hidden], vec![hidden]];
                Self::graph(Operation::rms_norm(), operands, [[2.0 * t * h, 0.0], [3.0 * t * h, 0.0]])
            }
            "swiglu" => {
                let operands = vec![vec![TOKENS, 2 * wide]];
                Self::graph(Operation::swiglu(), operands, [[3.0 * t * f, 0.0], [5.0 * t * f, 0.0]])
            }
            "linear" => {
                let (moved, product) = (t * h + f * h + t * f, 2.0 * t * h * f);
                let work = [[moved, product], [moved + t * h + f * h, 2.0 * product]];
                Self::graph(Operation::linear(), vec![vec![TOKENS, hidden], vec![wide, hidden], vec![wide]], work)
            }
            "attention" => {
                let width = (heads + 2 * kv_heads) * d;
                let moved = t * (width + heads * d) as f64;
                // Two products forward and five backward over the lower half of each head's positions.
                let product = t * LENGTH as f64 * (heads * d) as f64;
                let operation = Operation::attention((heads, kv_heads, d), (ROWS, LENGTH));
                let work = [[moved, 2.0 * product], [2.0 * moved, 5.0 * product]];
                Self::graph(operation, vec![vec![ROWS, LENGTH, width]], work)
            }
            "log_probs" => {
                let n_codes = CODES.min(config.vocab_size);
                let targets = (0..SCORED).map(|token| (token * 7919 % n_codes) as u32).collect();
                let (moved, n) = ((SCORED + n_codes) as f64 * h, SCORED as f64);
                let product = 2.0 * n * h * n_codes as f64;
                let operands = vec![vec![SCORED, hidden], vec![n_codes, hidden]];
                let work = [[moved, product], [2.0 * moved, 2.0 * product]];
                Self::graph(Operation::log_probs(0..n_codes, targets), operands, work)
            }
            "adamw" | "norm" => Self::of_optimiser(name == "norm", config),
            _ => bail!("no operation `{name}`; there are {OPERATIONS:?}"),
        })
    }

    /// `work` is numbers moved and operations of products, forward and backward.
    fn graph(operation: Operation, operands: Vec<Vec<usize>>, work: [[f64; 2]; 2]) -> Self {
        let [[moved, forward], [moved_back, backward]] = work;
        let pass = |name, moved: f64, operations| Pass { name, bytes: 4.0 * moved, operations, only_reads: false };
        let both = pass("forward and backward", moved + moved_back, forward + backward);
        Self {
            operation: Some(operation),
            operands,
            passes: vec![pass("forward", moved, forward), both],
            tolerance: 1e-3,
        }
    }

    /// As many weights as four layers have.
    fn of_optimiser(only_reads: bool, config: &DecoderConfig) -> Self {
        let hidden = config.hidden_size;
        let n = 4 * hidden * (3 * hidden + 3 * config.intermediate_size);
        let operands = vec![vec![n / MOVED, MOVED]];
        // The norm reads the gradient; an update reads it again, with weight and moments, and writes those.
        let bytes = if only_reads { 4.0 } else { 32.0 } * n as f64;
        let pass = Pass { name: "a step", bytes, operations: 0.0, only_reads };
        let tolerance = if only_reads { 1e-2 } else { 1e-3 };
        Self { operation: None, operands, passes: vec![pass], tolerance }
    }

    /// The operands' sizes as text.
    pub fn sizes(&self) -> String {
        let size = |operand: &Vec<usize>| operand.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
        self.operands.iter().map(size).collect::<Vec<_>>().join("; ")
    }
}
