//! NVIDIA's published weights, folded into the two-dimensional network.
//!
//! The published network is one for video; of a single frame (module [`super`]) the folds are, in f64 and rounded once:
//! 1. a temporal kernel sees copies of one frame, so its weight is summed over time; where it follows a spatial one
//!    without an activation between, both are one 3 x 3 convolution;
//! 2. attention over one frame's time is the value itself, so `v` and `proj_out` are one matrix and `q`, `k` are idle;
//! 3. `encoder.conv_in` keeps the inputs of the Haar bands that are low in time, the others being zero;
//! 4. `decoder.conv_out` gives, of each pair of frames that the inverse wavelet makes, the odd one, which is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use grpo::{Error, Result};

use super::{Cosmos, CosmosConfig, build};
use crate::torch_file;

/// Taps of a temporal convolution.
const TIME_TAPS: usize = 3;
/// Bands of a level of the wavelet: low and high in time, height and width.
const BANDS: usize = 8;

/// The tensors without which nothing can be said of a file.
const ENCODER_FIRST: &str = "encoder.conv_in.0.conv3d.weight";
const DECODER_FIRST: &str = "decoder.conv_in.0.conv3d.weight";

/// Where NVIDIA's published weights lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CosmosFiles {
    /// `encoder.jit` and `decoder.jit`.
    Parts {
        /// The TorchScript archive of encoder and quantizer.
        encoder: PathBuf,
        /// The TorchScript archive of the decoder.
        decoder: PathBuf,
    },
    /// `model.pt`, a state dict, or `autoencoder.jit`.
    Whole(PathBuf),
}

impl CosmosFiles {
    /// The files of a published folder: `encoder.jit` and `decoder.jit`, else `model.pt`, else `autoencoder.jit`.
    pub fn in_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let (encoder, decoder) = (folder.join("encoder.jit"), folder.join("decoder.jit"));
        if encoder.exists() && decoder.exists() {
            return Ok(Self::Parts { encoder, decoder });
        }
        let whole =
            ["model.pt", "autoencoder.jit"].map(|name| folder.join(name)).into_iter().find(|path| path.exists());
        whole.map(Self::Whole).ok_or_else(|| {
            Error::file(
                folder,
                "holds neither encoder.jit and decoder.jit nor model.pt nor autoencoder.jit; give the folder of \
                 Cosmos-1.0-Tokenizer-DV8x16x16",
            )
        })
    }

    /// The files' names for errors.
    fn name(&self) -> String {
        match self {
            Self::Parts { encoder, decoder } => format!("{}, {}", encoder.display(), decoder.display()),
            Self::Whole(path) => path.display().to_string(),
        }
    }
}

/// The tensors of a Cosmos tokenizer for video as published, without the buffers that weights do not depend on.
pub struct PublishedCosmos {
    source: String,
    tensors: BTreeMap<String, Tensor>,
}

impl PublishedCosmos {
    /// Reads the files; nothing in them is executed. Names may have a prefix, such as that of a wrapping module.
    pub fn read(files: &CosmosFiles) -> Result<Self> {
        let tensors = match files {
            CosmosFiles::Whole(path) => without_prefix(path, torch_file::read(path)?, ENCODER_FIRST)?,
            CosmosFiles::Parts { encoder, decoder } => {
                let tensors = without_prefix(encoder, torch_file::read(encoder)?, ENCODER_FIRST)?;
                let others = without_prefix(decoder, torch_file::read(decoder)?, DECODER_FIRST)?;
                if let Some(name) = others.keys().find(|name| tensors.contains_key(*name)) {
                    let message = format!("tensor `{name}` is in {} as well", encoder.display());
                    return Err(Error::file(decoder, format!("{message}; give the decoder's file")));
                }
                tensors.into_iter().chain(others).collect()
            }
        };
        Ok(Self { source: files.name(), tensors })
    }

