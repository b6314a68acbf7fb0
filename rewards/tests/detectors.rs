//! Detectors and the classifier of colours against the programs that define them.
#![cfg(feature = "onnx")]
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

use std::path::Path;

use grpo_rewards::clip::ClipReward;
use grpo_rewards::detectors::{
    CenterNet, ClipColors, Colored, Mask2Former, Queries, crop, instances, network_input, peaks,
};
use grpo_rewards::geneval::{COLORS, object_names};
use grpo_rewards::geneval::{Detection, Detector, GenEval, Include, Mask, Metadata, Recorded, RecordedDetections, Tag};
use grpo_rewards::onnx::{Output, SessionOptions};
use image::{Rgb, RgbImage};
use serde::Deserialize;
use sha2::{Digest, Sha256};

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Deserialize)]
struct Photos {
    photos: Vec<Photo>,
}

/// Cells of the network's outputs (class, row, column, score, reach) and the boxes that TensorFlow.js makes of them.
#[derive(Deserialize)]
struct Photo {
    photo: String,
    width: f32,
    height: f32,
    cells: Vec<[f32; 8]>,
    detections: Vec<[f32; 6]>,
}

#[test]
fn centernets_boxes_are_those_of_its_own_graph() {
    let golden: Photos = serde_json::from_str(include_str!("golden/centernet.json")).unwrap();
    let classes: Vec<&str> = object_names().collect();
    assert_eq!(golden.photos.len(), 4);
    for Photo { photo, width, height, cells, detections } in golden.photos {
        let (mut heat, mut reach) = (vec![0.0; 80 * 128 * 128], vec![0.0; 4 * 128 * 128]);
        for [class, y, x, score, sides @ ..] in cells {
            let cell = y as usize * 128 + x as usize;
            heat[class as usize * 128 * 128 + cell] = score;
            (0..4).for_each(|side| reach[side * 128 * 128 + cell] = sides[side]);
        }
        let found = peaks(&heat, &reach, &classes, [width, height]);
        assert_eq!(found.len(), detections.len(), "{photo}");
        for (found, [x0, y0, x1, y1, score, class]) in found.iter().zip(detections) {
            assert_eq!((found.class.as_str(), found.score), (classes[class as usize], score), "{photo}");
            let expected = [x0 * width / 512.0, y0 * height / 512.0, x1 * width / 512.0, y1 * height / 512.0];
            let apart = found.bbox.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-3, "{photo}: {:?} is not {expected:?}", found.bbox);
        }
    }
}

/// The network of `golden/tiny_networks.py`, worked out by hand: a cell of 4 x 4 pixels of input is red where 2.5 x 2.5 of a
/// picture half as large are.
#[test]
fn centernet_sees_its_picture_in_the_right_colours_and_places() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/centernet_tiny");
    let network = CenterNet::load(&folder, &SessionOptions::default()).unwrap();
    let mut image = RgbImage::new(256, 256);
    let mut paint = |x0: u32, y0: u32, color: [u8; 3]| {
        (0..9).for_each(|at| image.put_pixel(x0 + at % 3, y0 + at / 3, Rgb(color)));
    };
    paint(128, 64, [255, 0, 0]);
    paint(200, 20, [0, 0, 255]);
    let found = network.detect(&image).unwrap();
    let boxes: Vec<_> = found.iter().map(|found| (found.class.as_str(), found.bbox)).collect();
    let classes: Vec<&str> = object_names().take(3).collect();
    let around = |x: f32, y: f32| [x - 2.0, y - 4.0, x + 6.0, y + 8.0];
    assert_eq!(boxes, [(classes[0], around(128.0, 64.0)), (classes[2], around(200.0, 20.0))]);
    assert!(found.iter().all(|found| (found.score - 0.1).abs() < 1e-6), "{found:?}");
}

#[test]
fn numbers_that_are_none_are_no_empty_picture() {
    let shape =
        |shape: &[usize], value: f32| Output { shape: shape.to_vec(), values: vec![value; shape.iter().product()] };
    let (classes, masks) = (shape(&[1, 2, 6], 0.0), shape(&[1, 2, 4, 4], 0.0));
    assert!(Queries::new(&classes, &masks, 5).is_ok());
    for bad in [f32::NAN, f32::INFINITY] {
        let error = Queries::new(&shape(&[1, 2, 6], bad), &masks, 5).unwrap_err().to_string();
        assert!(error.contains(&format!("`cls_logits` holds {bad}")), "{error}");
        let error = Queries::new(&classes, &shape(&[1, 2, 4, 4], bad), 5).unwrap_err().to_string();
        assert!(error.contains(&format!("`mask_logits` holds {bad}")), "{error}");
    }
}

