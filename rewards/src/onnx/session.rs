//! One model, its named inputs and outputs checked when it is loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use grpo::{Error, Result};
use half::f16;
use ort::session::builder::SessionBuilder;
use ort::session::{OutputSelector, RunOptions, SessionInputValue};
use ort::value::{DynValue, Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use super::guard::guarded;
use super::{Precision, SessionOptions};

/// What a port's numbers are given or read as; the model may store the narrower kinds named here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 32-bit floats; a model of 16-bit ones is given them rounded.
    F32,
    /// 64-bit integers; a model of 32-bit ones or of truth values is given them so.
    I64,
    /// Bytes.
    U8,
}

impl Element {
    fn stored(self) -> &'static [TensorElementType] {
        match self {
            Self::F32 => &[TensorElementType::Float32, TensorElementType::Float16],
            Self::I64 => &[TensorElementType::Int64, TensorElementType::Int32, TensorElementType::Bool],
            Self::U8 => &[TensorElementType::Uint8],
        }
    }
}

/// One dimension of a port as the caller needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Must be free in the model, as a batch is.
    Free,
    /// Must take this size.
    Is(usize),
    /// May be anything; the caller looks at what comes.
    Any,
}

/// A named input or output as the caller needs it.
#[derive(Clone, Copy, Debug)]
pub struct Port<'a> {
    /// Its name in the graph.
    pub name: &'a str,
    /// Its numbers.
    pub element: Element,
    /// Its shape; `None` where any number of dimensions will do.
    pub shape: Option<&'a [Dim]>,
}

/// A model as the caller needs it.
#[derive(Clone, Copy, Debug)]
pub struct Interface<'a> {
    /// All its inputs, in any order.
    pub inputs: &'a [Port<'a>],
    /// The outputs that are wanted; others may exist and are not computed.
    pub outputs: &'a [Port<'a>],
    /// What its weights are stored in.
    pub precision: Precision,
}

/// What a run is given: values in row-major order and their shape.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Floats of this shape.
    F32(&'a [f32], &'a [usize]),
    /// Integers of this shape.
    I64(&'a [i64], &'a [usize]),
    /// Bytes of this shape.
    U8(&'a [u8], &'a [usize]),
}

/// What a run gave: values in row-major order and their shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The shape.
    pub shape: Vec<usize>,
    /// The values; integers beyond 2^24 would be rounded, so those are an error.
    pub values: Vec<f32>,
}

impl Output {
    /// An error where a value is infinite or no number: thresholds would make "nothing was found" of it.
    pub(crate) fn check_finite(&self, what: &str) -> Result<()> {
        match self.values.iter().find(|value| !value.is_finite()) {
            None => Ok(()),
            Some(value) => Err(Error::config(format!(
                "{what} holds {value}; compute in f32 (`--provider cpu`), or look for such a number in the weights"
            ))),
        }
    }
}

/// A loaded model whose ports are those that were asked for.
#[derive(Debug)]
pub struct Session {
    /// ONNX Runtime wants a session for itself while it runs.
    inner: Mutex<ort::session::Session>,
    source: PathBuf,
    /// What the model stores each input as.
    inputs: BTreeMap<String, TensorElementType>,
    outputs: Vec<String>,
}

