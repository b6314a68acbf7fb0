//! The published benchmark's own prompts and class names.

use grpo::{Error, Result};

use super::metadata::Metadata;

/// MIT licence; the notice lies beside the files.
const PROMPTS: &str = include_str!("../../data/geneval/evaluation_metadata.jsonl");
const OBJECT_NAMES: &str = include_str!("../../data/geneval/object_names.txt");

/// The 553 prompts of the benchmark, in the published order.
///
/// ```
/// let prompts = grpo_rewards::geneval::prompts()?;
/// assert_eq!((prompts.len(), prompts[0].prompt.as_str()), (553, "a photo of a bench"));
/// # Ok::<(), grpo::Error>(())
/// ```
pub fn prompts() -> Result<Vec<Metadata>> {
    let read = |line| serde_json::from_str(line).map_err(|error| Error::config(format!("{line}: {error}")));
    PROMPTS.lines().map(read).collect()
}

/// The 80 classes of COCO in its order, with the three names that the prompts spell otherwise ("computer mouse",
/// "tv remote", "computer keyboard"); class `n` of a COCO detector is the `n`-th.
pub fn object_names() -> impl Iterator<Item = &'static str> {
    OBJECT_NAMES.lines()
}