#[derive(Deserialize)]
struct Instances {
    session: Vec<[f32; 7]>,
    inputs: Vec<NetworkInput>,
    outputs: Vec<NetworkOutput>,
}

#[derive(Deserialize)]
struct NetworkInput {
    size: [u32; 2],
    resized: [usize; 2],
    sha256: String,
    sum: f64,
}

#[derive(Deserialize)]
struct NetworkOutput {
    size: [u32; 2],
    classes: Vec<Vec<f32>>,
    masks: Vec<Vec<Vec<f32>>>,
    /// Class, score, corners and area.
    instances: Vec<[f32; 7]>,
}

fn golden_instances() -> Instances {
    serde_json::from_str(include_str!("golden/mask2former.json")).unwrap()
}

/// The picture of the generator.
fn formula([height, width]: [u32; 2]) -> RgbImage {
    let value = |x: u32, y: u32, c: u32| ((x * x + 3 * x * y / 7 + 11 * y + 85 * c + (x * y) % 251) % 256) as u8;
    RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|c| value(x, y, c))))
}

#[test]
fn pictures_reach_mask2former_as_opencv_and_mmdet_bring_them() {
    const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
    const STD: [f32; 3] = [58.395, 57.12, 57.375];
    for NetworkInput { size, resized, sha256: expected, sum } in golden_instances().inputs {
        let (pixels, sizes) = network_input(&formula(size)).unwrap();
        let [height, width] = sizes.padded;
        assert_eq!((sizes.resized, height % 32, width % 32, pixels.len()), (resized, 0, 0, 3 * height * width));
        let byte =
            |y: usize, x: usize, c: usize| (pixels[(c * height + y) * width + x] * STD[c] + MEAN[c]).round() as u8;
        let places = (0..resized[0]).flat_map(|y| (0..resized[1]).map(move |x| (y, x)));
        let bytes: Vec<u8> = places.flat_map(|(y, x)| [0, 1, 2].map(|c| byte(y, x, c))).collect();
        assert_eq!(sha256(&bytes), expected, "{size:?}");
        let total: f64 = pixels.iter().map(|&value| f64::from(value)).sum();
        assert!((total - sum).abs() < 1e-6 * sum.abs() + 0.5, "{size:?}: {total} is not {sum}");
    }
}

#[test]
fn mask2formers_instances_are_those_of_mmdets_description() {
    const CLASSES: [&str; 5] = ["a", "b", "c", "d", "e"];
    for NetworkOutput { size, classes, masks, instances: expected } in golden_instances().outputs {
        let n_queries = classes.len();
        let classes = Output { shape: vec![1, n_queries, 6], values: classes.concat() };
        let masks = Output { shape: vec![1, n_queries, 12, 16], values: masks.concat().concat() };
        let sizes = network_input(&RgbImage::new(size[1], size[0])).unwrap().1;
        let queries = Queries::new(&classes, &masks, CLASSES.len()).unwrap();
        let found = instances(&queries, &sizes, &CLASSES).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, [class, score, x0, y0, x1, y1, area]) in found.iter().zip(expected) {
            assert_eq!((found.class.as_str(), found.bbox), (CLASSES[class as usize], [x0, y0, x1, y1]));
            assert!((found.score - score).abs() < 1e-5, "{} is not {score}", found.score);
            let mask = found.mask.as_ref().unwrap();
            let (width, height) = mask.dimensions();
            assert_eq!((width, height), (size[1] as usize, size[0] as usize));
            let covered =
                (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).filter(|&(x, y)| mask.contains(x, y));
            assert_eq!(covered.count(), area as usize);
        }
    }
}

