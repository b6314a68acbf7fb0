//! Models of others as ONNX files: finding ONNX Runtime on a fresh machine, and running a model through it.
//!
//! A reward made of ONNX files is a [`Folder`] with a [`Manifest`], `reward.toml`; its files are verified when it is
//! opened, and its graphs are searched for what they must not ask for. Damage is then found before ONNX Runtime meets it,
//! which may abort the process on damaged files. This is no sandbox: run models of strangers in a process of their own.
//!
//! Everything here returns an error where the library is missing, too old or refuses a model; nothing panics.

mod folder;
mod graph;
mod guard;
mod manifest;
#[cfg(test)]
mod mutants;
mod network;
mod options;
mod picture;
pub mod runtime;
mod session;

pub use folder::Folder;
pub use manifest::{Manifest, Scorer};
pub use network::{
    After, Channels, Class, Fit, Layout, NetworkScorer, OnnxReward, Picture, PlainPicture, Range, Readout,
};
pub use network::{Resampling, Source, Stage, Tokens};
pub use options::{Cuda, OpenVino, OpenVinoPrecision, Precision, Provider, SessionOptions};
pub use session::{Dim, Element, Input, Interface, Output, Port, Session};

pub(crate) use graph::external_files;
pub(crate) use guard::caught;
pub(crate) use picture::{check_picture, score_sound};
