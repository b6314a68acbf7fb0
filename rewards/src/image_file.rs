//! Pictures that anyone may have written, from files and from messages: what is decoded, and what becomes of the rest.

use std::io::{BufRead, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use grpo::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};

/// The longest side of a picture that is decoded, in pixels.
pub const MAX_SIDE: u32 = 8192;

/// What a picture may take when decoded, and all pictures of one request together: 256 MiB.
pub const MAX_DECODED_BYTES: u64 = 256 << 20;

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
    let size = || Ok(ImageReader::open(path)?.with_guessed_format()?.into_dimensions()?);
    guarded(size).map_err(|fault| Error::file(path, fault.0))
}

/// Decodes one of a request's pictures, where it takes at most `n_left` bytes as RGB.
pub(crate) fn decode_picture(bytes: &[u8], format: ImageFormat, n_left: u64) -> Result<RgbImage, String> {
    let picture = || Ok(decode(ImageReader::with_format(Cursor::new(bytes), format), n_left)?.0.into_rgb8());
    guarded(picture).map_err(|fault| fault.0)
}

fn open(path: &Path) -> Result<(DynamicImage, Orientation)> {
    let image = || decode(ImageReader::open(path)?.with_guessed_format()?, MAX_DECODED_BYTES);
    guarded(image).map_err(|fault| Error::file(path, fault.0))
}

/// Why there is no picture.
struct Fault(String);

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::IoError(error) => error.into(),
            other => Self(format!("{other}; give a PNG or JPEG file")),
        }
    }
}

/// Runs a decoder, whose panic is a fault of the picture.
fn guarded<T>(decode: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    let gave_up = |_| Err(Fault("the decoder gave up; save the image again as PNG".into()));
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(gave_up)
}

/// The size is compared with the limits before the pixels are decoded.
fn decode<R: BufRead + Seek>(mut reader: ImageReader<R>, n_left: u64) -> Result<(DynamicImage, Orientation), Fault> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let ((width, height), bytes) = (decoder.dimensions(), decoder.total_bytes());
    let limit = MAX_DECODED_BYTES >> 20;
    if width > MAX_SIDE || height > MAX_SIDE || bytes > MAX_DECODED_BYTES {
        let size = format!("{width}x{height} pixels, {} MiB decoded", bytes >> 20);
        let limit = format!("{MAX_SIDE} pixels a side and {limit} MiB");
        return Err(Fault(format!("the image has {size}; the limit is {limit}, make it smaller")));
    }
    if u64::from(width) * u64::from(height) * 3 > n_left {
        let size = format!("with its {width}x{height} pixels");
        return Err(Fault(format!("{size} the pictures decode to over {limit} MiB together; send fewer")));
    }
    let orientation = decoder.orientation()?;
    Ok((DynamicImage::from_decoder(decoder)?, orientation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoders_panic_is_a_fault_of_the_picture() {
        let fails = || -> Result<(), Fault> { panic!("index out of bounds") };
        assert!(guarded(fails).is_err_and(|fault| fault.0.contains("the decoder gave up")));
    }
}
