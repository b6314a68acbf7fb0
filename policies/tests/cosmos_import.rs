//! The import of NVIDIA's weights against NVIDIA's own modules (`golden/cosmos_nvidia.py`).

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use grpo_policies::cosmos::{Cosmos, CosmosConfig, CosmosFiles, PublishedCosmos};
use grpo_policies::safetensors_file::Precision;
use image::RgbImage;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cosmos_nvidia").join(name)
}

fn imported(files: &CosmosFiles) -> Cosmos {
    PublishedCosmos::read(files).unwrap().fold(&Device::Cpu).unwrap()
}

fn parts() -> CosmosFiles {
    CosmosFiles::in_folder(golden("")).unwrap()
}

/// A case of golden.json.
#[derive(serde::Deserialize)]
struct Case {
    size: [usize; 2],
    codes: Vec<u32>,
    places: Vec<u32>,
    pixels: Vec<f32>,
}

impl Case {
    /// The picture of the generating program.
    fn image(&self) -> RgbImage {
        RgbImage::from_fn(self.size[1] as u32, self.size[0] as u32, |x, y| {
            image::Rgb(std::array::from_fn(|c| {
                let c = c as u32;
                let coarse = ((x / 8) * 37 + (y / 8) * 91 + c * 53 + (x / 8) * (y / 8) * 29) % 200;
                (coarse + (x * 7 + y * 13 + c * 5) % 56) as u8
            }))
        })
    }
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(golden("golden.json")).unwrap()).unwrap()
}

#[test]
fn codes_and_pixels_are_nvidias() {
    let tokenizer = imported(&parts());
    assert_eq!(tokenizer.config(), &CosmosConfig { channels: 6, ..CosmosConfig::dv8x16x16() });
    for case in cases() {
        let codes = tokenizer.encode(&[&case.image()]).unwrap();
        let wrong = codes[0].iter().zip(&case.codes).filter(|(got, expected)| got != expected).count();
        assert_eq!((codes[0].len(), wrong), (case.codes.len(), 0), "{:?}", case.size);
        let grid = tokenizer.grid(case.size[0], case.size[1]).unwrap();
        let pixels = tokenizer.reconstruct(&tokenizer.values(&codes, grid).unwrap()).unwrap();
        let places = Tensor::new(case.places, &Device::Cpu).unwrap();
        let got: Vec<f32> = pixels.flatten_all().unwrap().index_select(&places, 0).unwrap().to_vec1().unwrap();
        let error = got.iter().zip(&case.pixels).map(|(got, expected)| (got - expected).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{:?}: largest error {error}", case.size);
    }
}

#[test]
fn a_state_dict_and_scripted_modules_give_the_same_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let saved = |files: &CosmosFiles, name: &str| {
        let out = folder.path().join(name);
        imported(files).save(&out, Precision::F32).unwrap();
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(saved(&parts(), "parts") == saved(&CosmosFiles::Whole(golden("model.pt")), "whole"));
}

fn error_of(files: &CosmosFiles) -> String {
    PublishedCosmos::read(files).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn tensors_and_parameters_are_counted_without_buffers() {
    let published = PublishedCosmos::read(&parts()).unwrap();
    assert_eq!((published.n_tensors(), published.n_parameters()), (322, 399_078));
}

#[test]
fn files_that_are_wrong_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = std::fs::read(golden("encoder.jit")).unwrap();
    for length in [0, 1, 21, 22, 1000, whole.len() / 2, whole.len() - 30_000, whole.len() - 1] {
        std::fs::write(path("cut.jit"), &whole[..length]).unwrap();
        let message = error_of(&CosmosFiles::Whole(path("cut.jit")));
        assert!(message.contains("cut.jit: ") && message.contains("cut short"), "{length}: {message}");
    }
    let swapped = CosmosFiles::Parts { encoder: golden("decoder.jit"), decoder: golden("encoder.jit") };
    let message = error_of(&swapped);
    assert!(message.contains("decoder.jit: holds 0 tensors `encoder.conv_in.0.conv3d.weight`"), "{message}");
    let twice = CosmosFiles::Parts { encoder: golden("model.pt"), decoder: golden("model.pt") };
    let message = error_of(&twice);
    assert!(message.contains("tensor `decoder.conv_in.0.conv3d.bias` is in "), "{message}");
    let half = PublishedCosmos::read(&CosmosFiles::Whole(golden("encoder.jit"))).unwrap();
    let message = half.fold(&Device::Cpu).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(
        message.contains("encoder.jit: tensor `post_quant_conv.conv3d.weight` of shape [16, 6, 1, 1, 1] is missing")
    );
    let message = CosmosFiles::in_folder(folder.path()).unwrap_err().to_string();
    assert!(message.contains("holds neither encoder.jit and decoder.jit nor model.pt"), "{message}");
    std::fs::copy(golden("model.pt"), path("model.pt")).unwrap();
    assert_eq!(CosmosFiles::in_folder(folder.path()).unwrap(), CosmosFiles::Whole(path("model.pt")));
}
