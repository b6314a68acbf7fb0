//! Judging elsewhere: the message that [`HttpReward`](crate::remote) and [`ProcessReward`](crate::process) both speak.
//!
//! A question holds the prompts and the pictures of a batch; the answer holds one score each.
//! Version 1:
//!
//! ```text
//! {"protocol":1,"id":7,"encoding":"png","prompts":[{"text":"a cat","columns":{"count":1}},...],"images":[5120,...]}\n
//! <the 5120 bytes of the first picture><the bytes of the second>...
//! ```
//!
//! 1. One line of JSON, ended by the first line feed. `prompts` and `images` are of one length and in one order; a
//!    prompt's `columns` are the data set's own, with their types; `images` gives each picture's length in bytes.
//! 2. The pictures' bytes, one after another, nothing between or behind. They are files, PNG or JPEG as `encoding`
//!    says: base64 inside JSON costs a third more bytes, and several times the time on both sides.
//!
//! The answer is one JSON object:
//!
//! ```text
//! {"id":7,"scores":[0.31,null],"errors":[null,"no face found"],"model":"hps","version":"2.1"}
//! ```
//!
//! - `scores`: as many as there were pictures, in their order. `null` or a number that is not finite (Python writes
//!   `NaN`) is a sample that could not be scored; a 0 is a score like any other and is believed.
//! - `errors`, optional: as many; a text says why its sample has no score, and the sample fails whatever its score is.
//! - `model`, `version`, optional texts or numbers: who answered. They must not change while a reward lives: a score of
//!   another model is another reward.
//! - `id`: the question's; needed from a process, optional over HTTP. Any other key is refused.

mod answer;
mod dispatch;
mod request;

pub(crate) use answer::{Answers, Verdict, excerpt};
pub(crate) use dispatch::{Plan, Pool, scatter, scores_or_first_failure};
pub(crate) use request::Question;
pub use request::{Encoding, MAX_DECODED_BYTES, MAX_SIDE, PROTOCOL, Request};
