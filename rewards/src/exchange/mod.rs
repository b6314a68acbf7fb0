//! Judging elsewhere: the message that [`remote`](crate::remote) and [`process`](crate::process) both speak.
//!
//! A question holds the prompts and the pictures of a batch; the answer holds one score each, or what was detected.
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
//!    says: base64 inside JSON would cost a third more bytes.
//!
//! A reward asks about as many pictures at a time as its configuration allows, and about fewer where they are large:
//! those of one question stay within half of [`MAX_DECODED_BYTES`] together, and one that is larger is asked about alone.
//!
//! The answer is one JSON object:
//!
//! ```text
//! {"id":7,"scores":[0.31,null],"errors":[null,"no face found"],"model":"hps","version":"2.1"}
//! ```
//!
//! - `scores`: as many as there were pictures, in their order. `null` or a number that is not finite (Python writes
//!   `NaN`) is a sample that could not be scored; a 0 is a score like any other and is believed.
//! - `detections`, in the place of `scores` where objects are asked for: a list for each picture, empty where nothing was
//!   found, of `{"class", "score", "bbox": [x0, y0, x1, y1]}` with `color` and `mask` where they are known, in the form
//!   and within the limits of [`RecordedDetections`](crate::geneval::RecordedDetections). The question's prompts are
//!   empty texts then: a detector reports what it sees.
//! - `errors`, optional: as many; a text says why its sample has no score, and the sample fails whatever its score is.
//! - `model`, `version`, optional texts or numbers: who answered. They must not change while a reward lives: a score of
//!   another model is another reward.
//! - `id`: the question's; needed from a process, optional over HTTP. Any other key is refused.

mod answer;
mod asked;
mod dispatch;
mod request;

pub(crate) use answer::{Answers, Said, Verdict, excerpt};
pub(crate) use asked::Asked;
pub(crate) use dispatch::{Plan, Pool, Until, scatter};
pub(crate) use request::Question;
pub use request::{Encoding, MAX_DECODED_BYTES, MAX_SIDE, PROTOCOL, Request};
