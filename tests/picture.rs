//! Pictures against Pillow's and SimpleAR's own programs, bit for bit, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod golden;

use golden::{checksum, noise, read};
use grpo::picture::resize::{PassOrder, pillow_bicubic};
use grpo::picture::{Fault, Transparency, centre_crop, decode};
use image::RgbImage;
use serde::Deserialize;

/// Both in width and height.
type FromTo = [[u32; 2]; 2];

#[derive(Deserialize)]
struct Resized {
    sizes: Vec<FromTo>,
    versions: Vec<Version>,
}

#[derive(Deserialize)]
struct Version {
    pillow: String,
    checksums: Vec<String>,
    /// The first pictures' bytes in full.
    bytes: Vec<String>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn pictures_are_pillows_bit_for_bit() {
    let golden: Resized = read("resize.json");
    assert!(golden.sizes.len() >= 200);
    for (order, version) in [PassOrder::Pillow12, PassOrder::Pillow13].into_iter().zip(&golden.versions) {
        for (at, [[width, height], [to_width, to_height]]) in golden.sizes.iter().enumerate() {
            let resized = pillow_bicubic(&noise(*width, *height), *to_width, *to_height, order);
            assert_eq!(resized.dimensions(), (*to_width, *to_height));
            if let Some(bytes) = version.bytes.get(at) {
                assert_eq!(&hex(&resized), bytes, "{order:?} {width}x{height}");
            }
            let which = format!("pillow {}: {width}x{height} to {to_width}x{to_height}", version.pillow);
            assert_eq!(checksum(&resized), version.checksums[at], "{which}");
        }
    }
    let [old, new] = &golden.versions[..] else { panic!("two versions of pillow") };
    let changed = old.checksums.iter().zip(&new.checksums).filter(|(old, new)| old != new).count();
    assert!(changed >= 20, "only {changed} pictures tell the two orders apart");
}

#[test]
fn empty_pictures_are_black_or_empty() {
    for (width, height) in [(0, 0), (0, 5), (5, 0)] {
        for order in [PassOrder::Pillow12, PassOrder::Pillow13] {
            assert_eq!(pillow_bicubic(&RgbImage::new(width, height), 3, 2, order), RgbImage::new(3, 2));
            assert_eq!(pillow_bicubic(&noise(3, 2), width, height, order), RgbImage::new(width, height));
        }
        assert_eq!(centre_crop(RgbImage::new(width, height), 3, 2), RgbImage::new(3, 2));
        assert_eq!(centre_crop(noise(3, 2), width, height), RgbImage::new(width, height));
    }
}

#[derive(Deserialize)]
struct Cropped {
    squares: Vec<FromTo>,
    rectangles: Vec<FromTo>,
    checksums: Vec<String>,
    /// The first pictures' bytes in full.
    bytes: Vec<String>,
}

#[test]
fn crops_are_simplears_bit_for_bit() {
    let golden: Cropped = read("crop.json");
    let cases: Vec<&FromTo> = golden.squares.iter().chain(&golden.rectangles).collect();
    assert!(golden.squares.len() >= 100 && cases.len() == golden.checksums.len());
    for (at, [[width, height], [to_width, to_height]]) in cases.into_iter().enumerate() {
        let cropped = centre_crop(noise(*width, *height), *to_width, *to_height);
        assert_eq!(cropped.dimensions(), (*to_width, *to_height));
        if let Some(bytes) = golden.bytes.get(at) {
            assert_eq!(&hex(&cropped), bytes, "{width}x{height} to {to_width}");
        }
        assert_eq!(checksum(&cropped), golden.checksums[at], "{width}x{height} to {to_width}x{to_height}");
    }
}

#[derive(Deserialize)]
struct Decoded {
    size: [u32; 2],
    colour: [u8; 3],
    cases: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    name: String,
    file: String,
    dropped: String,
    onto: String,
    /// How far a channel may be from Pillow's.
    tolerance: u8,
}

#[test]
fn files_of_every_kind_are_read_as_pillow_reads_them() {
    let golden: Decoded = read("decode.json");
    for case in &golden.cases {
        for (transparency, expected) in
            [(Transparency::Dropped, &case.dropped), (Transparency::Onto(golden.colour), &case.onto)]
        {
            let image = decode(&unhex(&case.file), transparency).unwrap();
            assert_eq!(image.dimensions(), golden.size.into(), "{}", case.name);
            let difference = image.iter().zip(unhex(expected)).map(|(ours, pillows)| ours.abs_diff(pillows)).max();
            assert!(difference <= Some(case.tolerance), "{}, {transparency:?}: {difference:?} levels", case.name);
        }
    }
}

#[test]
fn files_that_are_cut_short_are_damaged_and_what_follows_their_end_is_not_read() {
    let golden: Decoded = read("decode.json");
    for case in &golden.cases {
        let bytes = unhex(&case.file);
        let whole = decode(&bytes, Transparency::default()).unwrap();
        for length in 12..bytes.len() {
            // Headers may also be too short to tell what the file is, but never to give pixels.
            let fault = decode(&bytes[..length], Transparency::default()).unwrap_err();
            assert!(matches!(fault, Fault::Damaged(_)), "{} of {length} bytes: {fault:?}", case.name);
        }
        let longer = [&bytes[..], &bytes[..], b"more"].concat();
        assert_eq!(decode(&longer, Transparency::default()), Ok(whole), "{}", case.name);
    }
}

#[test]
fn a_thumbnails_end_is_not_the_pictures() {
    let golden: Decoded = read("decode.json");
    let bytes = unhex(&golden.cases.iter().find(|case| case.name == "jpeg").unwrap().file);
    // A comment behind the start that holds an end, in a file of which the last two bytes, its own end, are missing.
    let comment = [&bytes[..2], b"\xFF\xFE\x00\x06\xFF\xD9\xFF\xD9", &bytes[2..]].concat();
    assert!(decode(&comment, Transparency::Dropped).is_ok());
    let fault = decode(&comment[..comment.len() - 2], Transparency::Dropped).unwrap_err();
    assert!(fault.to_string().contains("its end is missing; get it again"), "{fault}");
}

#[test]
fn what_is_no_picture_of_ours_is_unknown_and_what_is_too_large_says_the_limit() {
    let unknown: [&[u8]; 3] = [b"", b"<html>", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"];
    for bytes in unknown {
        let fault = decode(bytes, Transparency::default()).unwrap_err();
        assert!(
            matches!(&fault, Fault::Unknown(message) if message.contains("give a PNG, JPEG or WebP file")),
            "{fault}"
        );
    }
    let golden: Decoded = read("decode.json");
    let file = |name: &str| unhex(&golden.cases.iter().find(|case| case.name == name).unwrap().file);
    let mut jpeg = file("jpeg");
    let frame = jpeg.windows(2).position(|two| two == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0x20, 0x01, 0x00, 0x10]);
    let fault = decode(&jpeg, Transparency::default()).unwrap_err();
    assert!(
        matches!(&fault, Fault::TooLarge(message) if message.contains("has 16x8193 pixels, 0 MiB decoded; the limit is 8192 pixels a side")),
        "{fault}"
    );
}

#[test]
fn a_transparency_is_written_in_a_configuration() {
    #[derive(Deserialize)]
    struct Config {
        transparency: Transparency,
    }
    let read = |text: &str| toml::from_str::<Config>(text).unwrap().transparency;
    assert_eq!(read("transparency = \"dropped\""), Transparency::Dropped);
    assert_eq!(read("transparency = { onto = [0, 1, 2] }"), Transparency::Onto([0, 1, 2]));
    assert_eq!(Transparency::default(), Transparency::Onto([255, 255, 255]));
}