    /// How many tensors there are.
    pub fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// How many numbers they have.
    pub fn n_parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// The frozen tokenizer for images on `device`.
    ///
    /// Widths and depths are those of the tensors' shapes. Quantizer levels and compression leave no trace in shapes
    /// and are those of DV8x16x16. A tensor that is missing, superfluous or of a wrong shape is an error that names it.
    pub fn fold(&self, device: &Device) -> Result<Cosmos> {
        self.folded(device).map_err(|error| match error {
            Error::Config(message) => Error::config(format!("{}: {message}", self.source)),
            other => other,
        })
    }

    fn folded(&self, device: &Device) -> Result<Cosmos> {
        let config = self.config()?;
        let mut fold = Fold { tensors: &self.tensors, patch_size: config.patch_size, used: BTreeSet::new() };
        let mut folded = BTreeMap::new();
        // The network says which tensors it wants, and is thrown away: [`Cosmos::new`] takes them all at once.
        build(&config, &mut |name: &str, shape: &[usize]| {
            let tensor = fold.tensor(name, shape)?.to_dtype(DType::F32)?;
            folded.insert(name.to_string(), tensor.clone());
            Ok(tensor)
        })?;
        fold.refuse_rest()?;
        Cosmos::new(config, folded, device)
    }

    fn config(&self) -> Result<CosmosConfig> {
        let published = CosmosConfig::dv8x16x16();
        let (channels, inputs) = self.sides(ENCODER_FIRST)?;
        let patch_size = [2, 4, 8, 16].into_iter().find(|side: &usize| 3 * side.pow(3) == inputs).ok_or_else(|| {
            Error::config(format!(
                "tensor `{ENCODER_FIRST}` has {inputs} inputs; three colours of cubic patches make 192"
            ))
        })?;
        let block = |level: usize, block: usize| format!("encoder.down.{level}.block.{block}.conv1.0.conv3d.weight");
        let widths = (0..).map(|level| block(level, 0)).take_while(|name| self.tensors.contains_key(name));
        let widths = widths.map(|name| Ok(self.sides(&name)?.0)).collect::<Result<Vec<usize>>>()?;
        if let Some(width) = widths.iter().find(|width| !width.is_multiple_of(channels)) {
            return Err(Error::config(format!(
                "a level of the encoder is {width} channels wide, no multiple of the first convolution's {channels}; is \
                 this another model's file?"
            )));
        }
        let (embedding_dim, z_channels) = self.sides("quant_conv.conv3d.weight")?;
        if embedding_dim != published.embedding_dim {
            return Err(Error::config(format!(
                "tensor `quant_conv.conv3d.weight` has {embedding_dim} outputs; the quantizer of DV8x16x16 has {}",
                published.embedding_dim
            )));
        }
        let config = CosmosConfig {
            channels,
            channels_mult: widths.iter().map(|width| width.checked_div(channels).unwrap_or(0)).collect(),
            num_res_blocks: (0..).take_while(|&index| self.tensors.contains_key(&block(0, index))).count(),
            patch_size,
            z_channels,
            ..published
        };
        config.validate()?;
        Ok(config)
    }

    /// Outputs and inputs of a published convolution.
    fn sides(&self, name: &str) -> Result<(usize, usize)> {
        let dims = self.tensors.get(name).map(Tensor::dims);
        match dims {
            Some(&[outputs, inputs, _, _, _]) => Ok((outputs, inputs)),
            Some(dims) => {
                Err(Error::config(format!("tensor `{name}` has shape {dims:?}; a convolution has five sides")))
            }
            None => Err(missing(name, "5 sides")),
        }
    }
}

