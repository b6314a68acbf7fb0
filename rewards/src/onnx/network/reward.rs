//! A folder of networks as a reward.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;

use super::readout::Labels;
use super::tokens::{Tokenised, Tokenizer};
use super::{NetworkScorer, Source, Stage};
use crate::clip::ClipReward;
use crate::ocr::OcrReward;
use crate::onnx::{
    Dim, Element, Folder, Input, Interface, Manifest, Output, Port, Scorer, Session, SessionOptions, score_sound,
};

/// Texts whose tokens and values are kept; a group shares its prompt, so a step needs few.
const CACHED_TEXTS: usize = 4096;

/// A reward that its folder's `reward.toml` describes, whatever the kind.
///
/// ```no_run
/// use grpo_rewards::onnx::{OnnxReward, SessionOptions};
///
/// let reward = OnnxReward::load("models/aesthetic".as_ref(), &SessionOptions::default())?;
/// let rewards = grpo::RewardSet::new().with(reward, 1.0)?;
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct OnnxReward {
    manifest: Manifest,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Clip(Box<ClipReward>),
    Network(Box<Network>),
    Ocr(Box<OcrReward>),
}

impl OnnxReward {
    /// Verifies the folder's files and opens its networks on this device.
    pub fn load(folder: &Path, options: &SessionOptions) -> Result<Self> {
        let folder = Folder::open(folder)?;
        let manifest = folder.manifest().clone();
        let kind = match &manifest.scorer {
            Scorer::Clip(_) => Kind::Clip(Box::new(ClipReward::from_folder(&folder, options)?)),
            Scorer::Network(scorer) => Kind::Network(Box::new(Network::open(scorer, &folder, options)?)),
            Scorer::Ocr(_) => Kind::Ocr(Box::new(OcrReward::from_folder(&folder, options)?)),
        };
        Ok(Self { manifest, kind })
    }

    /// What the folder's `reward.toml` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl Reward<RgbImage> for OnnxReward {
    fn name(&self) -> &str {
        &self.manifest.name
    }

    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let scores = self.score_batch(&[(prompt, image)])?;
        scores.first().copied().ok_or_else(|| "the networks returned no score".into())
    }

    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError> {
        match &self.kind {
            Kind::Clip(clip) => clip.score_batch(batch),
            Kind::Network(network) => Ok(network.score_batch(batch)?),
            Kind::Ocr(ocr) => ocr.score_batch(batch),
        }
    }

    fn score_each(&self, batch: &[(&Prompt, &RgbImage)]) -> Vec<Result<f32, BoxError>> {
        score_sound(batch, |sound| self.score_batch(sound))
    }
}

/// The opened networks of a [`NetworkScorer`].
#[derive(Debug)]
struct Network {
    scorer: NetworkScorer,
    /// One for each stage.
    sessions: Vec<Session>,
    tokenizer: Option<Tokenizer>,
    labels: Labels,
    images_per_run: usize,
    /// What is the same for all pictures of a text, by text.
    cache: Mutex<BTreeMap<String, OfText>>,
}

/// Values by name, one row for each of some samples.
type Values = BTreeMap<String, Output>;

/// What is computed once for a text.
#[derive(Clone, Debug)]
struct OfText {
    tokens: Option<Tokenised>,
    /// One row of each value that no picture changes.
    values: Values,
}

/// What the stages of a run read, one row for each of its samples.
struct Rows<'a> {
    /// Row-major, in the picture's shape; empty where the run is for texts alone.
    pixels: &'a [f32],
    tokens: Vec<&'a Tokenised>,
    values: Values,
    n_rows: usize,
}

impl Network {
    fn open(scorer: &NetworkScorer, folder: &Folder, options: &SessionOptions) -> Result<Self> {
        let open = |stage: &Stage| open_stage(scorer, stage, folder, options);
        Ok(Self {
            sessions: scorer.stages.iter().map(open).collect::<Result<_>>()?,
            tokenizer: scorer.tokens.as_ref().map(|tokens| tokens.open(folder)).transpose()?,
            labels: scorer.score.labels(folder)?,
            images_per_run: options.images_per_run(scorer.picture.n_values()),
            scorer: scorer.clone(),
            cache: Mutex::default(),
        })
    }

    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>> {
        let of_texts = self.of_texts(batch.iter().map(|(prompt, _)| prompt.text.as_str()).collect())?;
        let mut scores = Vec::with_capacity(batch.len());
        for chunk in batch.chunks(self.images_per_run) {
            self.score_chunk(chunk, &of_texts, &mut scores)?;
        }
        Ok(scores)
    }

