//! CenterNet with a MobileNetV3, a network of 4 MB that ships inside a package: see `rewards/export/export_centernet.py`.
//!
//! Paper: Zhou, Wang and Krähenbühl, 2019, "Objects as Points". Every cell of a 128 x 128 grid says, for each class,
//! whether the centre of an object lies there, and how far its box reaches. Real, small and weak: scores of clear
//! photographs lie between 0.3 and 0.6, so counting, which needs 0.9, sees nothing.

use std::path::Path;

use grpo::{BoxError, Error, Result};
use image::RgbImage;

use super::bilinear;
use super::model_folder::verified_model;
use crate::geneval::{Detection, Detector, object_names};
use crate::onnx::{Dim, Element, Input, Interface, Output, Port, Precision, Session, SessionOptions};

/// The side of the network's input in pixels.
const SIDE: usize = 512;
/// The side of its grid in cells.
const GRID: usize = 128;
/// Pixels of input to a cell.
const STRIDE: f32 = (SIDE / GRID) as f32;
/// Peaks that are boxes.
const MAX_BOXES: usize = 100;

/// Finds the 80 classes of COCO, by boxes alone.
#[derive(Debug)]
pub struct CenterNet {
    session: Session,
    classes: Vec<&'static str>,
}

impl CenterNet {
    /// Loads a folder made by `rewards/export/export_centernet.py`.
    pub fn load(folder: &Path, options: &SessionOptions) -> Result<Self> {
        let classes: Vec<&str> = object_names().collect();
        let (side, grid) = (Dim::Is(SIDE), Dim::Is(GRID));
        let images = [Dim::Free, Dim::Is(3), side, side];
        let heatmap = [Dim::Free, Dim::Is(classes.len()), grid, grid];
        let reach = [Dim::Free, Dim::Is(4), grid, grid];
        let interface = Interface {
            inputs: &[Port { name: "images", element: Element::F32, shape: Some(&images) }],
            outputs: &[
                Port { name: "heatmap", element: Element::F32, shape: Some(&heatmap) },
                Port { name: "wh", element: Element::F32, shape: Some(&reach) },
            ],
            precision: Precision::Fp32,
        };
        Ok(Self { session: Session::from_file(&verified_model(folder)?, &interface, options)?, classes })
    }
}

impl Detector for CenterNet {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        let (width, height) = image.dimensions();
        if width == 0 || height == 0 {
            return Err(
                format!("an image of {width}x{height} cannot be searched; every side must be at least 1").into()
            );
        }
        let pixels = bilinear::tensorflow(image, SIDE);
        let outputs = self.session.run(&[("images", Input::F32(&pixels, &[1, 3, SIDE, SIDE]))])?;
        let read = |name: &'static str, n: usize| -> Result<&[f32]> {
            let output = outputs.get(name).ok_or_else(|| Error::config(format!("the network returned no `{name}`")))?;
            let Output { shape, values } = output;
            let expected = vec![1, n, GRID, GRID];
            if *shape != expected {
                return Err(Error::Shape { what: name, got: shape.clone(), expected });
            }
            output.check_finite(&format!("the network's `{name}`"))?;
            Ok(values)
        };
        let (heatmap, reach) = (read("heatmap", self.classes.len())?, read("wh", 4)?);
        Ok(peaks(heatmap, reach, &self.classes, [width as f32, height as f32]))
    }
}

/// Boxes from the network's outputs: `heatmap` `[classes, 128, 128]`, 0 but at local peaks, and `reach`
/// `[4, 128, 128]`, the pixels of input from a centre to its box's left, top, right and bottom.
///
/// The 100 best peaks, best first; of equal ones the one of the earlier class, row and column.
pub fn peaks(heatmap: &[f32], reach: &[f32], classes: &[&str], [width, height]: [f32; 2]) -> Vec<Detection> {
    let n_cells = GRID * GRID;
    let mut found: Vec<(usize, f32)> =
        heatmap.iter().copied().enumerate().filter(|&(_, score)| score > 0.0 && score <= 1.0).collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (scale_x, scale_y) = (width / SIDE as f32, height / SIDE as f32);
    let detection = |(at, score): (usize, f32)| {
        let (class, cell) = (classes.get(at / n_cells)?, at % n_cells);
        let (x, y) = ((cell % GRID) as f32 * STRIDE, (cell / GRID) as f32 * STRIDE);
        let side = |of: usize| reach.get(of * n_cells + cell).copied();
        let bbox = [x - side(0)?, y - side(1)?, x + side(2)?, y + side(3)?];
        let bbox = [bbox[0] * scale_x, bbox[1] * scale_y, bbox[2] * scale_x, bbox[3] * scale_y];
        Some(Detection::new(*class, score, bbox))
    };
    found.into_iter().take(MAX_BOXES).filter_map(detection).collect()
}
