//! The question: written by a reward, read by a scorer.

use std::collections::BTreeMap;

use grpo::{Error, Prompt, Result};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageFormat, RgbImage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Verdict;
use grpo::picture::decode_within;

pub use grpo::picture::{MAX_DECODED_BYTES, MAX_SIDE};

/// The version of the message; a scorer refuses one that it does not know.
pub const PROTOCOL: u32 = 1;

/// How pictures travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Encoding {
    /// Without loss: the scorer sees the very pixels.
    #[default]
    Png,
    /// With loss: scores change, so it belongs to the science of a run, not to its speed.
    Jpeg {
        /// From 1 to 100.
        quality: u8,
    },
}

impl Encoding {
    fn label(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg { .. } => "jpeg",
        }
    }

    fn append(self, image: &RgbImage, bytes: &mut Vec<u8>) -> Result<(), String> {
        let (width, height) = image.dimensions();
        if width == 0 || height == 0 {
            return Err(format!("image is {width} x {height} pixels; give one with at least one pixel"));
        }
        let color = ExtendedColorType::Rgb8;
        let written = match self {
            // The encoder's setting for speed over size; the pixels are the same under every one.
            Self::Png => PngEncoder::new_with_quality(bytes, CompressionType::Fast, FilterType::Adaptive)
                .write_image(image, width, height, color),
            Self::Jpeg { quality } => {
                JpegEncoder::new_with_quality(bytes, quality).write_image(image, width, height, color)
            }
        };
        written.map_err(|error| format!("image of {width} x {height} pixels cannot be encoded: {error}"))
    }
}

/// A prompt with its columns, empty ones too: a scorer may read `columns` without asking whether it is there.
#[derive(Serialize)]
struct PromptLine<'a> {
    text: &'a str,
    columns: &'a BTreeMap<String, Value>,
}

#[derive(Serialize)]
struct HeaderLine<'a> {
    protocol: u32,
    id: u64,
    encoding: &'static str,
    prompts: Vec<PromptLine<'a>>,
    images: Vec<usize>,
}

/// A question as it is sent.
pub(crate) struct Question {
    /// Which answer belongs to it.
    pub id: u64,
    /// How many pictures it holds.
    pub n_images: usize,
    /// The header line, its line feed, and the pictures.
    pub body: Vec<u8>,
}

