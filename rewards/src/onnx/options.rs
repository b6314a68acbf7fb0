//! How sessions run here: threads, device and numbers at a time, which are no part of a reward's definition.

use std::num::NonZeroUsize;
use std::path::Path;

use grpo::{Error, Result};
use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider as _, ExecutionProviderDispatch};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use serde::{Deserialize, Serialize};

use super::runtime;

/// The command that installs an ONNX Runtime with OpenVINO; the newest such wheel holds version 1.24.1.
const OPENVINO_REMEDY: &str = "python3 -m pip install onnxruntime-openvino==1.24.1";
/// The command that installs an ONNX Runtime with CUDA, and the CUDA libraries it was built against.
const CUDA_REMEDY: &str = "python3 -m pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'";

/// What the machine decides: never part of `reward.toml`, since a reward is the same one on every device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads inside one run of one session.
    pub threads: NonZeroUsize,
    /// What computes.
    pub provider: Provider,
    /// Images in one run of a network; `None` takes as many as [`SessionOptions::images_per_run`] finds room for.
    pub images_per_run: Option<NonZeroUsize>,
}

impl Default for SessionOptions {
    /// The CPU, all its cores, and as many images as there is room for.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            provider: Provider::Cpu,
            images_per_run: None,
        }
    }
}

impl SessionOptions {
    /// As the default, with this many threads.
    pub fn with_threads(threads: NonZeroUsize) -> Self {
        Self { threads, ..Self::default() }
    }

    /// How many images of `n_values` input numbers each go into one run, at least one and at most 32.
    ///
    /// A run may take 256 MiB of activations, and an image is taken to need 64 times its input: one layer of a ViT-H at
    /// 224 pixels holds about 25 times its input (257 tokens of 1280 + 3840 + 5120 numbers and 16 squares of 257), and an
    /// allocator keeps the buffers of its neighbours.
    pub fn images_per_run(&self, n_values: usize) -> usize {
        const ACTIVATIONS: usize = 256 << 20;
        let bytes = n_values.saturating_mul(4 * 64).max(1);
        self.images_per_run.map_or((ACTIVATIONS / bytes).clamp(1, 32), NonZeroUsize::get)
    }

    /// A builder with these options for files of this precision.
    pub(super) fn builder(&self, precision: Precision) -> Result<SessionBuilder> {
        let (environment, library) = runtime::environment()?;
        let refused = |error: ort::Error| Error::config(format!("onnx runtime refused its session options: {error}"));
        let builder = ort::session::Session::builder(&environment).map_err(refused)?;
        let builder =
            builder.with_optimization_level(precision.optimisation()).map_err(|error| refused(error.into()))?;
        let builder = builder.with_intra_threads(self.threads.get()).map_err(|error| refused(error.into()))?;
        // Idle workers that spin would take the cores from the policy, which is sampling the next group meanwhile.
        let builder = builder.with_intra_op_spinning(false).map_err(|error| refused(error.into()))?;
        match self.provider.dispatch(self.threads)? {
            None => Ok(builder),
            Some(provider) => builder
                .with_execution_providers([provider])
                .map_err(|error| self.provider.unavailable(&library, &ort::Error::from(error))),
        }
    }
}

/// What computes; a device that cannot be had is an error, never a quiet fall back to the CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Provider {
    /// ONNX Runtime's own CPU kernels, which every library has.
    #[default]
    Cpu,
    /// Intel's OpenVINO on the CPU, which computes in bf16 where the processor has it (experiments/LOG.md has times).
    Openvino(OpenVino),
    /// An NVIDIA GPU.
    Cuda(Cuda),
}

/// Settings of [`Provider::Openvino`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenVino {
    /// What products are computed in.
    pub precision: OpenVinoPrecision,
}

/// What OpenVINO computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenVinoPrecision {
    /// Scores equal those of the CPU kernels to the rounding of f32.
    F32,
    /// Embeddings move by about 1e-3; compare on the real weights before relying on it.
    Bf16,
}

/// Settings of [`Provider::Cuda`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cuda {
    /// The GPU's number.
    pub device: u16,
}

impl Provider {
    fn dispatch(&self, threads: NonZeroUsize) -> Result<Option<ExecutionProviderDispatch>> {
        Ok(match self {
            Self::Cpu => None,
            Self::Openvino(OpenVino { precision }) => {
                let hint = match precision {
                    OpenVinoPrecision::F32 => "f32",
                    OpenVinoPrecision::Bf16 => "bf16",
                };
                // The option wants the JSON text itself; the name of a file would be read as JSON.
                let config = serde_json::json!({
                    "CPU": { "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads.get() }
                });
                let provider = ep::OpenVINO::default().with_device_type("CPU");
                let provider = provider.with_arbitrary_config("load_config", config.to_string());
                Some(provider.build().error_on_failure())
            }
            Self::Cuda(Cuda { device }) => {
                Some(ep::CUDA::default().with_device_id(i32::from(*device)).build().error_on_failure())
            }
        })
    }

    fn unavailable(&self, library: &Path, error: &ort::Error) -> Error {
        let (device, remedy, file) = match self {
            Self::Cpu => ("the CPU".to_string(), runtime::REMEDY, "libonnxruntime.so.1.31.1"),
            Self::Openvino(_) => ("OpenVINO".to_string(), OPENVINO_REMEDY, "libonnxruntime.so.1.24.1"),
            Self::Cuda(Cuda { device }) => (format!("CUDA device {device}"), CUDA_REMEDY, "libonnxruntime.so.1.31.1"),
        };
        Error::file(
            library,
            format!(
                "this onnx runtime cannot use {device}: {error}; run `{remedy}` and set ORT_DYLIB_PATH to {file} in \
                 that package's folder onnxruntime/capi"
            ),
        )
    }
}

/// What a model's weights are stored and computed in; the names are those of `reward.toml`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    Fp32,
    /// 16-bit floats: half the size, meant for GPUs; a CPU is no faster with them.
    Fp16,
}

impl Precision {
    /// As far as the graph may be rewritten: ONNX Runtime 1.31 dies of its own layout pass on fp16 towers on the CPU.
    fn optimisation(self) -> GraphOptimizationLevel {
        match self {
            Self::Fp32 => GraphOptimizationLevel::All,
            Self::Fp16 => GraphOptimizationLevel::Level2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_per_run_follow_from_their_size() {
        let options = SessionOptions::default();
        assert_eq!(options.images_per_run(3 * 64 * 64), 32, "small pictures come in batches of the largest size");
        assert_eq!(options.images_per_run(3 * 224 * 224), 6);
        assert_eq!(options.images_per_run(3 * 4096 * 4096), 1, "one is always possible");
        let told = SessionOptions { images_per_run: NonZeroUsize::new(100), ..options };
        assert_eq!(told.images_per_run(3 * 224 * 224), 100);
    }

    #[test]
    fn a_provider_is_read_as_a_config_writes_it() {
        let read = |text: &str| serde_json::from_str::<Provider>(text);
        assert_eq!(read("\"cpu\"").unwrap(), Provider::Cpu);
        let bf16 = OpenVino { precision: OpenVinoPrecision::Bf16 };
        assert_eq!(read(r#"{"openvino": {"precision": "bf16"}}"#).unwrap(), Provider::Openvino(bf16));
        assert_eq!(read(r#"{"cuda": {"device": 1}}"#).unwrap(), Provider::Cuda(Cuda { device: 1 }));
        let error = read(r#"{"cuda": {"gpu": 1}}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `gpu`"), "{error}");
    }
}
