//! The tokenizer against the three-dimensional original (`golden/cosmos.py`), and its contract.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use grpo::{Gradients, OptimConfig, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig, Reconstruction, ReconstructionPlan};
use grpo_policies::safetensors_file::{Precision, read_bytes};
use grpo_policies::stage::{Stage, StageLog, StagePlan};
use image::RgbImage;

const GOLDEN_WEIGHTS: &[u8] = include_bytes!("golden/cosmos.safetensors");

/// What golden/cosmos.py stores.
#[derive(serde::Deserialize)]
struct Golden {
    config: CosmosConfig,
    shape: [usize; 4],
    bytes: Vec<u8>,
    latents: Vec<f32>,
    codes: Vec<Vec<u32>>,
    pixels: Vec<f32>,
}

impl Golden {
    fn read() -> Self {
        serde_json::from_str(include_str!("golden/cosmos.json")).unwrap()
    }

    fn tokenizer(&self) -> Cosmos {
        Cosmos::from_bytes(self.config.clone(), GOLDEN_WEIGHTS, &Device::Cpu).unwrap()
    }

    fn images(&self) -> Vec<RgbImage> {
        let [_, h, w, _] = self.shape;
        let images = self.bytes.chunks(h * w * 3);
        images.map(|bytes| RgbImage::from_raw(w as u32, h as u32, bytes.to_vec()).unwrap()).collect()
    }

    fn input(&self) -> Tensor {
        let values: Vec<f32> = self.bytes.iter().map(|&byte| f32::from(byte) / 127.5 - 1.0).collect();
        Tensor::from_vec(values, &self.shape[..], &Device::Cpu).unwrap()
    }

    fn grid(&self) -> (usize, usize) {
        (self.shape[1] / 16, self.shape[2] / 16)
    }
}

fn assert_close(got: &Tensor, expected: &[f32], tolerance: f32) {
    let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got.len(), expected.len());
    let error = got.iter().zip(expected).map(|(got, expected)| (got - expected).abs()).fold(0.0, f32::max);
    assert!(error <= tolerance, "largest error {error}");
}

/// A picture with a few coloured bars, different for each seed.
fn picture(seed: u64, side: u32) -> RgbImage {
    let mut draws = Seed::new(seed).draws();
    let bars: Vec<[u8; 3]> = (0..8).map(|_| std::array::from_fn(|_| draws.below(256) as u8)).collect();
    RgbImage::from_fn(side, side, |x, y| image::Rgb(bars[((x / 8 + y / 16) % 8) as usize]))
}

fn small() -> CosmosConfig {
    CosmosConfig { channels: 8, ..CosmosConfig::shapes() }
}

fn fresh(config: CosmosConfig) -> Cosmos {
    Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap()
}

#[test]
fn the_folded_network_equals_the_three_dimensional_one() {
    let golden = Golden::read();
    let tokenizer = golden.tokenizer();
    let latents = tokenizer.latents(&golden.input()).unwrap();
    assert_close(&latents, &golden.latents, 1e-4);
    assert_eq!(tokenizer.quantize(&latents).unwrap(), golden.codes);
    let values = tokenizer.values(&golden.codes, golden.grid()).unwrap();
    assert_close(&tokenizer.reconstruct(&values).unwrap(), &golden.pixels, 1e-4);
}

