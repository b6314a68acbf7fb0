//! Pictures that anyone may have written: decoded within limits, resized and cropped bit for bit as published programs do.
//!
//! | item | what |
//! |---|---|
//! | [`decode`] | bytes of a training set, of which every flaw is a [`Fault`] |
//! | [`open_image`], [`open_image_upright`], [`image_size`] | files that are judged |
//! | [`decode_within`] | one of several pictures that share a limit |
//! | [`centre_crop`] | guided diffusion's crop for training |
//! | [`resize`] | Pillow's and torch's resizing |

mod crop;
mod decode;
mod file;
mod jpeg;
mod passes;
pub mod resize;

pub use crop::centre_crop;
pub use decode::{Fault, Transparency, decode};
pub use file::{decode_within, image_size, is_named_as_image, open_image, open_image_upright};

/// The longest side of a picture that is decoded, in pixels.
pub const MAX_SIDE: u32 = 8192;

/// What a picture may take when decoded, and all pictures of one request together: 256 MiB.
pub const MAX_DECODED_BYTES: u64 = 256 << 20;
