//! Files that are judged, and the pictures of one message: what is decoded, and what becomes of the rest.

use std::io::{BufRead, Cursor, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use super::MAX_DECODED_BYTES;
use super::decode::{Fault, check_size, guarded, limits};
use crate::{Error, Result};

/// Opens a PNG, JPEG or WebP file as it is stored, up to 8192 pixels a side and 256 MiB decoded; transparency is dropped.
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
    guarded(size).map_err(|fault| Error::file(path, fault))
}

/// Decodes one of several pictures that are sent together, where it takes at most `n_left` bytes as RGB; transparency is
/// dropped.
pub fn decode_within(bytes: &[u8], format: ImageFormat, n_left: u64) -> Result<RgbImage, Fault> {
    guarded(|| Ok(decode(ImageReader::with_format(Cursor::new(bytes), format), n_left)?.0.into_rgb8()))
}

/// Whether the path ends as those of PNG, JPEG and WebP files do.
pub fn is_named_as_image(path: &Path) -> bool {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    ending.is_some_and(|ending| ["png", "jpg", "jpeg", "webp"].contains(&ending.as_str()))
}

fn open(path: &Path) -> Result<(DynamicImage, Orientation)> {
    let image = || decode(ImageReader::open(path)?.with_guessed_format()?, MAX_DECODED_BYTES);
    guarded(image).map_err(|fault| Error::file(path, fault))
}

/// The size is compared with the limits before the pixels are decoded.
fn decode<R: BufRead + Seek>(mut reader: ImageReader<R>, n_left: u64) -> Result<(DynamicImage, Orientation), Fault> {
    reader.limits(limits());
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    check_size((width, height), decoder.total_bytes())?;
    if u64::from(width) * u64::from(height) * 3 > n_left {
        let size = format!("with its {width}x{height} pixels");
        let limit = MAX_DECODED_BYTES >> 20;
        let message = format!("{size} the pictures decode to over {limit} MiB together; send fewer");
        return Err(Fault::TooLarge(message));
    }
    let orientation = decoder.orientation()?;
    Ok((DynamicImage::from_decoder(decoder)?, orientation))
}