#[test]
fn mask2former_runs_a_network_from_picture_to_objects() {
    let folder = tempfile::tempdir().unwrap();
    let model = include_bytes!("golden/mask2former.onnx");
    std::fs::write(folder.path().join("model.onnx"), model).unwrap();
    std::fs::write(folder.path().join("SHA256SUMS"), format!("{}  model.onnx\n", sha256(model))).unwrap();
    let image = RgbImage::from_fn(120, 90, |x, y| match (x, y) {
        (10..50, 20..60) => Rgb([255; 3]),
        (70..110, 30..80) => Rgb([0; 3]),
        _ => Rgb([100; 3]),
    });
    let found = Mask2Former::load(folder.path(), &SessionOptions::default()).unwrap().detect(&image).unwrap();
    let classes: Vec<&str> = object_names().collect();
    let expected = golden_instances().session;
    assert_eq!((found.len(), expected.len()), (4, 4));
    for (found, [class, score, x0, y0, x1, y1, _]) in found.iter().zip(expected) {
        assert_eq!((found.class.as_str(), found.bbox), (classes[class as usize], [x0, y0, x1, y1]));
        assert!((found.score - score).abs() < 1e-4, "{} is not {score}", found.score);
    }
}

#[test]
fn outputs_of_other_shapes_are_refused() {
    let output = |shape: &[usize]| Output { shape: shape.to_vec(), values: vec![0.0; shape.iter().product()] };
    let check = |classes: &[usize], masks: &[usize], expected: &str| {
        let error = Queries::new(&output(classes), &output(masks), 80).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&[1, 7, 80], &[1, 7, 8, 8], "cls_logits has shape [1, 7, 80]; expected [1, 7, 81]");
    check(&[1, 7, 81], &[1, 6, 8, 8], "mask_logits has shape [1, 6, 8, 8]");
    check(&[1, 7, 81], &[1, 7, 0, 8], "mask_logits has shape [1, 7, 0, 8]");
    check(&[1, 7, 81], &[7, 8, 8], "mask_logits has shape [7, 8, 8]");
    assert!(network_input(&RgbImage::new(0, 5)).is_err());
    assert!(network_input(&RgbImage::new(9000, 1)).is_err());
}

#[derive(Deserialize)]
struct Colors {
    width: u32,
    height: u32,
    rectangles: Vec<([u32; 4], [u8; 3])>,
    objects: Vec<ColoredObject>,
}

#[derive(Deserialize)]
struct ColoredObject {
    class: String,
    bbox: [f32; 4],
    mask: Option<[u32; 4]>,
    size: (u32, u32),
    sha256: String,
    similarities: Vec<f32>,
    color: String,
}

impl Colors {
    fn read() -> (Self, RgbImage) {
        let golden: Self = serde_json::from_str(include_str!("golden/geneval_colors.json")).unwrap();
        let inside = |[x0, y0, x1, y1]: [u32; 4], x, y| (x0..x1).contains(&x) && (y0..y1).contains(&y);
        let image = RgbImage::from_fn(golden.width, golden.height, |x, y| {
            let top = golden.rectangles.iter().rev().find(|(corners, _)| inside(*corners, x, y));
            Rgb(top.map_or([150; 3], |(_, color)| *color))
        });
        (golden, image)
    }
}

impl ColoredObject {
    fn detection(&self, image: &RgbImage) -> Detection {
        let found = Detection::new(&self.class, 0.9, self.bbox);
        let Some([x0, y0, x1, y1]) = self.mask else { return found };
        let inside = |(x, y, _): (u32, u32, _)| (x0..x1).contains(&x) && (y0..y1).contains(&y);
        found.with_mask(Mask::new(image.width() as usize, image.enumerate_pixels().map(inside).collect()).unwrap())
    }
}

#[test]
fn crops_are_those_of_the_published_program() {
    let (golden, image) = Colors::read();
    for object in &golden.objects {
        let cut = crop(&image, &object.detection(&image)).unwrap();
        assert_eq!(cut.dimensions(), object.size, "{:?}", object.bbox);
        assert_eq!(sha256(cut.as_raw()), object.sha256, "{:?}", object.bbox);
    }
}