    fn score_chunk(
        &self,
        chunk: &[(&Prompt, &RgbImage)],
        of_texts: &BTreeMap<&str, OfText>,
        scores: &mut Vec<f32>,
    ) -> Result<()> {
        let mut pixels = Vec::with_capacity(chunk.len() * self.scorer.picture.n_values());
        for (_, image) in chunk {
            self.scorer.picture.append(image, &mut pixels)?;
        }
        let of_rows: Vec<&OfText> = chunk.iter().filter_map(|(prompt, _)| of_texts.get(prompt.text.as_str())).collect();
        let mut rows = Rows {
            pixels: &pixels,
            tokens: of_rows.iter().filter_map(|of_text| of_text.tokens.as_ref()).collect(),
            values: joined(&of_rows),
            n_rows: chunk.len(),
        };
        self.run(&mut rows, |stage, known| stage.outputs.values().any(|value| !known.contains_key(value)))?;
        let values = self.scorer.score.values();
        for (at, (prompt, _)) in chunk.iter().enumerate() {
            let row = |value: &&str| rows.values.get(*value).and_then(|output| row(output, at));
            let read: Vec<&[f32]> = values.iter().filter_map(row).collect();
            let score = self.scorer.score.read(&read, prompt, &self.labels)?;
            scores.push(self.scorer.after.apply(score) as f32);
        }
        Ok(())
    }

    /// What is the same for all pictures of each text, computed once and kept for later batches.
    fn of_texts<'t>(&self, texts: BTreeSet<&'t str>) -> Result<BTreeMap<&'t str, OfText>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<&str> = texts.iter().copied().filter(|text| !cache.contains_key(*text)).collect();
        if cache.len() + missing.len() > CACHED_TEXTS {
            cache.retain(|text, _| texts.contains(text.as_str()));
        }
        for text in missing {
            let tokens = self.tokenizer.as_ref().map(|tokenizer| tokenizer.tokenise(text)).transpose()?;
            let mut rows = Rows { pixels: &[], tokens: tokens.iter().collect(), values: Values::new(), n_rows: 1 };
            let of_prompts = self.scorer.values_of_prompts();
            self.run(&mut rows, |stage, _| stage.outputs.values().any(|value| of_prompts.contains(value.as_str())))?;
            let values = rows.values;
            cache.insert(text.to_string(), OfText { tokens, values });
        }
        Ok(texts.into_iter().filter_map(|text| Some((text, cache.get(text)?.clone()))).collect())
    }

    /// Runs the wanted stages in order, each adding its values to the rows.
    fn run(&self, rows: &mut Rows<'_>, wanted: impl Fn(&Stage, &Values) -> bool) -> Result<()> {
        for (stage, session) in self.scorer.stages.iter().zip(&self.sessions) {
            if wanted(stage, &rows.values) {
                let outputs = self.run_stage(stage, session, rows)?;
                rows.values.extend(renamed(stage, outputs, rows.n_rows)?);
            }
        }
        Ok(())
    }

    fn run_stage(&self, stage: &Stage, session: &Session, rows: &Rows<'_>) -> Result<Values> {
        let n_rows = rows.n_rows;
        let [first, second, third] = self.scorer.picture.shape();
        let picture = [n_rows, first, second, third];
        let token_shape = [n_rows, self.scorer.tokens.as_ref().map_or(0, super::Tokens::length)];
        let tokens =
            |of: fn(&Tokenised) -> &Vec<i64>| rows.tokens.iter().flat_map(|tokens| of(tokens).clone()).collect();
        let [ids, mask, types]: [Vec<i64>; 3] = [tokens(|it| &it.ids), tokens(|it| &it.mask), tokens(|it| &it.types)];
        let mut normalised = BTreeMap::new();
        for source in stage.inputs.values() {
            if let Source::Normalised(value) = source
                && let Some(output) = rows.values.get(value)
            {
                normalised.insert(value.as_str(), unit_rows(output));
            }
        }
        let mut inputs = Vec::with_capacity(stage.inputs.len());
        for (name, source) in &stage.inputs {
            let unmade = |value: &str| Error::config(format!("`{value}` was not made before `{}`", stage.file));
            let input = match source {
                Source::Picture => Input::F32(rows.pixels, &picture),
                Source::Ids => Input::I64(&ids, &token_shape),
                Source::Mask => Input::I64(&mask, &token_shape),
                Source::Types => Input::I64(&types, &token_shape),
                Source::Value(value) => {
                    let output = rows.values.get(value).ok_or_else(|| unmade(value))?;
                    Input::F32(&output.values, &output.shape)
                }
                Source::Normalised(value) => {
                    let output = normalised.get(value.as_str()).ok_or_else(|| unmade(value))?;
                    Input::F32(&output.values, &output.shape)
                }
            };
            inputs.push((name.as_str(), input));
        }
        session.run(&inputs)
    }
}