impl Session {
    /// Loads a model file; weights in a second file beside it (external data) are found there.
    ///
    /// Nothing but the ports is checked: a file that came from elsewhere goes through [`super::Folder`].
    pub fn from_file(path: &Path, interface: &Interface<'_>, options: &SessionOptions) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::file(path, "there is no such file; export the model first (rewards/export)"));
        }
        Self::load(path, interface, options, |builder| builder.commit_from_file(path))
    }

    /// Loads a model from memory; `label` stands for its path in errors.
    pub fn from_bytes(label: &Path, bytes: &[u8], interface: &Interface<'_>, options: &SessionOptions) -> Result<Self> {
        Self::load(label, interface, options, |builder| builder.commit_from_memory(bytes))
    }

    fn load(
        source: &Path,
        interface: &Interface<'_>,
        options: &SessionOptions,
        commit: impl FnOnce(&mut SessionBuilder) -> ort::Result<ort::session::Session>,
    ) -> Result<Self> {
        let mut builder = options.builder(interface.precision)?;
        let inner = guarded(source, || {
            commit(&mut builder).map_err(|error| {
                let remedy = "export it again, or copy it anew together with its data file";
                Error::file(source, format!("not a model that onnx runtime can read: {error}; {remedy}"))
            })
        })?;
        let inputs = check_ports(source, "input", inner.inputs(), interface.inputs)?;
        if let Some(more) = inner.inputs().iter().find(|outlet| !inputs.contains_key(outlet.name())) {
            let known: Vec<&str> = interface.inputs.iter().map(|port| port.name).collect();
            let message = format!("the model also needs input `{}`; only {known:?} are given", more.name());
            return Err(Error::file(source, message));
        }
        let outputs = check_ports(source, "output", inner.outputs(), interface.outputs)?;
        Ok(Self { inner: Mutex::new(inner), source: source.into(), inputs, outputs: outputs.into_keys().collect() })
    }

    /// Runs the model once on all its inputs; gives the wanted outputs by name.
    pub fn run(&self, inputs: &[(&str, Input<'_>)]) -> Result<BTreeMap<String, Output>> {
        let given = inputs.iter().map(|&(name, input)| Ok((name, self.value(name, input)?)));
        let given = given.collect::<Result<Vec<(&str, SessionInputValue<'_>)>>>()?;
        let wanted = self.outputs.iter().fold(OutputSelector::no_default(), |wanted, name| wanted.with(name));
        let options = RunOptions::new().map_err(|error| self.failed(&error))?.with_outputs(wanted);
        guarded(&self.source, || {
            let mut session = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let outputs = session.run_with_options(given, &options).map_err(|error| self.failed(&error))?;
            let read = |name: &String| {
                let missing = || Error::file(&self.source, format!("the model returned no `{name}`"));
                Ok((name.clone(), self.output(name, outputs.get(name).ok_or_else(missing)?)?))
            };
            self.outputs.iter().map(read).collect()
        })
    }

    /// Runs a model of one input and one output once.
    pub fn run_one(&self, input: Input<'_>) -> Result<Output> {
        let name = self.inputs.keys().next().map_or("", String::as_str);
        let mut outputs = self.run(&[(name, input)])?;
        outputs.pop_first().map(|(_, output)| output).ok_or_else(|| Error::file(&self.source, "no output is wanted"))
    }

    fn failed(&self, error: &ort::Error) -> Error {
        Error::file(&self.source, format!("the model failed: {error}"))
    }

    /// The input in the kind that the model stores.
    fn value<'v>(&self, name: &str, input: Input<'v>) -> Result<SessionInputValue<'v>> {
        use TensorElementType as Stored;
        let unknown = || {
            let known: Vec<&String> = self.inputs.keys().collect();
            Error::file(&self.source, format!("the model has no input `{name}`; its inputs are {known:?}"))
        };
        let stored = *self.inputs.get(name).ok_or_else(unknown)?;
        let failed = |error: ort::Error| self.failed(&error);
        Ok(match (input, stored) {
            (Input::F32(values, shape), Stored::Float32) => {
                TensorRef::from_array_view((dims(shape), values)).map_err(failed)?.into()
            }
            (Input::F32(values, shape), Stored::Float16) => {
                let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
                Tensor::from_array((dims(shape), halves)).map_err(failed)?.into()
            }
            (Input::I64(values, shape), Stored::Int64) => {
                TensorRef::from_array_view((dims(shape), values)).map_err(failed)?.into()
            }
            (Input::I64(values, shape), Stored::Int32) => {
                let narrow: Result<Vec<i32>, _> = values.iter().map(|&value| i32::try_from(value)).collect();
                let narrow = narrow.map_err(|error| Error::file(&self.source, format!("input `{name}`: {error}")))?;
                Tensor::from_array((dims(shape), narrow)).map_err(failed)?.into()
            }
            (Input::I64(values, shape), Stored::Bool) => {
                let truths: Vec<bool> = values.iter().map(|&value| value != 0).collect();
                Tensor::from_array((dims(shape), truths)).map_err(failed)?.into()
            }
            (Input::U8(values, shape), Stored::Uint8) => {
                TensorRef::from_array_view((dims(shape), values)).map_err(failed)?.into()
            }
            (_, stored) => {
                let message = format!("input `{name}` is stored as {stored}; the run gave it another kind");
                return Err(Error::file(&self.source, message));
            }
        })
    }

    fn output(&self, name: &str, value: &DynValue) -> Result<Output> {
        use TensorElementType as Stored;
        let stored = match value.dtype() {
            ValueType::Tensor { ty, .. } => *ty,
            other => return Err(Error::file(&self.source, format!("output `{name}` is {other}, not a tensor"))),
        };
        let failed = |error: ort::Error| self.failed(&error);
        let (shape, values) = match stored {
            Stored::Float32 => {
                let (shape, values) = value.try_extract_tensor::<f32>().map_err(failed)?;
                (shape, values.to_vec())
            }
            Stored::Float16 => {
                let (shape, values) = value.try_extract_tensor::<f16>().map_err(failed)?;
                (shape, values.iter().map(|value| value.to_f32()).collect())
            }
            Stored::Int64 => {
                let (shape, values) = value.try_extract_tensor::<i64>().map_err(failed)?;
                (shape, values.iter().map(|&value| self.exact(name, value)).collect::<Result<_>>()?)
            }
            Stored::Int32 => {
                let (shape, values) = value.try_extract_tensor::<i32>().map_err(failed)?;
                (shape, values.iter().map(|&value| self.exact(name, i64::from(value))).collect::<Result<_>>()?)
            }
            Stored::Bool => {
                let (shape, values) = value.try_extract_tensor::<bool>().map_err(failed)?;
                (shape, values.iter().map(|&value| f32::from(value)).collect())
            }
            Stored::Uint8 => {
                let (shape, values) = value.try_extract_tensor::<u8>().map_err(failed)?;
                (shape, values.iter().map(|&value| f32::from(value)).collect())
            }
            other => {
                return Err(Error::file(&self.source, format!("output `{name}` is of {other}, which is not read")));
            }
        };
        let shape = shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
        Ok(Output { shape, values })
    }

    fn exact(&self, name: &str, value: i64) -> Result<f32> {
        if value.unsigned_abs() <= 1 << 24 {
            return Ok(value as f32);
        }
        Err(Error::file(&self.source, format!("output `{name}` holds {value}; integers up to 2^24 are read")))
    }
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect()
}

