//! Models of others as ONNX files: finding ONNX Runtime on a fresh machine, and running a model through it.
//!
//! Everything here returns an error where the library is missing, too old or refuses a model; nothing panics.

mod guard;
mod options;
pub mod runtime;
mod session;

pub use options::{Cuda, OpenVino, OpenVinoPrecision, Precision, Provider, SessionOptions};
pub use session::{Dim, Element, Input, Interface, Output, Port, Session};
