//! Pictures from files that anyone may have written.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use grpo::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};

/// The longest side that is decoded, in pixels.
const MAX_SIDE: u32 = 8192;
/// The most that a decoded picture may take, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// Opens a PNG or JPEG file as it is stored, up to 8192 pixels a side and 256 MiB decoded; transparency is dropped.
pub fn open_image(path: &Path) -> Result<RgbImage> {
    Ok(open(path)?.0.into_rgb8())
}

/// As [`open_image`], turned the way up that the file's EXIF data asks for.
pub fn open_image_upright(path: &Path) -> Result<RgbImage> {
    let (mut image, orientation) = open(path)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Width and height in pixels by the file's head, whatever its name; an error as of [`open_image`].
pub fn image_size(path: &Path) -> Result<(u32, u32)> {
    let read = || -> Result<(u32, u32), ImageError> { ImageReader::open(path)?.with_guessed_format()?.into_dimensions() };
    guarded(path, read)
}

fn open(path: &Path) -> Result<(DynamicImage, Orientation)> {
    guarded(path, || decode(path))?
}

/// Runs a decoder, whose panic is an error of the file.
fn guarded<T>(path: &Path, decode: impl FnOnce() -> Result<T, ImageError>) -> Result<T> {
    let decoded = catch_unwind(AssertUnwindSafe(decode))
        .map_err(|_| Error::file(path, "the decoder gave up; save the image again as PNG"))?;
    decoded.map_err(|error| match error {
        ImageError::IoError(error) => Error::file(path, error),
        other => Error::file(path, format!("{other}; give a PNG or JPEG file")),
    })
}

fn decode(path: &Path) -> Result<Result<(DynamicImage, Orientation)>, ImageError> {
    let mut reader = ImageReader::open(path)?.with_guessed_format()?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let ((width, height), bytes) = (decoder.dimensions(), decoder.total_bytes());
    if width > MAX_SIDE || height > MAX_SIDE || bytes > MAX_BYTES {
        let limit = format!("{MAX_SIDE} pixels a side and {} MiB", MAX_BYTES >> 20);
        let size = format!("{width}x{height} pixels, {} MiB decoded", bytes >> 20);
        return Ok(Err(Error::file(path, format!("the image has {size}; the limit is {limit}, make it smaller"))));
    }
    let orientation = decoder.orientation()?;
    Ok(Ok((DynamicImage::from_decoder(decoder)?, orientation)))
}
