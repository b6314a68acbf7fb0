//! JPEG, decoded by `zune-jpeg` itself.
//!
//! `image` calls the same decoder and lets it fill the rest of a file that was cut short with grey; here it is strict, and
//! since it still passes over a missing end, the end is looked for first. What is missing before an end that is there is
//! filled up even so, and Pillow fills it up too. Pixels differ from those of Pillow's libjpeg-turbo by what two sound
//! decoders differ: transform, chroma and colours are rounded otherwise, by 0.4 levels in the mean and 4 at most on two
//! photograph-like pictures of 1024 rows.

use image::RgbImage;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

use super::decode::{Fault, check_size, number};

/// The markers of restarts within a scan, which are followed by more of it.
const RESTARTS: std::ops::RangeInclusive<u8> = 0xD0..=0xD7;
const START_OF_SCAN: u8 = 0xDA;
const END: u8 = 0xD9;

/// Baseline and progressive, grey, YCbCr, RGB, and CMYK by Adobe's convention that it is stored inverted, as Pillow has it.
pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Fault> {
    // Sides are compared by ourselves, who say the limit.
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(fault)?;
    let (width, height) = decoder.dimensions().ok_or_else(|| damaged("it has no size"))?;
    let size = (width as u32, height as u32);
    check_size(size, u64::from(size.0) * u64::from(size.1) * 3)?;
    // The headers reach to the scan, so an end that is the file's own is behind it; a walk is for files with more behind.
    if !bytes.ends_with(&[0xFF, END]) && !has_end(bytes) {
        return Err(damaged("its end is missing"));
    }
    let pixels = decoder.decode().map_err(fault)?;
    RgbImage::from_raw(size.0, size.1, pixels).ok_or_else(|| damaged("it has too few pixels"))
}

fn damaged(what: &str) -> Fault {
    Fault::Damaged(format!("the JPEG file is damaged: {what}; get it again"))
}

fn fault(error: DecodeErrors) -> Fault {
    match error {
        DecodeErrors::Unsupported(kind) => {
            Fault::Unknown(format!("a JPEG file of this kind is not decoded ({kind:?}); save it again as baseline"))
        }
        other => damaged(&format!("{other:?}")),
    }
}

/// Whether the end is marked behind a scan, outside of the segments: a thumbnail in one of them has an end of its own.
fn has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    let mut has_scan = false;
    while let Some((marker, behind)) = next_marker(bytes, at) {
        at = match marker {
            END => return has_scan,
            0 | 0x01 | 0xD8 => behind,
            restart if RESTARTS.contains(&restart) => behind,
            _ => match number(bytes, behind, u16::from_be_bytes) {
                Some(length) => behind + usize::from(length),
                None => return false,
            },
        };
        has_scan |= marker == START_OF_SCAN;
    }
    false
}

/// The first byte behind 0xFF that is not another one, at or after this place, and the place after it. Within a scan 0 is
/// no marker: the 0xFF before it was data.
fn next_marker(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    let first = at + bytes.get(at..)?.iter().position(|&byte| byte == 0xFF)?;
    let length = bytes[first..].iter().position(|&byte| byte != 0xFF)?;
    Some((bytes[first + length], first + length + 1))
}
