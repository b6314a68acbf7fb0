//! x

#[cfg(feature = "onnx")]
pub mod clip;
#[cfg(feature = "onnx")]
pub mod onnx;

mod brightness;
mod compressibility;
pub mod geneval;
pub mod shapes;

pub use brightness::Brightness;
pub use compressibility::JpegCompressibility;