fn open_stage(scorer: &NetworkScorer, stage: &Stage, folder: &Folder, options: &SessionOptions) -> Result<Session> {
    let picture = scorer.picture.dims();
    let tokens = [Dim::Free, Dim::Is(scorer.tokens.as_ref().map_or(0, super::Tokens::length))];
    let input = |(name, source): (&'_ String, &Source)| {
        let (element, shape) = match source {
            Source::Picture => (Element::F32, Some(&picture[..])),
            Source::Ids | Source::Mask | Source::Types => (Element::I64, Some(&tokens[..])),
            Source::Value(_) | Source::Normalised(_) => (Element::F32, None),
        };
        (name.clone(), element, shape)
    };
    let inputs: Vec<_> = stage.inputs.iter().map(input).collect();
    let inputs: Vec<Port<'_>> =
        inputs.iter().map(|(name, element, shape)| Port { name, element: *element, shape: *shape }).collect();
    let output = |name| Port { name, element: Element::F32, shape: None };
    let outputs: Vec<Port<'_>> = stage.outputs.keys().map(|name| output(name.as_str())).collect();
    folder.session(&stage.file, &Interface { inputs: &inputs, outputs: &outputs, precision: scorer.precision }, options)
}

/// A stage's outputs under the names that its `outputs` give them, checked to have a row for each sample.
fn renamed(stage: &Stage, mut outputs: Values, n_rows: usize) -> Result<Values> {
    let rename = |(name, value): (&String, &String)| {
        let output = outputs.remove(name)?;
        if output.shape.first() == Some(&n_rows) {
            return Some(Ok((value.clone(), output)));
        }
        let shape = format!("output `{name}` of `{}` has shape {:?}", stage.file, output.shape);
        Some(Err(Error::config(format!("{shape}; {n_rows} rows were due, one for each sample"))))
    };
    stage.outputs.iter().filter_map(rename).collect()
}

/// The values of each text, one below the other.
fn joined(of_rows: &[&OfText]) -> Values {
    let Some(first) = of_rows.first() else { return Values::new() };
    let join = |(name, output): (&String, &Output)| {
        let rows = of_rows.iter().filter_map(|of_text| of_text.values.get(name));
        let values = rows.flat_map(|output| output.values.iter().copied()).collect();
        let mut shape = output.shape.clone();
        shape.iter_mut().take(1).for_each(|n_rows| *n_rows = of_rows.len());
        (name.clone(), Output { shape, values })
    };
    first.values.iter().map(join).collect()
}

fn row(output: &Output, at: usize) -> Option<&[f32]> {
    let length: usize = output.shape.iter().skip(1).product();
    output.values.get(at * length..(at + 1) * length)
}

/// Each row divided by its length, summed in f64; a row of zeros stays one.
fn unit_rows(output: &Output) -> Output {
    let length: usize = output.shape.iter().skip(1).product();
    let unit = |row: &[f32]| {
        let norm = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
        let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        row.iter().map(|&value| (f64::from(value) * scale) as f32).collect::<Vec<f32>>()
    };
    Output { shape: output.shape.clone(), values: output.values.chunks(length.max(1)).flat_map(unit).collect() }
}
