//! Two towers, their sidecar, and the cosine between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{CONTEXT, Preprocess, Tokenizer};
use crate::onnx::{Dim, Element, Input, Interface, Output, Port, Precision, Session, SessionOptions};

/// Images per run of the tower: on a CPU larger batches are no faster, and memory stays bounded.
const IMAGE_BATCH: usize = 32;
/// Texts per run of the tower.
const TEXT_BATCH: usize = 64;
/// Texts whose embeddings are kept; a group shares its prompt, so a step needs few.
const CACHED_TEXTS: usize = 4096;

/// What a model's files do not say themselves: `clip.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sidecar {
    /// The reward's name in logs and panels.
    pub name: String,
    /// The side in pixels of the image tower's input.
    pub image_size: usize,
    /// The length of the text tower's input; [`CONTEXT`] for every CLIP.
    pub context: usize,
    /// How pictures are resized.
    pub preprocess: Preprocess,
    /// The length of an embedding.
    pub embed_dim: usize,
    /// The factor on cosines that the towers were trained with; not part of the score.
    pub logit_scale: f64,
    /// How the files were made: command, versions, measured accuracy.
    #[serde(default)]
    pub provenance: serde_json::Value,
}

/// Judges an image by the cosine between its embedding and that of the prompt's clean caption.
///
/// ```no_run
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::clip::ClipReward;
///
/// let clip = ClipReward::tiny()?;
/// let score = clip.score(&Prompt::new("a red circle"), &image::RgbImage::new(64, 64)).unwrap();
/// assert!((-1.0..=1.0).contains(&score));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct ClipReward {
    sidecar: Sidecar,
    images: Session,
    texts: Session,
    tokenizer: Tokenizer,
    /// Text embeddings by text.
    cache: Mutex<BTreeMap<String, Vec<f32>>>,
}

impl ClipReward {
    /// Loads `image.onnx`, `text.onnx` and `clip.json` from a folder made by `rewards/export/export_clip.py`.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::load_with(folder, &SessionOptions::default())
    }

    /// As [`ClipReward::load`], on this device.
    pub fn load_with(folder: &Path, options: &SessionOptions) -> Result<Self> {
        let path = folder.join("clip.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::file(&path, format!("{error}; a model folder holds image.onnx, text.onnx and clip.json"))
        })?;
        let sidecar = read_sidecar(&path, &text)?;
        Self::build(sidecar, |file, interface| Session::from_file(&folder.join(file), &interface, options))
    }

    /// The embedded miniature CLIP of the shapes world, named `clip`; see `rewards/models/README.md` for what it knows.
    pub fn tiny() -> Result<Self> {
        Embedded {
            folder: "embedded models/clip",
            sidecar: include_str!("../../models/clip/clip.json"),
            images: include_bytes!("../../models/clip/image.onnx"),
            texts: include_bytes!("../../models/clip/text.onnx"),
        }
        .load()
    }

    /// The embedded miniature of HPSv2, [`ClipReward::tiny`] fine-tuned on synthetic preferences, named `hps`.
    pub fn tiny_hps() -> Result<Self> {
        Embedded {
            folder: "embedded models/hps",
            sidecar: include_str!("../../models/hps/clip.json"),
            images: include_bytes!("../../models/hps/image.onnx"),
            texts: include_bytes!("../../models/hps/text.onnx"),
        }
        .load()
    }

    fn build(sidecar: Sidecar, session: impl Fn(&str, Interface<'_>) -> Result<Session>) -> Result<Self> {
        let Sidecar { image_size, context, embed_dim, .. } = sidecar;
        let side = Dim::Is(image_size);
        let [pixels, ids, embedding]: [&[Dim]; 3] =
            [&[Dim::Free, Dim::Is(3), side, side], &[Dim::Free, Dim::Is(context)], &[Dim::Free, Dim::Is(embed_dim)]];
        let port = |name, element, shape| Port { name, element, shape: Some(shape) };
        let images = session(
            "image.onnx",
            Interface {
                inputs: &[port("pixel_values", Element::F32, pixels)],
                outputs: &[port("image_embeds", Element::F32, embedding)],
                precision: Precision::Fp32,
            },
        )?;
        let texts = session(
            "text.onnx",
            Interface {
                inputs: &[port("input_ids", Element::I64, ids)],
                outputs: &[port("text_embeds", Element::F32, embedding)],
                precision: Precision::Fp32,
            },
        )?;
        Ok(Self { sidecar, images, texts, tokenizer: Tokenizer::new(), cache: Mutex::new(BTreeMap::new()) })
    }

    /// What the model's sidecar says.
    pub fn sidecar(&self) -> &Sidecar {
        &self.sidecar
    }

    /// One embedding per image, in order, of length [`Sidecar::embed_dim`].
    pub fn embed_images(&self, images: &[&RgbImage]) -> Result<Vec<Vec<f32>>> {
        let size = self.sidecar.image_size;
        let mut embeddings = Vec::with_capacity(images.len());
        for chunk in images.chunks(IMAGE_BATCH) {
            let mut pixels = Vec::with_capacity(chunk.len() * 3 * size * size);
            for image in chunk {
                self.sidecar.preprocess.append(image, size, &mut pixels)?;
            }
            let output = self.images.run_one(Input::F32(&pixels, &[chunk.len(), 3, size, size]))?;
            embeddings.extend(self.rows("image_embeds", &output, chunk.len())?);
        }
        Ok(embeddings)
    }

    /// One embedding per text, in order, of length [`Sidecar::embed_dim`].
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let mut embeddings = Vec::with_capacity(texts.len());
        for chunk in texts.chunks(TEXT_BATCH) {
            let ids: Vec<i64> = chunk.iter().flat_map(|text| self.tokenizer.ids(text)).collect();
            let output = self.texts.run_one(Input::I64(&ids, &[chunk.len(), CONTEXT]))?;
            embeddings.extend(self.rows("text_embeds", &output, chunk.len())?);
        }
        Ok(embeddings)
    }

    fn rows(&self, what: &'static str, output: &Output, n_rows: usize) -> Result<Vec<Vec<f32>>> {
        let expected = vec![n_rows, self.sidecar.embed_dim];
        if output.shape != expected {
            return Err(Error::Shape { what, got: output.shape.clone(), expected });
        }
        Ok(output.values.chunks(self.sidecar.embed_dim).map(<[f32]>::to_vec).collect())
    }

    /// The embeddings of these texts by text, each distinct one computed once and kept for later batches.
    fn text_table(&self, texts: BTreeSet<&str>) -> Result<BTreeMap<String, Vec<f32>>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<&str> = texts.iter().copied().filter(|text| !cache.contains_key(*text)).collect();
        if cache.len() + missing.len() > CACHED_TEXTS {
            cache.retain(|text, _| texts.contains(text.as_str()));
        }
        let embeddings = self.embed_texts(&missing)?;
        cache.extend(missing.iter().map(|text| text.to_string()).zip(embeddings));
        Ok(texts.iter().filter_map(|text| Some((text.to_string(), cache.get(*text)?.clone()))).collect())
    }
}

