//! GenEval: does the picture hold what the caption says, by rules over detected boxes.
//!
//! Paper: Ghosh, Hajishirzi and Schmidt, 2023, "GenEval: An Object-Focused Framework for Evaluating
//! Text-to-Image Alignment". The rules are those of the published evaluation program:
//!
//! 1. Per class, boxes with a score above 0.3 (0.9 where the task is counting) are kept, best first,
//!    at most 16.
//! 2. For each `include`, the best `count` boxes are taken; fewer fail. With a colour, `count` of them must
//!    be classified as that colour. With a position, each of them must stand in that relation to each box
//!    taken for the earlier `include` it names; where that one failed, so does this.
//! 3. For each `exclude`, `count` boxes or more fail.
//!
//! A golden test holds verdicts and reasons to those of the published functions. Deviations:
//!
//! 1. The published order of boxes of equal score is that of numpy's unstable sort, which for up to 16 boxes of a
//!    class is the detector's order backwards; here it is so for any number.
//! 2. Where two relations hold on a diagonal, their order in a reason is fixed; there it changes from run to run.
//! 3. A folder's images are files named by digits and `.png`; there a name may go on behind that, as `0000.png.bak`.
//!
//! The detector is whatever implements [`Detector`]; absolute scores compare with published ones only where
//! the detector is the published one.

mod benchmark;
mod folder;
mod found;
mod judge;
mod mask;
mod metadata;
mod prompts;
mod recorded;
mod reward;
mod summary;

pub use benchmark::{Benchmark, ImageVerdict, Sample};
pub use folder::{PromptFolder, read_folders};
pub(crate) use found::Found;
pub use judge::{COLORS, Detection, Rules, Verdict, judge, overlap, relations};
pub use mask::Mask;
pub use metadata::{Include, Metadata, Relation, Tag};
pub use prompts::{object_names, prompts};
pub use recorded::{Recorded, RecordedDetections};
pub use reward::{Detector, GenEval};
pub use summary::Summary;
