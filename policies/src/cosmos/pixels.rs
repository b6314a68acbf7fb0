//! Images as tensors and back, with SimpleAR's rounding.

use candle_core::{Device, Result as CandleResult, Tensor};
use grpo::{Error, Result};
use image::RgbImage;

/// Images of one size as `[B, H, W, 3]` in `[-1, 1]`.
pub(super) fn to_tensor(images: &[&RgbImage], device: &Device) -> Result<Tensor> {
    let (width, height) = images.first().map_or((0, 0), |image| image.dimensions());
    if let Some(index) = images.iter().position(|image| image.dimensions() != (width, height)) {
        let (other_width, other_height) = images[index].dimensions();
        return Err(Error::config(format!(
            "image {index} is {other_width} x {other_height} and the first {width} x {height}; give images of one size"
        )));
    }
    let values: Vec<f32> =
        images.iter().flat_map(|image| image.as_raw()).map(|&byte| (f32::from(byte) / 255.0 - 0.5) / 0.5).collect();
    Ok(Tensor::from_vec(values, (images.len(), height as usize, width as usize, 3), device)?)
}

/// `[B, H, W, 3]` as images: clamped to `[-1, 1]`, mapped to 0..=255, halves up.
pub(super) fn to_images(pixels: &Tensor) -> Result<Vec<RgbImage>> {
    let (n, h, w, _) = pixels.dims4()?;
    let image = |index: usize| -> CandleResult<Option<RgbImage>> {
        let values: Vec<f32> = pixels.get(index)?.flatten_all()?.to_vec1()?;
        let bytes = values.iter().map(|value| ((value.clamp(-1.0, 1.0) + 1.0) / 2.0 * 255.0 + 0.5) as u8).collect();
        Ok(RgbImage::from_raw(w as u32, h as u32, bytes))
    };
    let size = || Error::Shape { what: "decoded pixels", got: pixels.dims().to_vec(), expected: vec![n, h, w, 3] };
    (0..n).map(|index| image(index)?.ok_or_else(size)).collect()
}
