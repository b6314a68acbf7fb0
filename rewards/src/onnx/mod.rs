//! Models of others as ONNX files: finding ONNX Runtime on a fresh machine, and running a model through it.
//!
//! Everything here returns an error where the library is missing, too old or refuses a model; nothing panics.

pub mod runtime;
mod session;

pub use session::{Element, Input, Output, Port, Session};
