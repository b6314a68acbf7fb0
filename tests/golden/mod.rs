//! Golden values, and the pictures that their programs were given.
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

use std::path::Path;

use image::{Rgb, RgbImage};
use serde::de::DeserializeOwned;

/// A file that stands beside the program that made it.
pub fn read<T: DeserializeOwned>(file: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The picture of this size that `resize.py` draws.
pub fn noise(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([0u32, 1, 2].map(|c| {
            let place = x.wrapping_mul(374_761_393).wrapping_add(y.wrapping_mul(668_265_263));
            let value = place.wrapping_add(c.wrapping_mul(2_246_822_519));
            let value = (value ^ (value >> 13)).wrapping_mul(1_274_126_177);
            ((value ^ (value >> 16)) & 255) as u8
        }))
    })
}

/// Adler-32, as eight hexadecimal digits.
pub fn checksum(bytes: &[u8]) -> String {
    let (a, b) = bytes.iter().fold((1, 0), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65_521;
        (a, (a + b) % 65_521)
    });
    format!("{b:04x}{a:04x}")
}