#[test]
fn colours_are_those_of_a_second_classifier() {
    let (golden, image) = Colors::read();
    let colors = ClipColors::new(ClipReward::tiny().unwrap());
    let objects: Vec<Detection> = golden.objects.iter().map(|object| object.detection(&image)).collect();
    for (found, object) in colors.similarities(&image, &objects).unwrap().iter().zip(&golden.objects) {
        let apart = found.iter().zip(&object.similarities).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{found:?} is not {:?}", object.similarities);
    }
    let mut colored = objects.clone();
    colored[0].color = Some("pink".into());
    Colored::new(Blind, &colors).classify_colors(&image, &mut colored).unwrap();
    let expected: Vec<&str> = golden.objects.iter().map(|object| object.color.as_str()).collect();
    let named: Vec<&str> = colored.iter().map(|object| object.color.as_deref().unwrap()).collect();
    assert_eq!((named[0], &named[1..]), ("pink", &expected[1..]));
    assert!(named.iter().all(|name| COLORS.contains(name)));
}

struct Blind;

impl Detector for Blind {
    fn detect(&self, _: &RgbImage) -> Result<Vec<Detection>, grpo::BoxError> {
        Ok(vec![])
    }
}

#[test]
fn recorded_boxes_get_their_colours_from_clip_and_an_unknown_one_is_an_error() {
    let (golden, image) = Colors::read();
    let object = &golden.objects[4];
    let line = format!(
        r#"{{"image": "a.png", "detections": [{{"class": "star", "score": 0.9, "bbox": {:?}}}]}}"#,
        object.bbox
    );
    let recorded = RecordedDetections::parse(&line).unwrap();
    let asked = Include { color: Some("green".into()), ..Include::new("star", 1) };
    let metadata = Metadata { tag: Tag::Colors, include: vec![asked], exclude: vec![], prompt: "a star".into() };
    let of: Recorded<'_> = recorded.of("a.png").unwrap();
    let error = GenEval::new(of).verdict(&metadata, &image).unwrap_err().to_string();
    assert_eq!(error, "a star has no color; record colors, or give a classifier of them");
    let colors = ClipColors::new(ClipReward::tiny().unwrap());
    assert!(GenEval::new(Colored::new(of, &colors)).verdict(&metadata, &image).is_ok());
}

#[test]
fn boxes_without_pixels_and_masks_of_another_size_are_refused() {
    let image = RgbImage::new(10, 10);
    let error = |object: &Detection| crop(&image, object).unwrap_err().to_string();
    assert!(error(&Detection::new("cat", 0.9, [3.4, 0.0, 3.45, 5.0])).contains("has no pixel"));
    assert!(error(&Detection::new("cat", 0.9, [0.0, 0.0, 1e9, 5.0])).contains("larger than twice the image"));
    assert!(error(&Detection::new("cat", 0.9, [f32::NAN, 0.0, 1.0, 5.0])).contains("has no pixel"));
    let small = Mask::new(5, vec![true; 25]).unwrap();
    let masked = Detection::new("cat", 0.9, [0.0, 0.0, 5.0, 5.0]).with_mask(small);
    assert_eq!(error(&masked), "the mask of an object has shape [5, 5]; expected [10, 10]");
}

#[test]
fn a_detectors_folder_is_verified_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let options = SessionOptions::default();
    let check = |expected: &str| {
        let error = CenterNet::load(folder.path(), &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let error = Mask2Former::load(folder.path(), &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("sha256sum model.onnx > SHA256SUMS");
    let sums = folder.path().join("SHA256SUMS");
    std::fs::write(folder.path().join("model.onnx"), b"model").unwrap();
    for (line, expected) in [
        ("", "it does not name model.onnx"),
        ("abc", "is no line of sha256sum"),
        ("abc  ../model.onnx", "is not the name of a file beside it"),
        ("abc  model.onnx", "SHA-256 is 9372c470"),
    ] {
        std::fs::write(&sums, line).unwrap();
        check(expected);
    }
    std::fs::write(&sums, format!("{}  model.onnx\n", sha256(b"model"))).unwrap();
    check("there is no graph in it");
    let (graph, weights) = (include_bytes!("golden/onnx/external.onnx"), include_bytes!("golden/onnx/external.data"));
    std::fs::write(folder.path().join("model.onnx"), graph).unwrap();
    std::fs::write(folder.path().join("external.data"), weights).unwrap();
    let listed = format!("{}  model.onnx\n", sha256(graph));
    std::fs::write(&sums, &listed).unwrap();
    check("its weights lie in `external.data`, which ");
    std::fs::write(&sums, format!("{listed}{}  external.data\n", sha256(weights))).unwrap();
    check("the model's inputs are");
}