/// The tensors of a file, from the prefix of the one that must be there; wavelets, levels and codebooks left out.
fn without_prefix(path: &Path, tensors: BTreeMap<String, Tensor>, first: &str) -> Result<BTreeMap<String, Tensor>> {
    let prefixes: Vec<&str> = tensors
        .keys()
        .filter_map(|name| name.strip_suffix(first))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .collect();
    let [prefix] = prefixes[..] else {
        return Err(Error::file(
            path,
            format!(
                "holds {} tensors `{first}` where one is due; give Cosmos-1.0-Tokenizer-DV8x16x16's",
                prefixes.len()
            ),
        ));
    };
    let (prefix, mut inside) = (prefix.to_owned(), BTreeMap::new());
    for (name, tensor) in tensors {
        if is_buffer(&name) {
            continue;
        }
        match name.strip_prefix(&prefix) {
            Some(rest) => inside.insert(rest.to_owned(), tensor),
            None => {
                return Err(Error::file(
                    path,
                    format!("tensor `{name}` lies outside of `{prefix}`, where the model is"),
                ));
            }
        };
    }
    Ok(inside)
}

/// What a file holds besides weights.
fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    ["wavelets", "_arange", "patch_size_buffer", "_levels", "_basis", "implicit_codebook"].contains(&last)
}

fn missing(name: &str, shape: impl std::fmt::Display) -> Error {
    Error::config(format!("tensor `{name}` of {shape} is missing; is this another model's file?"))
}

/// Takes folded tensors out of published ones, in f64.
struct Fold<'a> {
    tensors: &'a BTreeMap<String, Tensor>,
    patch_size: usize,
    used: BTreeSet<String>,
}

impl Fold<'_> {
    /// The tensor that the network calls `name`.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (base, part) = name.rsplit_once('.').unwrap_or((name, "weight"));
        let (parent, own) = base.rsplit_once('.').unwrap_or(("", base));
        let between_levels = parent.ends_with("sample");
        match own {
            _ if own.starts_with("norm") => self.published(format!("{base}.norm.{part}"), shape),
            "conv_in" | "conv_out" => self.pair(base, part, shape),
            "conv1" | "conv2" if !between_levels => self.pair(base, part, shape),
            "proj_out" if parent.ends_with("attn_1.1") => self.time_attention(parent, part, shape),
            _ => self.single(base, part, shape),
        }
    }

    /// A convolution over space or over time.
    fn single(&mut self, base: &str, part: &str, shape: &[usize]) -> Result<Tensor> {
        let over_time = base.ends_with("downsample.conv2") || base.ends_with("upsample.conv1");
        let published = match *shape {
            [outputs, inputs] if over_time => vec![outputs, inputs, TIME_TAPS, 1, 1],
            [outputs, inputs] => vec![outputs, inputs, 1, 1, 1],
            [outputs, inputs, height, width] => vec![outputs, inputs, 1, height, width],
            _ => shape.to_vec(),
        };
        let tensor = self.published(format!("{base}.conv3d.{part}"), &published)?;
        match part {
            "bias" => Ok(tensor),
            _ => Ok(tensor.sum(2)?.reshape(shape)?),
        }
    }

    /// A spatial convolution and the temporal one after it.
    fn pair(&mut self, base: &str, part: &str, shape: &[usize]) -> Result<Tensor> {
        let bands = 3 * self.patch_size.pow(3);
        let (first, last) = (base == "encoder.conv_in", base == "decoder.conv_out");
        let outputs = if last { bands } else { shape.first().copied().unwrap_or(0) };
        let time = self.published(format!("{base}.1.conv3d.weight"), &[outputs, outputs, TIME_TAPS, 1, 1])?;
        let time = time.sum(2)?.reshape((outputs, outputs))?.contiguous()?;
        let folded = match *shape {
            [_, inputs, height, width] => {
                let inputs = if first { bands } else { inputs };
                let space = self.published(format!("{base}.0.conv3d.weight"), &[outputs, inputs, 1, height, width])?;
                time.matmul(&space.reshape((outputs, inputs * height * width))?)?
            }
            _ => {
                let space = self.published(format!("{base}.0.conv3d.bias"), &[outputs])?;
                let after = self.published(format!("{base}.1.conv3d.bias"), &[outputs])?;
                (time.matmul(&space.reshape((outputs, 1))?)? + after.reshape((outputs, 1))?)?
            }
        };
        let folded = match (first, last, part) {
            (true, _, "weight") => low_in_time(&folded.reshape((outputs, bands, ()))?, self.patch_size)?,
            (_, true, _) => odd_frame(&folded, self.patch_size)?,
            _ => folded,
        };
        Ok(folded.reshape(shape)?)
    }

    /// `proj_out` of the values alone.
    fn time_attention(&mut self, attention: &str, part: &str, shape: &[usize]) -> Result<Tensor> {
        let width = shape.first().copied().unwrap_or(0);
        let mut get = |name: &str, shape: &[usize]| self.published(format!("{attention}.{name}"), shape);
        let project = get("proj_out.conv3d.weight", &[width, width, 1, 1, 1])?.reshape((width, width))?;
        match part {
            "bias" => {
                let bias = get("v.conv3d.bias", &[width])?.reshape((width, 1))?;
                Ok((project.matmul(&bias)?.reshape(width)? + get("proj_out.conv3d.bias", &[width])?)?)
            }
            _ => {
                let values = get("v.conv3d.weight", &[width, width, 1, 1, 1])?.reshape((width, width))?;
                Ok(project.matmul(&values)?)
            }
        }
    }

    /// A published tensor in f64.
    fn published(&mut self, name: String, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.get(&name).ok_or_else(|| missing(&name, format!("shape {shape:?}")))?;
        if tensor.dims() != shape {
            return Err(Error::config(format!(
                "tensor `{name}` has shape {:?}; its neighbours ask for {shape:?}",
                tensor.dims()
            )));
        }
        self.used.insert(name);
        Ok(tensor.to_dtype(DType::F64)?)
    }

    /// Refuses what nobody took, save what a single frame has no use for.
    fn refuse_rest(&self) -> Result<()> {
        let idle = |name: &str| {
            ["attn_1.1.q.", "attn_1.1.k.", "sample.conv1.", "sample.conv2."].iter().any(|part| name.contains(part))
        };
        match self.tensors.iter().find(|(name, _)| !self.used.contains(*name) && !idle(name)) {
            None => Ok(()),
            Some((name, tensor)) => Err(Error::config(format!(
                "tensor `{name}` of shape {:?} belongs to no part of the tokenizer; is this another model's file?",
                tensor.dims()
            ))),
        }
    }
}