#[test]
fn images_get_the_golden_codes_and_rounded_pixels() {
    let golden = Golden::read();
    let (tokenizer, images) = (golden.tokenizer(), golden.images());
    let codes = tokenizer.encode(&images.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(codes, golden.codes);
    let decoded = tokenizer.decode(&codes, golden.grid()).unwrap();
    let bytes: Vec<u8> = decoded.iter().flat_map(|image| image.as_raw()).copied().collect();
    let mut off_by_one = 0;
    for (&byte, pixel) in bytes.iter().zip(&golden.pixels) {
        let exact = (f64::from(pixel.clamp(-1.0, 1.0)) + 1.0) / 2.0 * 255.0;
        assert!((f64::from(byte) - exact).abs() <= 0.51, "{byte} {exact}");
        off_by_one += usize::from(byte != (exact + 0.5) as u8);
    }
    assert!(off_by_one < 10, "{off_by_one}");
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let golden = Golden::read();
    let (tokenizer, images) = (golden.tokenizer(), golden.images());
    for (image, codes) in images.iter().zip(&golden.codes) {
        assert_eq!(&tokenizer.encode(&[image]).unwrap()[0], codes);
    }
    let together = tokenizer.decode(&golden.codes, golden.grid()).unwrap();
    let alone = tokenizer.decode(&golden.codes[1..], golden.grid()).unwrap();
    let differences = together[1].as_raw().iter().zip(alone[0].as_raw()).filter(|(a, b)| a.abs_diff(**b) > 1).count();
    assert_eq!(differences, 0);
}

#[test]
fn one_thread_gives_the_bits_of_three() {
    let tokenizer = fresh(small());
    let images: Vec<RgbImage> = (0..3).map(|seed| picture(seed, 64)).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let images: Vec<&RgbImage> = images.iter().collect();
            let mut gradients = Gradients::new();
            gradients.add_backward(&tokenizer.train_loss(&images).unwrap(), &tokenizer.params()).unwrap();
            (tokenizer.encode(&images).unwrap(), gradients.norm().unwrap())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn every_parameter_gets_a_gradient() {
    // Two temporal levels, so that every kind of part exists.
    for config in [small(), CosmosConfig { channels: 8, ..Golden::read().config }] {
        let tokenizer = fresh(config);
        let (first, second) = (picture(1, 64), picture(2, 64));
        let mut gradients = Gradients::new();
        gradients.add_backward(&tokenizer.train_loss(&[&first, &second]).unwrap(), &tokenizer.params()).unwrap();
        for (name, _) in tokenizer.params().iter() {
            let gradient = gradients.get(name).unwrap_or_else(|| panic!("`{name}` gets none"));
            let size = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            // Softmax does not see what is added to all scores of a row, which is all that k's bias does.
            assert!(size > 0.0 || name.ends_with(".k.bias"), "`{name}` gets zeros");
        }
    }
}

#[test]
fn a_small_tokenizer_learns_four_pictures() {
    let pictures = (0..4).map(|seed| picture(seed, 32)).collect();
    let plan = ReconstructionPlan { batch: 4, validation_images: 0 };
    let learner = Reconstruction::new(fresh(small()), plan, pictures, Seed::new(0)).unwrap();
    let loss = |tokenizer: &Cosmos| {
        let pictures: Vec<RgbImage> = (0..4).map(|seed| picture(seed, 32)).collect();
        let loss = tokenizer.train_loss(&pictures.iter().collect::<Vec<_>>()).unwrap();
        loss.to_scalar::<f32>().unwrap()
    };
    let before = loss(learner.cosmos());
    let optim = OptimConfig { lr: 5e-3, n_warmup: 5, ..OptimConfig::default() };
    let plan = StagePlan { seed: 0, n_steps: 60, optim, ema: None, max_skips_in_row: 3, log: StageLog::default() };
    let mut stage = Stage::new(plan, learner).unwrap();
    stage.run().unwrap();
    let after = loss(stage.learner().cosmos());
    assert!(after < 0.4 * before, "{before} {after}");
}

#[test]
fn saved_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = fresh(small());
    let image = picture(3, 64);
    tokenizer.save(folder.path(), Precision::F32).unwrap();
    let loaded = Cosmos::load(folder.path(), &Device::Cpu).unwrap();
    assert_eq!(loaded.config(), tokenizer.config());
    assert!(loaded.params().is_empty());
    assert_eq!(loaded.encode(&[&image]).unwrap(), tokenizer.encode(&[&image]).unwrap());
    tokenizer.save(folder.path(), Precision::Bf16).unwrap();
    let rounded = Cosmos::load(folder.path(), &Device::Cpu).unwrap();
    assert_eq!(rounded.encode(&[&image]).unwrap()[0].len(), 64);
}

fn golden_tensors() -> BTreeMap<String, Tensor> {
    read_bytes("golden", GOLDEN_WEIGHTS).unwrap()
}

fn error_of(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> String {
    let mut tensors = golden_tensors();
    change(&mut tensors);
    match Cosmos::new(Golden::read().config, tensors, &Device::Cpu) {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn wrong_tensors_are_named_with_both_shapes() {
    let check = |change: fn(&mut BTreeMap<String, Tensor>), expected: &str| {
        let message = error_of(change);
        assert!(message.contains(expected), "{message}");
    };
    let cpu = &Device::Cpu;
    check(|t| drop(t.remove("quant_conv.bias")), "tensor `quant_conv.bias` of shape [4] is missing");
    check(
        |t| drop(t.insert("quant_conv.bias".into(), Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap())),
        "tensor `quant_conv.bias` has shape [5]; the configuration asks for [4]",
    );
    check(
        |t| drop(t.insert("quant_conv.extra".into(), Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap())),
        "tensor `quant_conv.extra` of shape [5]",
    );
    check(
        |t| drop(t.insert("quant_conv.bias".into(), Tensor::new(&[0f32, 1.0, f32::NAN, 0.0], &Device::Cpu).unwrap())),
        "tensor `quant_conv.bias` holds numbers that are not finite",
    );
    let cut = Cosmos::from_bytes(Golden::read().config, &GOLDEN_WEIGHTS[..GOLDEN_WEIGHTS.len() / 2], cpu);
    assert!(cut.is_err());
}

#[test]
fn codes_and_sizes_that_cannot_be_are_errors() {
    let tokenizer = fresh(small());
    let check = |result: grpo::Result<Vec<RgbImage>>, expected: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(tokenizer.decode(&[vec![0; 63]], (8, 8)), "image 0 has 63 codes; a grid of 8 x 8");
    check(tokenizer.decode(&[vec![]], (0, 8)), "image 0 has 0 codes");
    check(tokenizer.decode(&[vec![0; 4]], (usize::MAX, 2)), "image 0 has 4 codes");
    let beyond = tokenizer.n_codes();
    check(tokenizer.decode(&[vec![0], vec![beyond]], (1, 1)), "image 1 holds code 1600; codes run from 0 to 1599");
    let odd = RgbImage::new(64, 60);
    let message = tokenizer.encode(&[&odd]).unwrap_err().to_string();
    assert!(message.contains("60 rows and 64 columns"), "{message}");
    let message = tokenizer.encode(&[&RgbImage::new(64, 64), &RgbImage::new(32, 64)]).unwrap_err().to_string();
    assert!(message.contains("image 1 is 32 x 64 and the first 64 x 64"), "{message}");
    assert!(tokenizer.encode(&[]).unwrap().is_empty());
}

#[test]
fn a_frozen_tokenizer_cannot_be_trained() {
    let plan = ReconstructionPlan { batch: 1, validation_images: 0 };
    let error =
        Reconstruction::new(Golden::read().tokenizer(), plan, vec![picture(0, 32)], Seed::new(0)).err().unwrap();
    assert!(error.to_string().contains("loaded frozen"), "{error}");
}

/// Precision of a file is not what tells tokenizers apart; a weight is.
#[test]
fn a_fingerprint_survives_saving_and_no_change() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = fresh(small());
    let fingerprint = tokenizer.fingerprint().unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        tokenizer.save(folder.path(), precision).unwrap();
        assert_eq!(Cosmos::load(folder.path(), &Device::Cpu).unwrap().fingerprint().unwrap(), fingerprint);
    }
    let mut tensors = golden_tensors();
    let whole = Cosmos::new(Golden::read().config, tensors.clone(), &Device::Cpu).unwrap().fingerprint().unwrap();
    let bias = (tensors.get("quant_conv.bias").unwrap() + 0.1).unwrap();
    tensors.insert("quant_conv.bias".into(), bias);
    assert_ne!(Cosmos::new(Golden::read().config, tensors, &Device::Cpu).unwrap().fingerprint().unwrap(), whole);
}

/// The operations that other devices have against the CPU's own kernels; f16 shows that no f32 is left between.
/// Pixels deviate by 5 here, and by 0.05 from the golden ones in f16.
#[test]
fn other_types_give_nearly_the_same() {
    let golden = Golden::read();
    let (tokenizer, input) = (golden.tokenizer(), golden.input());
    for (dtype, of_latents, of_pixels) in [(DType::F64, 1e-5, 1e-5), (DType::F16, 0.02, 0.15)] {
        let cast = tokenizer.to_dtype(dtype).unwrap();
        assert_close(&cast.latents(&input).unwrap(), &golden.latents, of_latents);
        let values = cast.values(&golden.codes, golden.grid()).unwrap();
        assert_close(&cast.reconstruct(&values).unwrap(), &golden.pixels, of_pixels);
    }
    for (dtype, expected) in [(DType::BF16, "cannot compute in bf16 on a CPU"), (DType::U8, "cannot compute in u8")] {
        let message = tokenizer.to_dtype(dtype).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{message}");
    }
}
