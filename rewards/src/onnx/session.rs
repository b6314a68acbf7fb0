//! One model with one input and one output, checked when it is loaded.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use grpo::{Error, Result};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use super::runtime;

/// The element type of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// 64-bit integers.
    I64,
}

/// A named input or output as the caller needs it.
#[derive(Clone, Copy, Debug)]
pub struct Port<'a> {
    /// Its name in the graph.
    pub name: &'a str,
    /// Its element type.
    pub element: Element,
    /// Its shape; `None` is a dimension that must be dynamic in the model, the batch.
    pub shape: &'a [Option<usize>],
}

/// What a run is given: values in row-major order and their shape.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Floats of this shape.
    F32(&'a [f32], &'a [usize]),
    /// Integers of this shape.
    I64(&'a [i64], &'a [usize]),
}

/// What a run gave: values in row-major order and their shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The shape.
    pub shape: Vec<usize>,
    /// The values.
    pub values: Vec<f32>,
}

/// A loaded model whose ports are those that were asked for.
#[derive(Debug)]
pub struct Session {
    /// ONNX Runtime wants a session for itself while it runs.
    inner: Mutex<ort::session::Session>,
    source: PathBuf,
    input: String,
    output: String,
}

impl Session {
    /// Loads a model file; weights in a second file beside it (external data) are found there.
    pub fn from_file(path: &Path, ports: [Port<'_>; 2], threads: NonZeroUsize) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::file(path, "there is no such file; export the model first (rewards/export)"));
        }
        Self::load(path, ports, threads, |builder| builder.commit_from_file(path))
    }

    /// Loads a model from memory; `label` stands for its path in errors.
    pub fn from_bytes(label: &str, bytes: &[u8], ports: [Port<'_>; 2], threads: NonZeroUsize) -> Result<Self> {
        Self::load(Path::new(label), ports, threads, |builder| builder.commit_from_memory(bytes))
    }

    fn load(
        source: &Path,
        [input, output]: [Port<'_>; 2],
        threads: NonZeroUsize,
        commit: impl FnOnce(&mut SessionBuilder) -> ort::Result<ort::session::Session>,
    ) -> Result<Self> {
        let mut builder = builder(threads)?;
        let inner = commit(&mut builder).map_err(|error| {
            let remedy = "export it again, or copy it anew together with its data file";
            Error::file(source, format!("not a model that onnx runtime can read: {error}; {remedy}"))
        })?;
        check_port(source, "input", inner.inputs(), &input)?;
        check_port(source, "output", inner.outputs(), &output)?;
        Ok(Self {
            inner: Mutex::new(inner),
            source: source.into(),
            input: input.name.into(),
            output: output.name.into(),
        })
    }

    /// Runs the model once.
    pub fn run(&self, input: Input<'_>) -> Result<Output> {
        let failed = |error: ort::Error| Error::file(&self.source, format!("the model failed: {error}"));
        let mut session = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = match input {
            Input::F32(values, shape) => {
                let tensor = TensorRef::from_array_view((dims(shape), values)).map_err(failed)?;
                session.run(ort::inputs![self.input.as_str() => tensor])
            }
            Input::I64(values, shape) => {
                let tensor = Tensor::from_array((dims(shape), values.to_vec())).map_err(failed)?;
                session.run(ort::inputs![self.input.as_str() => tensor])
            }
        }
        .map_err(failed)?;
        let output = outputs
            .get(self.output.as_str())
            .ok_or_else(|| Error::file(&self.source, format!("the model returned no `{}`", self.output)))?;
        let (shape, values) = output.try_extract_tensor::<f32>().map_err(failed)?;
        let shape = shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
        Ok(Output { shape, values: values.to_vec() })
    }
}

fn builder(threads: NonZeroUsize) -> Result<SessionBuilder> {
    let environment = runtime::environment()?;
    let refused = |error: ort::Error| Error::config(format!("onnx runtime refused its session options: {error}"));
    let builder = ort::session::Session::builder(&environment).map_err(refused)?;
    let builder =
        builder.with_optimization_level(GraphOptimizationLevel::All).map_err(|error| refused(error.into()))?;
    let builder = builder.with_intra_threads(threads.get()).map_err(|error| refused(error.into()))?;
    // Idle workers that spin would take the cores from the policy, which is sampling the next group meanwhile.
    builder.with_intra_op_spinning(false).map_err(|error| refused(error.into()))
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect()
}

/// That the model has this one port and no other.
fn check_port(source: &Path, kind: &str, found: &[Outlet], wanted: &Port<'_>) -> Result<()> {
    let names: Vec<&str> = found.iter().map(Outlet::name).collect();
    let [outlet] = found else {
        return Err(Error::file(
            source,
            format!("the model's {kind}s are {names:?}; expected `{}` alone", wanted.name),
        ));
    };
    if outlet.name() != wanted.name {
        return Err(Error::file(source, format!("the model's {kind} is {names:?}; expected `{}`", wanted.name)));
    }
    let element = match wanted.element {
        Element::F32 => TensorElementType::Float32,
        Element::I64 => TensorElementType::Int64,
    };
    let shape = match outlet.dtype() {
        ValueType::Tensor { ty, shape, .. } if *ty == element => shape,
        other => {
            let message = format!("{kind} `{}` is {other:?}; expected a tensor of {:?}", wanted.name, wanted.element);
            return Err(Error::file(source, message));
        }
    };
    let fits = |(&have, want): (&i64, &Option<usize>)| match want {
        None => have < 0,
        Some(want) => have < 0 || usize::try_from(have).is_ok_and(|have| have == *want),
    };
    if shape.len() == wanted.shape.len() && shape.iter().zip(wanted.shape).all(fits) {
        return Ok(());
    }
    Err(Error::file(
        source,
        format!(
            "{kind} `{}` has shape {}; expected {}, where -1 is the dynamic batch",
            wanted.name,
            shown(shape.iter().copied()),
            shown(wanted.shape.iter().map(|dim| dim.map_or(-1, |dim| i64::try_from(dim).unwrap_or(i64::MAX))))
        ),
    ))
}

fn shown(shape: impl Iterator<Item = i64>) -> String {
    let dims: Vec<String> = shape.map(|dim| dim.to_string()).collect();
    format!("[{}]", dims.join(", "))
}