/// Of a weight `[O, 3 p^3, taps]`, the inputs that are low in time at every level of the wavelet.
fn low_in_time(weight: &Tensor, patch_size: usize) -> CandleResult<Tensor> {
    let (mut kept, mut n) = (vec![0u32, 1, 2], 3);
    for _ in 0..patch_size.ilog2() {
        kept = (0..BANDS as u32 / 2).flat_map(|band| kept.iter().map(move |channel| band * n + channel)).collect();
        n *= BANDS as u32;
    }
    let kept = Tensor::new(kept, weight.device())?;
    weight.contiguous()?.index_select(&kept, 1)
}

/// Of rows `[3 p^3, X]` that make all bands, those `[3 p^2, X]` that make the odd frame's: at each level the bands low
/// in time less those high in time.
fn odd_frame(rows: &Tensor, patch_size: usize) -> CandleResult<Tensor> {
    let width = rows.dim(1)?;
    let (mut folded, mut kept) = (rows.clone(), 1);
    for _ in 0..patch_size.ilog2() {
        let bands = folded.reshape((kept, BANDS, (), width))?;
        folded = (bands.narrow(1, 0, BANDS / 2)? - bands.narrow(1, BANDS / 2, BANDS / 2)?)?;
        kept *= BANDS / 2;
    }
    folded.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cosmos_nvidia").join(name)
    }

    fn published() -> PublishedCosmos {
        PublishedCosmos::read(&CosmosFiles::Whole(golden("model.pt"))).unwrap()
    }

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn wrong_tensors_are_named() {
        let check = |change: fn(&mut BTreeMap<String, Tensor>), expected: &str| {
            let mut published = published();
            change(&mut published.tensors);
            let message = published.fold(&Device::Cpu).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(message.contains("model.pt: ") && message.contains(expected), "no `{expected}` in {message}");
        };
        fn put(tensors: &mut BTreeMap<String, Tensor>, name: &str, shape: &[usize]) {
            tensors.insert(name.into(), zeros(shape));
        }
        check(
            |t| drop(t.remove("decoder.mid.attn_1.1.v.conv3d.bias")),
            "tensor `decoder.mid.attn_1.1.v.conv3d.bias` of shape [24] is missing",
        );
        check(|t| drop(t.remove(ENCODER_FIRST)), "encoder.conv_in.0.conv3d.weight` of 5 sides is missing");
        check(
            |t| put(t, "encoder.down.1.block.0.conv1.1.conv3d.weight", &[24, 24, 1, 1, 1]),
            "`encoder.down.1.block.0.conv1.1.conv3d.weight` has shape [24, 24, 1, 1, 1]; its neighbours ask for [24, 24, 3",
        );
        check(
            |t| put(t, "encoder.extra.weight", &[2]),
            "tensor `encoder.extra.weight` of shape [2] belongs to no part",
        );
        check(|t| put(t, ENCODER_FIRST, &[6, 200, 1, 3, 3]), "has 200 inputs");
        check(|t| put(t, ENCODER_FIRST, &[6, 192, 9]), "has shape [6, 192, 9]; a convolution has five sides");
        check(|t| put(t, ENCODER_FIRST, &[0, 192, 1, 3, 3]), "no multiple of the first convolution's 0");
        check(
            |t| put(t, ENCODER_FIRST, &[5, 192, 1, 3, 3]),
            "12 channels wide, no multiple of the first convolution's 5",
        );
        check(
            |t| put(t, "quant_conv.conv3d.weight", &[4, 16, 1, 1, 1]),
            "has 4 outputs; the quantizer of DV8x16x16 has 6",
        );
        check(|t| t.retain(|name, _| !name.starts_with("encoder.down")), "num_res_blocks is 0; give 1 to 16");
    }

    #[test]
    fn a_prefix_is_taken_off_once() {
        let inside = published().tensors;
        let prefixed = |prefix: &str| -> BTreeMap<String, Tensor> {
            inside.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect()
        };
        let without = |tensors| without_prefix(Path::new("model.pt"), tensors, ENCODER_FIRST);
        let stripped = without(prefixed("state_dict.module.")).unwrap();
        assert!(stripped.keys().eq(inside.keys()));
        let mut two = prefixed("model.");
        two.extend(prefixed("ema."));
        let message = without(two).unwrap_err().to_string();
        assert!(message.contains("holds 2 tensors `encoder.conv_in.0.conv3d.weight` where one is due"), "{message}");
        let mut beside = prefixed("model.");
        beside.insert("loss.weight".into(), zeros(&[1]));
        let message = without(beside).unwrap_err().to_string();
        assert!(message.contains("tensor `loss.weight` lies outside of `model.`"), "{message}");
    }

    #[test]
    fn convolutions_that_a_frame_does_not_need_may_be_absent() {
        let saved = |published: &PublishedCosmos| {
            let folder = tempfile::tempdir().unwrap();
            let tokenizer = published.fold(&Device::Cpu).unwrap();
            tokenizer.save(folder.path(), crate::safetensors_file::Precision::F32).unwrap();
            std::fs::read(folder.path().join("model.safetensors")).unwrap()
        };
        let (whole, mut published) = (saved(&published()), published());
        let before = published.n_tensors();
        for idle in ["encoder.down.1.downsample.conv2.", "decoder.up.2.upsample.conv1."] {
            published.tensors.retain(|name, _| !name.starts_with(idle));
        }
        assert_eq!(published.n_tensors(), before - 4);
        assert!(saved(&published) == whole);
    }
}