/// That the model has these ports; what it stores each as.
fn check_ports(
    source: &Path,
    kind: &str,
    found: &[Outlet],
    wanted: &[Port<'_>],
) -> Result<BTreeMap<String, TensorElementType>> {
    let check = |port: &Port<'_>| {
        let outlet = found.iter().find(|outlet| outlet.name() == port.name).ok_or_else(|| {
            let names: Vec<&str> = found.iter().map(Outlet::name).collect();
            Error::file(source, format!("the model's {kind}s are {names:?}; expected `{}`", port.name))
        })?;
        Ok((port.name.to_string(), check_port(source, kind, outlet, port)?))
    };
    wanted.iter().map(check).collect()
}

fn check_port(source: &Path, kind: &str, outlet: &Outlet, wanted: &Port<'_>) -> Result<TensorElementType> {
    let (stored, shape) = match outlet.dtype() {
        ValueType::Tensor { ty, shape, .. } if wanted.element.stored().contains(ty) => (*ty, shape),
        other => {
            let message = format!("{kind} `{}` is {other:?}; expected a tensor of {:?}", wanted.name, wanted.element);
            return Err(Error::file(source, message));
        }
    };
    let Some(dims) = wanted.shape else { return Ok(stored) };
    let fits = |(&have, want): (&i64, &Dim)| match want {
        Dim::Any => true,
        Dim::Free => have < 0,
        Dim::Is(size) => have < 0 || usize::try_from(have).is_ok_and(|have| have == *size),
    };
    if shape.len() == dims.len() && shape.iter().zip(dims).all(fits) {
        return Ok(stored);
    }
    let have: Vec<String> = shape.iter().map(|&dim| if dim < 0 { "free".into() } else { dim.to_string() }).collect();
    let want = dims.iter().map(|dim| match dim {
        Dim::Any => "any".into(),
        Dim::Free => "free".into(),
        Dim::Is(size) => size.to_string(),
    });
    let want: Vec<String> = want.collect();
    let (have, want) = (have.join(", "), want.join(", "));
    Err(Error::file(source, format!("{kind} `{}` has shape [{have}]; expected [{want}]", wanted.name)))
}