impl Question {
    /// Asks about `rows` by `send`, and gives every row its verdict.
    ///
    /// A picture that cannot be encoded fails its own row and is left out of the question; where `send` fails, all
    /// that were asked about do.
    pub(crate) fn ask<T>(
        rows: &[(&Prompt, &RgbImage)],
        id: u64,
        encoding: Encoding,
        send: impl FnOnce(Self) -> Result<Vec<Verdict<T>>, String>,
    ) -> Vec<Verdict<T>> {
        let mut pictures = Vec::new();
        let mut header = HeaderLine {
            protocol: PROTOCOL,
            id,
            encoding: encoding.label(),
            prompts: Vec::with_capacity(rows.len()),
            images: Vec::with_capacity(rows.len()),
        };
        let mut unsent: Vec<Option<String>> = Vec::with_capacity(rows.len());
        for (prompt, image) in rows {
            let before = pictures.len();
            let encoded = encoding.append(image, &mut pictures);
            if encoded.is_ok() {
                header.prompts.push(PromptLine { text: &prompt.text, columns: &prompt.columns });
                header.images.push(pictures.len() - before);
            } else {
                pictures.truncate(before);
            }
            unsent.push(encoded.err());
        }
        let n_images = header.images.len();
        let answered = match serde_json::to_vec(&header) {
            _ if n_images == 0 => Ok(Vec::new()),
            Err(error) => Err(format!("the prompts cannot be written as JSON: {error}")),
            Ok(mut body) => {
                body.push(b'\n');
                body.append(&mut pictures);
                send(Self { id, n_images, body })
            }
        };
        let mut answered = answered.map(Vec::into_iter);
        let verdict = |unsent: Option<String>| match (unsent, &mut answered) {
            (Some(message), _) => Err(message),
            (None, Err(message)) => Err(message.clone()),
            (None, Ok(verdicts)) => verdicts.next().unwrap_or_else(|| Err("the scorer said nothing of it".into())),
        };
        unsent.into_iter().map(verdict).collect()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    protocol: u32,
    id: u64,
    encoding: String,
    prompts: Vec<Prompt>,
    images: Vec<usize>,
}

/// A question as a scorer written in Rust reads it.
#[derive(Clone, Debug)]
pub struct Request {
    /// To be repeated in the answer.
    pub id: u64,
    /// What each picture was drawn for.
    pub prompts: Vec<Prompt>,
    /// The pictures, in the order of the prompts.
    pub images: Vec<RgbImage>,
}

impl Request {
    /// Reads and decodes a whole message within [`MAX_SIDE`] and [`MAX_DECODED_BYTES`].
    ///
    /// The caller bounds the length of `body`. Counts and lengths are compared before anything is decoded, and a
    /// picture's size before its pixels are.
    pub fn read(body: &[u8]) -> Result<Self> {
        let end = body.iter().position(|&byte| byte == b'\n');
        let end = end.ok_or_else(|| refused("its first line has no end; send a line of JSON, then the pictures"))?;
        let header: Header =
            serde_json::from_slice(&body[..end]).map_err(|error| refused(format!("its first line: {error}")))?;
        let (prompts, lengths) = (header.prompts, header.images);
        if header.protocol != PROTOCOL {
            return Err(refused(format!("its protocol is {}; this scorer speaks {PROTOCOL}", header.protocol)));
        }
        if prompts.len() != lengths.len() {
            return Err(refused(format!("it holds {} prompts for {} images", prompts.len(), lengths.len())));
        }
        let mut rest = &body[end + 1..];
        let announced = lengths.iter().try_fold(0_usize, |sum, &n| sum.checked_add(n));
        if announced != Some(rest.len()) {
            let announced = announced.map_or("too many".into(), |n| n.to_string());
            return Err(refused(format!("it announces {announced} bytes of images and holds {}", rest.len())));
        }
        let format = match header.encoding.as_str() {
            "png" => ImageFormat::Png,
            "jpeg" => ImageFormat::Jpeg,
            other => return Err(refused(format!("its encoding is `{other}`; send png or jpeg"))),
        };
        let mut budget = MAX_DECODED_BYTES;
        let mut images = Vec::new();
        for (row, n_bytes) in lengths.into_iter().enumerate() {
            let (picture, behind) = rest.split_at(n_bytes);
            rest = behind;
            let image = decode_within(picture, format, budget);
            let image = image.map_err(|error| refused(format!("image {row}: {error}")))?;
            budget = budget.saturating_sub(image.as_raw().len() as u64);
            images.push(image);
        }
        Ok(Self { id: header.id, prompts, images })
    }
}

fn refused(message: impl std::fmt::Display) -> Error {
    Error::config(format!("the request cannot be read: {message}"))
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn body(rows: &[(&Prompt, &RgbImage)], encoding: Encoding) -> Vec<u8> {
        let mut sent = Vec::new();
        Question::ask::<f32>(rows, 7, encoding, |question| {
            assert_eq!(question.n_images, rows.len());
            sent = question.body;
            Ok(Vec::new())
        });
        sent
    }

    fn picture(width: u32) -> RgbImage {
        RgbImage::from_fn(width, 5, |x, y| Rgb([x as u8, y as u8 * 50, 7]))
    }

    #[test]
    fn what_is_written_is_read_to_the_pixel() {
        let prompts =
            [Prompt::new("a \"cat\"\nand a dog"), Prompt::new("two").with("count", 2).with("tag", "counting")];
        let images = [picture(9), picture(300)];
        let rows: Vec<_> = prompts.iter().zip(&images).collect();
        let request = Request::read(&body(&rows, Encoding::Png)).unwrap();
        assert_eq!((request.id, &request.prompts[..], &request.images[..]), (7, &prompts[..], &images[..]));
        let jpeg = Request::read(&body(&rows, Encoding::Jpeg { quality: 90 })).unwrap();
        assert_eq!(jpeg.images[1].dimensions(), (300, 5));
        assert_ne!(jpeg.images, images, "JPEG is another picture, as its documentation says");
    }

    #[test]
    fn a_picture_that_cannot_be_encoded_fails_alone() {
        let prompt = Prompt::new("x");
        let images = [picture(2), RgbImage::new(0, 3), picture(4)];
        let rows: Vec<_> = images.iter().map(|image| (&prompt, image)).collect();
        let verdicts = Question::ask(&rows, 0, Encoding::Png, |question| {
            assert_eq!(Request::read(&question.body).unwrap().images, [picture(2), picture(4)]);
            Ok(vec![Ok(0.5), Ok(0.25)])
        });
        assert_eq!((&verdicts[0], &verdicts[2]), (&Ok(0.5), &Ok(0.25)));
        assert!(verdicts[1].as_ref().unwrap_err().contains("image is 0 x 3 pixels"));
    }

    fn refusal(header: &str, pictures: &[u8]) -> String {
        Request::read(&[header.as_bytes(), b"\n", pictures].concat()).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        let header = |rest: &str| format!(r#"{{"protocol":1,"id":0,"encoding":"png",{rest}}}"#);
        let prompt = r#"{"text":"x","columns":{}}"#;
        let cases = [
            (header(&format!(r#""prompts":[{prompt}],"images":[]"#)), "1 prompts for 0 images"),
            (header(&format!(r#""prompts":[{prompt}],"images":[4]"#)), "announces 4 bytes of images and holds 3"),
            (header(&format!(r#""prompts":[{prompt}],"images":[3]"#)), "image 0:"),
            (header(r#""prompts":[],"images":[],"extra":1"#), "unknown field `extra`"),
            (r#"{"protocol":2,"id":0,"encoding":"png","prompts":[],"images":[]}"#.into(), "its protocol is 2"),
            (r#"{"protocol":1,"id":0,"encoding":"bmp","prompts":[],"images":[]}"#.into(), "its encoding is `bmp`"),
            (
                header(&format!(r#""prompts":[{prompt},{prompt}],"images":[{},{}]"#, usize::MAX, 4)),
                "announces too many bytes",
            ),
        ];
        for (header, expected) in cases {
            let pictures: &[u8] =
                if header.contains("bmp") || header.contains("\"protocol\":2") { b"" } else { b"abc" };
            let pictures = if header.contains("\"images\":[]") && !header.contains("\"x\"") { b"" } else { pictures };
            let message = refusal(&header, pictures);
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
        assert!(Request::read(b"{}").unwrap_err().to_string().contains("first line has no end"));
    }

    /// A PNG head that claims a size; nothing behind it.
    fn claims(width: u32, height: u32) -> Vec<u8> {
        let mut png = Vec::new();
        let data = RgbImage::new(1, 1);
        PngEncoder::new(&mut png).write_image(&data, 1, 1, ExtendedColorType::Rgb8).unwrap();
        png[16..20].copy_from_slice(&width.to_be_bytes());
        png[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = png[12..29].iter().fold(!0_u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
        });
        png[29..33].copy_from_slice(&(!crc).to_be_bytes());
        png
    }

    #[test]
    fn pictures_beyond_the_limits_are_refused_before_they_are_decoded() {
        let ask = |pictures: &[Vec<u8>]| {
            let lengths: Vec<usize> = pictures.iter().map(Vec::len).collect();
            let prompts = vec![r#"{"text":"x"}"#; pictures.len()].join(",");
            let header =
                format!(r#"{{"protocol":1,"id":0,"encoding":"png","prompts":[{prompts}],"images":{lengths:?}}}"#);
            refusal(&header, &pictures.concat())
        };
        assert!(
            ask(&[claims(8193, 1)])
                .contains("image 0: the image has 8193x1 pixels, 0 MiB decoded; the limit is 8192 pixels a side")
        );
        let picture = claims(8192, 8192);
        let message = ask(std::slice::from_ref(&picture));
        assert!(
            message.contains("image 0: ") && !message.contains("MiB"),
            "within the limits, and cut short: {message}"
        );
        let mut large = Vec::new();
        let row = RgbImage::new(8000, 8000);
        PngEncoder::new(&mut large).write_image(&row, 8000, 8000, ExtendedColorType::Rgb8).unwrap();
        let message = ask(&[large, picture]);
        assert!(
            message.contains("image 1: with its 8192x8192 pixels the pictures decode to over 256 MiB"),
            "{message}"
        );
    }
}
