//! Pillow's bicubic resizing, bit for bit, in the two orders of its passes.
#![cfg(feature = "onnx")]

mod golden;

use golden::{checksum, noise, read};
use grpo_rewards::resize::{PassOrder, pillow_bicubic};
use image::RgbImage;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    sizes: Vec<[[u32; 2]; 2]>,
    versions: Vec<Version>,
}

#[derive(Deserialize)]
struct Version {
    pillow: String,
    checksums: Vec<String>,
    /// The first pictures' bytes in full.
    bytes: Vec<String>,
}

#[test]
fn pictures_are_pillows_bit_for_bit() {
    let golden: Golden = read("resize.json");
    assert!(golden.sizes.len() >= 200);
    for (order, version) in [PassOrder::Pillow12, PassOrder::Pillow13].into_iter().zip(&golden.versions) {
        for (at, [[width, height], [to_width, to_height]]) in golden.sizes.iter().enumerate() {
            let resized = pillow_bicubic(&noise(*width, *height), *to_width, *to_height, order);
            assert_eq!(resized.dimensions(), (*to_width, *to_height));
            if let Some(bytes) = version.bytes.get(at) {
                let hex: String = resized.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(&hex, bytes, "{order:?} {width}x{height}");
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
    for order in [PassOrder::Pillow12, PassOrder::Pillow13] {
        for (width, height) in [(0, 0), (0, 5), (5, 0)] {
            assert_eq!(pillow_bicubic(&RgbImage::new(width, height), 3, 2, order), RgbImage::new(3, 2));
            assert_eq!(pillow_bicubic(&noise(3, 2), width, height, order), RgbImage::new(width, height));
        }
    }
}
