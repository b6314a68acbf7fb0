//! Two towers, what their `reward.toml` says, and the cosine between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{CONTEXT, Preprocess, Tokenizer};
use crate::onnx::{Dim, Element, Folder, Input, Interface, Manifest, Output, Port, Precision, Scorer, Session};
use crate::onnx::{SessionOptions, check_picture, score_sound};

/// Texts per run of the tower.
const TEXT_BATCH: usize = 64;
/// Texts whose embeddings are kept; a group shares its prompt, so a step needs few.
const CACHED_TEXTS: usize = 4096;

/// `[scorer.clip]`: what the towers' files do not say themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipScorer {
    /// The image tower: `pixel_values` f32 `[batch, 3, S, S]` to `image_embeds` f32 `[batch, D]`.
    pub image: String,
    /// The text tower: `input_ids` i64 `[batch, 77]` to `text_embeds` f32 `[batch, D]`.
    pub text: String,
    /// S, the side in pixels of the image tower's input.
    pub image_size: usize,
    /// How pictures are resized.
    pub preprocess: Preprocess,
    /// D, the length of an embedding.
    pub embed_dim: usize,
    /// The factor on cosines that the towers were trained with; not part of the score.
    pub logit_scale: f64,
    /// What the towers' weights are stored in.
    pub precision: Precision,
}

impl ClipScorer {
    pub(crate) fn check(&self) -> Result<(), String> {
        let size = |name, value, limit| match (1..=limit).contains(&value) {
            true => Ok(()),
            false => Err(format!("{name} is {value}; give 1 to {limit}")),
        };
        size("image_size", self.image_size, 4096)?;
        size("embed_dim", self.embed_dim, 1 << 16)?;
        match self.logit_scale.is_finite() {
            true => Ok(()),
            false => Err(format!("logit_scale is {}; give a finite number", self.logit_scale)),
        }
    }
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
    manifest: Manifest,
    scorer: ClipScorer,
    images: Session,
    texts: Session,
    options: SessionOptions,
    tokenizer: Tokenizer,
    /// Text embeddings by text.
    cache: Mutex<BTreeMap<String, Vec<f32>>>,
}