impl Reward<RgbImage> for ClipReward {
    fn name(&self) -> &str {
        &self.sidecar.name
    }

    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let scores = self.score_batch(&[(prompt, image)])?;
        scores.first().copied().ok_or_else(|| "the image tower returned no embedding".into())
    }

    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError> {
        let texts = self.text_table(batch.iter().map(|(prompt, _)| prompt.text.as_str()).collect())?;
        let images: Vec<&RgbImage> = batch.iter().map(|(_, image)| *image).collect();
        let embeddings = self.embed_images(&images)?;
        let score = |((prompt, _), image): (&(&Prompt, &RgbImage), &Vec<f32>)| {
            texts.get(&prompt.text).map(|text| cosine(image, text))
        };
        let scores: Option<Vec<f32>> = batch.iter().zip(&embeddings).map(score).collect();
        scores.ok_or_else(|| "the text tower left a prompt without an embedding".into())
    }
}

/// A model that travels inside the program.
struct Embedded {
    folder: &'static str,
    sidecar: &'static str,
    images: &'static [u8],
    texts: &'static [u8],
}

impl Embedded {
    fn load(self) -> Result<ClipReward> {
        let path = |file: &str| PathBuf::from(self.folder).join(file);
        let sidecar = read_sidecar(&path("clip.json"), self.sidecar)?;
        ClipReward::build(sidecar, |file, interface| {
            let bytes = if file == "image.onnx" { self.images } else { self.texts };
            Session::from_bytes(&path(file), bytes, &interface, &SessionOptions::default())
        })
    }
}

fn read_sidecar(path: &Path, text: &str) -> Result<Sidecar> {
    let sidecar: Sidecar = serde_json::from_str(text)
        .map_err(|error| Error::file(path, format!("{error}; write it anew with rewards/export/export_clip.py")))?;
    if sidecar.context != CONTEXT {
        return Err(Error::file(path, format!("context is {}; CLIP's tokenizer makes {CONTEXT} ids", sidecar.context)));
    }
    if sidecar.name.is_empty() || sidecar.image_size == 0 || sidecar.embed_dim == 0 {
        return Err(Error::file(path, "name, image_size or embed_dim is empty; give a name and sizes of at least 1"));
    }
    Ok(sidecar)
}

/// The cosine, summed in f64; the towers normalise, yet a foreign export may not.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}
