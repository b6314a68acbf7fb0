//! Images as tokens on disk: what pretraining and fine-tuning read.
//!
//! [`tokenise`] makes a folder of shards of a [`Corpus`](crate::corpus::Corpus): `00000.safetensors`, … with codes and captions,
//! `manifest.json`, and `skipped.jsonl`, which names every entry that was left out and why. [`TokenSet`] reads such folders,
//! mapped into memory. In Python:
//!
//! ```python
//! import json, pathlib, numpy
//! from safetensors.numpy import load_file
//!
//! folder = pathlib.Path("tokens")
//! manifest = json.loads((folder / "manifest.json").read_text())
//! for shard in manifest["shards"]:
//!     tensors = load_file(folder / shard["file"])
//!     codes = tensors["codes"].reshape(-1, *manifest["grid"])  # uint16 [n, h, w]
//!     texts = numpy.split(tensors["captions"], tensors["caption_ends"][:-1].astype(int))
//!     captions = [text.tobytes().decode().split("\n") for text in texts]  # short and long, or one line
//! ```

mod manifest;
mod prepare;
mod set;
mod settings;
mod shard;
mod tokenise;

pub use manifest::{MANIFEST, Manifest, ShardMark};
pub use set::{Order, TokenRow, TokenSet};
pub use settings::{Filter, Settings};
pub use tokenise::{Reading, Workers, pictures, tokenise};