impl ClipReward {
    /// Loads a folder with `[scorer.clip]` in its `reward.toml`, as `rewards/export/export_clip.py` makes it.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::load_with(folder, &SessionOptions::default())
    }

    /// As [`ClipReward::load`], on this device.
    pub fn load_with(folder: &Path, options: &SessionOptions) -> Result<Self> {
        Self::from_folder(&Folder::open(folder)?, options)
    }

    /// The embedded miniature CLIP of the shapes world, named `clip`; see `rewards/models/README.md` for what it knows.
    pub fn tiny() -> Result<Self> {
        let files: &[(&str, &[u8])] = &[
            ("image.onnx", include_bytes!("../../models/clip/image.onnx")),
            ("text.onnx", include_bytes!("../../models/clip/text.onnx")),
        ];
        let manifest = include_str!("../../models/clip/reward.toml");
        Self::from_folder(&Folder::embedded("embedded models/clip", manifest, files)?, &SessionOptions::default())
    }

    /// The embedded miniature of HPSv2, [`ClipReward::tiny`] fine-tuned on synthetic preferences, named `hps`.
    pub fn tiny_hps() -> Result<Self> {
        let files: &[(&str, &[u8])] = &[
            ("image.onnx", include_bytes!("../../models/hps/image.onnx")),
            ("text.onnx", include_bytes!("../../models/hps/text.onnx")),
        ];
        let manifest = include_str!("../../models/hps/reward.toml");
        Self::from_folder(&Folder::embedded("embedded models/hps", manifest, files)?, &SessionOptions::default())
    }

    /// The towers of an opened folder.
    pub fn from_folder(folder: &Folder, options: &SessionOptions) -> Result<Self> {
        let manifest = folder.manifest().clone();
        let Scorer::Clip(scorer) = manifest.scorer.clone() else {
            return Err(folder.fault("it holds no [scorer.clip]; load it as OnnxReward"));
        };
        let (side, embedding) = (Dim::Is(scorer.image_size), [Dim::Free, Dim::Is(scorer.embed_dim)]);
        let pixels = [Dim::Free, Dim::Is(3), side, side];
        let session = |file: &str, input, output| {
            let interface = Interface { inputs: &[input], outputs: &[output], precision: scorer.precision };
            folder.session(file, &interface, options)
        };
        let images = session(
            &scorer.image,
            Port { name: "pixel_values", element: Element::F32, shape: Some(&pixels) },
            Port { name: "image_embeds", element: Element::F32, shape: Some(&embedding) },
        )?;
        let texts = session(
            &scorer.text,
            Port { name: "input_ids", element: Element::I64, shape: Some(&[Dim::Free, Dim::Is(CONTEXT)]) },
            Port { name: "text_embeds", element: Element::F32, shape: Some(&embedding) },
        )?;
        let (tokenizer, cache) = (Tokenizer::new(), Mutex::new(BTreeMap::new()));
        Ok(Self { manifest, scorer, images, texts, options: options.clone(), tokenizer, cache })
    }

    /// What the folder's `reward.toml` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its `[scorer.clip]`.
    pub fn scorer(&self) -> &ClipScorer {
        &self.scorer
    }

    /// One embedding per image, in order, of length [`ClipScorer::embed_dim`].
    pub fn embed_images(&self, images: &[&RgbImage]) -> Result<Vec<Vec<f32>>> {
        let size = self.scorer.image_size;
        let images_per_run = self.options.images_per_run(3 * size * size);
        let mut embeddings = Vec::with_capacity(images.len());
        for chunk in images.chunks(images_per_run) {
            let mut pixels = Vec::with_capacity(chunk.len() * 3 * size * size);
            for image in chunk {
                check_picture(image)?;
                self.scorer.preprocess.append(image, size, &mut pixels)?;
            }
            let output = self.images.run_one(Input::F32(&pixels, &[chunk.len(), 3, size, size]))?;
            embeddings.extend(self.rows("image_embeds", &output, chunk.len())?);
        }
        Ok(embeddings)
    }

    /// One embedding per text, in order, of length [`ClipScorer::embed_dim`].
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let mut embeddings = Vec::with_capacity(texts.len());
        for chunk in texts.chunks(TEXT_BATCH) {
            let ids: Vec<[i64; CONTEXT]> = chunk.iter().map(|text| self.tokenizer.ids(text)).collect::<Result<_>>()?;
            let ids = ids.concat();
            let output = self.texts.run_one(Input::I64(&ids, &[chunk.len(), CONTEXT]))?;
            embeddings.extend(self.rows("text_embeds", &output, chunk.len())?);
        }
        Ok(embeddings)
    }

    fn rows(&self, what: &'static str, output: &Output, n_rows: usize) -> Result<Vec<Vec<f32>>> {
        let expected = vec![n_rows, self.scorer.embed_dim];
        if output.shape != expected {
            return Err(Error::Shape { what, got: output.shape.clone(), expected });
        }
        Ok(output.values.chunks(self.scorer.embed_dim).map(<[f32]>::to_vec).collect())
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
        &self.manifest.name
    }

    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let scores = self.score_batch(&[(prompt, image)])?;
        scores.first().copied().ok_or_else(|| "the image tower returned no embedding".into())
    }

    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError> {
        let texts = self.text_table(batch.iter().map(|(prompt, _)| prompt.text.as_str()).collect())?;
        let (images, places) = distinct(batch.iter().map(|(_, image)| *image));
        let embeddings = self.embed_images(&images)?;
        let score = |((prompt, _), place): (&(&Prompt, &RgbImage), usize)| {
            Some(cosine(embeddings.get(place)?, texts.get(&prompt.text)?) as f32)
        };
        let scores: Option<Vec<f32>> = batch.iter().zip(places).map(score).collect();
        scores.ok_or_else(|| "the towers left a prompt or an image without an embedding".into())
    }

    fn score_each(&self, batch: &[(&Prompt, &RgbImage)]) -> Vec<Result<f32, BoxError>> {
        score_sound(batch, |sound| self.score_batch(sound))
    }
}

/// The images without those that are the same in memory, and the place of each row's among them: one picture may be judged
/// for many prompts.
fn distinct<'a>(images: impl Iterator<Item = &'a RgbImage>) -> (Vec<&'a RgbImage>, Vec<usize>) {
    let (mut found, mut places) = (Vec::new(), Vec::new());
    let mut known: BTreeMap<*const RgbImage, usize> = BTreeMap::new();
    for image in images {
        places.push(*known.entry(image).or_insert_with(|| {
            found.push(image);
            found.len() - 1
        }));
    }
    (found, places)
}

/// The cosine, summed in f64; the towers normalise, yet a foreign export may not.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
