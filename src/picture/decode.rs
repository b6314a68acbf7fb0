//! Decoding of a training set's pictures, which nobody looks at before they are trained on: what is not whole is refused.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage, guess_format};
use serde::{Deserialize, Serialize};

use super::{MAX_DECODED_BYTES, MAX_SIDE, jpeg};

/// What becomes of pixels through which one can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Transparency {
    /// Their colour is taken as it is stored, as by Pillow's `convert("RGB")`; it may be one that nobody ever saw.
    Dropped,
    /// They are laid on this colour, as by Pillow's `paste` with the picture as its mask.
    Onto([u8; 3]),
}

impl Default for Transparency {
    /// On white, as most viewers show it.
    fn default() -> Self {
        Self::Onto([255; 3])
    }
}

/// Why there is no picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A side or the pixels are beyond [`MAX_SIDE`] or [`MAX_DECODED_BYTES`].
    #[error("{0}")]
    TooLarge(String),
    /// The bytes end too early or contradict themselves.
    #[error("{0}")]
    Damaged(String),
    /// A format, or a kind of one, that is not decoded.
    #[error("{0}")]
    Unknown(String),
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self::Damaged(error.to_string())
    }
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Self {
        let message = |error| format!("{error}; give a PNG, JPEG or WebP file");
        match error {
            ImageError::IoError(error) => error.into(),
            ImageError::Limits(_) => Self::TooLarge(format!("{error}; make the image smaller")),
            ImageError::Unsupported(_) => Self::Unknown(message(error)),
            other => Self::Damaged(message(other)),
        }
    }
}

/// Decodes a whole PNG, JPEG or WebP file, of up to 8192 pixels a side and 256 MiB decoded, whatever its name was.
///
/// A file that was cut short is damaged, even where a decoder would fill up what is missing; what follows a picture's end
/// is passed over. Size and limits are compared before pixels are allocated, and a decoder's panic is a fault. 16 bits a
/// channel are rounded to 8, and of an animation the first picture is taken. EXIF's orientation and colour profiles are
/// not applied, as Pillow's `convert("RGB")`, and with it SimpleAR's original, applies neither.
///
/// ```
/// use grpo::picture::{Fault, Transparency, decode};
///
/// assert!(matches!(decode(b"<html>", Transparency::default()), Err(Fault::Unknown(_))));
/// ```
pub fn decode(bytes: &[u8], transparency: Transparency) -> Result<RgbImage, Fault> {
    guarded(|| match guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg::decode(bytes),
        Ok(format @ (ImageFormat::Png | ImageFormat::WebP)) => {
            check_end(bytes, format)?;
            let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
            reader.limits(limits());
            let decoder = reader.into_decoder()?;
            check_size(decoder.dimensions(), decoder.total_bytes())?;
            Ok(opaque(DynamicImage::from_decoder(decoder)?, transparency))
        }
        Ok(other) => {
            Err(Fault::Unknown(format!("the file is a picture of type {other:?}; give a PNG, JPEG or WebP file")))
        }
        Err(_) => {
            let head = bytes[..bytes.len().min(8)].escape_ascii();
            let n_bytes = bytes.len();
            let message = format!("a file of {n_bytes} bytes that begins with `{head}` is no picture");
            Err(Fault::Unknown(format!("{message}; give a PNG, JPEG or WebP file")))
        }
    })
}

/// Runs a decoder, whose panic is a fault of the picture.
pub(super) fn guarded<T>(decode: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    let gave_up = |_| Err(Fault::Damaged("the decoder gave up; save the image again as PNG".into()));
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(gave_up)
}

/// What the decoders of `image` may take for themselves.
pub(super) fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    limits
}

/// Compares a size, and the bytes that a decoder makes of it, with the limits.
pub(super) fn check_size((width, height): (u32, u32), n_bytes: u64) -> Result<(), Fault> {
    if width <= MAX_SIDE && height <= MAX_SIDE && n_bytes <= MAX_DECODED_BYTES {
        return Ok(());
    }
    let size = format!("{width}x{height} pixels, {} MiB decoded", n_bytes >> 20);
    let limit = format!("{MAX_SIDE} pixels a side and {} MiB", MAX_DECODED_BYTES >> 20);
    Err(Fault::TooLarge(format!("the image has {size}; the limit is {limit}, make it smaller")))
}

/// That a PNG file has its last chunk, and a WebP file the length that it says.
fn check_end(bytes: &[u8], format: ImageFormat) -> Result<(), Fault> {
    let is_whole = match format {
        ImageFormat::Png => has_last_chunk(bytes),
        _ => number(bytes, 4, u32::from_le_bytes).is_some_and(|length| bytes.len() as u64 >= 8 + u64::from(length)),
    };
    match is_whole {
        true => Ok(()),
        false => {
            Err(Fault::Damaged(format!("the file ends after {} bytes, before the picture; get it again", bytes.len())))
        }
    }
}

/// Chunks are a length, four letters, so many bytes and a checksum.
fn has_last_chunk(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some(length) = number(bytes, at, u32::from_be_bytes) {
        let next = at + 12 + length as usize;
        if bytes[at + 4..].starts_with(b"IEND") {
            return next <= bytes.len();
        }
        at = next;
    }
    false
}

/// The number of so many bytes at this place.
pub(super) fn number<const N: usize, T>(bytes: &[u8], at: usize, read: fn([u8; N]) -> T) -> Option<T> {
    Some(read(*bytes.get(at..)?.first_chunk()?))
}

fn opaque(image: DynamicImage, transparency: Transparency) -> RgbImage {
    let Transparency::Onto(ground) = transparency else { return image.into_rgb8() };
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let seen = image.into_rgba8();
    let mut laid = RgbImage::new(seen.width(), seen.height());
    for (pixel, seen) in laid.pixels_mut().zip(seen.pixels()) {
        let [red, green, blue, alpha] = seen.0.map(u32::from);
        for ((value, colour), ground) in pixel.0.iter_mut().zip([red, green, blue]).zip(ground) {
            // A half cannot occur, since 255 is odd: this is the nearest byte, and so is Pillow's.
            *value = ((colour * alpha + u32::from(ground) * (255 - alpha) + 127) / 255) as u8;
        }
    }
    laid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoders_panic_is_a_fault_of_the_picture() {
        let fails = || -> Result<(), Fault> { panic!("index out of bounds") };
        assert!(guarded(fails).is_err_and(|fault| fault.to_string().contains("the decoder gave up")));
    }
}
