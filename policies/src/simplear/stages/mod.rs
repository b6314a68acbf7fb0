//! Pretraining and supervised fine-tuning: the language-modelling loss over rows of captioned tokens.
//!
//! As published (SimpleAR, §3.2 and its `preprocess_t2i`): text, special and visual ids are all trained, over the full
//! vocabulary; with probability 0.1 a row keeps neither prefix nor caption (condition dropout, which guidance needs).

mod loader;
mod rows;

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use grpo::observe::Metrics;
use grpo::{Error, Gradients, Params, Policy, Prompt, Request, Result, Seed, gallery};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use loader::{Loader, Source};
pub use rows::{CaptionChoice, PUBLISHED_PREFIXES, Prefixes, RowConfig, TrainingRow};

use super::{Law, SimpleAr};
use crate::decoder::{Scores, Targets};
use crate::safetensors_file::Precision;
use crate::stage::{Learned, Learner};
use crate::tokens::{Order, TokenSet};

/// Images that are drawn for each caption of the pictures.
const DRAWN: u64 = 3;

/// Which ids are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOver {
    /// Every id after the first: text, specials and image, as published.
    #[default]
    Row,
    /// The image's tokens alone.
    Image,
}

/// What a step learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchPlan {
    /// Rows a step.
    pub batch: usize,
    /// Rows of one pass forward and back; their gradients are added. As many as a card's memory holds where that is less.
    #[serde(default = "rows_per_backward")]
    pub rows_per_backward: usize,
    /// Which ids are trained.
    #[serde(default)]
    pub loss: LossOver,
    /// What rows say.
    #[serde(default)]
    pub rows: RowConfig,
    /// Rows that are held out, the same whatever the seed.
    #[serde(default = "validation_rows")]
    pub validation_rows: usize,
    /// Held-out captions that images are drawn for.
    #[serde(default = "pictures")]
    pub pictures: usize,
    /// How they are drawn.
    #[serde(default)]
    pub law: Law,
}

fn rows_per_backward() -> usize {
    32
}

fn validation_rows() -> usize {
    256
}

fn pictures() -> usize {
    8
}

impl BatchPlan {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let counts = [("batch", self.batch), ("rows_per_backward", self.rows_per_backward)];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("{name} is 0; give at least 1")));
        }
        if !self.law.prefix.is_empty() {
            return Err(Error::config(format!(
                "law.prefix is `{}`; what stands before captions is said by rows.prefixes",
                self.law.prefix
            )));
        }
        self.law.check()?;
        self.rows.check()
    }
}

/// Rows of captioned tokens, learned by a policy.
pub struct CaptionedTokens {
    policy: SimpleAr,
    plan: BatchPlan,
    source: Source,
    order: Order,
    loader: Option<Loader>,
    held_out: Vec<TrainingRow>,
    /// What they are rows of, for a run that is resumed.
    held_out_of: String,
    prompts: Vec<(Prompt, RgbImage)>,
    seed: Seed,
}

impl CaptionedTokens {
    /// A policy that learns `tokens`, whose grid it must have, and whose visual tokenizer must have made them.
    ///
    /// Rows are held out of `validation` where it is given, and of `tokens` where it is not.
    pub fn new(
        policy: SimpleAr,
        plan: BatchPlan,
        (tokens, validation): (Arc<TokenSet>, Option<Arc<TokenSet>>),
        seed: Seed,
    ) -> Result<Self> {
        plan.check()?;
        let mut rows = plan.rows.clone();
        rows.max_caption_tokens = rows.max_caption_tokens.min(policy.longest_caption());
        for set in [Some(&tokens), validation.as_ref()].into_iter().flatten() {
            policy.check_tokens(set)?;
        }
        let source = Source {
            tokens: tokens.clone(),
            text: policy.text.clone(),
            config: rows.clone(),
            seed: seed.named("rows"),
        };
        let n_held_out = if validation.is_some() { 0 } else { plan.validation_rows };
        let order = Order::new(tokens.len(), n_held_out, seed.named("data"))?;
        let (from, held_out) = match &validation {
            None => (&tokens, order.held_out().to_vec()),
            Some(set) => (set, Order::drawn(set.len(), plan.validation_rows).0),
        };
        // What is held out says the same in every run and at every step, and is never without its caption.
        let said = RowConfig { caption_dropout: 0.0, ..rows };
        let watched =
            Source { tokens: from.clone(), config: said, seed: Seed::new(0).named("validation"), ..source.clone() };
        let rows: Vec<TrainingRow> = held_out.iter().map(|index| watched.row(*index, 0)).collect::<Result<_>>()?;
        let prompts = shown_prompts(&policy, &watched, &held_out, plan.pictures)?;
        let held_out_of = validation.as_ref().map_or_else(|| "these tokens".into(), |set| set.identity());
        Ok(Self { policy, plan, source, order, loader: None, held_out: rows, held_out_of, prompts, seed })
    }

    /// The policy.
    pub fn policy(&self) -> &SimpleAr {
        &self.policy
    }

    /// Rows of an epoch.
    pub fn n_trained(&self) -> usize {
        self.order.n_trained()
    }

    /// The batch of a step, from the thread that reads ahead.
    fn batch(&mut self, step: usize) -> Result<(Vec<TrainingRow>, f64)> {
        let loader = match self.loader.take().filter(|loader| loader.is_at(step)) {
            Some(loader) => loader,
            None => Loader::start(self.source.clone(), self.order.clone(), self.plan.batch, step),
        };
        self.loader.insert(loader).next()
    }

    /// Rows that go through the decoder together.
    fn rows_at_once(&self, _rows: &[TrainingRow]) -> Result<usize> {
        #[cfg(feature = "cuda")]
        if self.policy.decoder.on_card() {
            let longest = _rows.iter().map(|row| row.ids.len()).max().unwrap_or(1);
            let vocabulary = self.policy.decoder.config().vocab_size;
            let fit = crate::cuda::rows_that_fit(&self.policy.decoder, longest, vocabulary)?;
            return Ok(self.plan.rows_per_backward.min(fit));
        }
        Ok(self.plan.rows_per_backward)
    }
}

/// Sums of negative log-likelihoods, in nats, over the trained ids of rows.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct RowNll {
    /// Over tokens of images.
    pub image: f64,
    /// How many these are.
    pub n_image: usize,
    /// Over ids of texts, and the specials.
    pub text: f64,
    /// How many these are.
    pub n_text: usize,
}

impl RowNll {
    fn add(&mut self, other: Self) {
        self.image += other.image;
        self.n_image += other.n_image;
        self.text += other.text;
        self.n_text += other.n_text;
    }

    /// The mean over all trained ids, and over those of images and texts, under these names.
    fn means(&self, [all, image, text]: [&str; 3]) -> Metrics {
        let mean = |sum: f64, n: usize| (n > 0).then(|| sum / n as f64);
        let named = [
            (all, mean(self.image + self.text, self.n_image + self.n_text)),
            (image, mean(self.image, self.n_image)),
            (text, mean(self.text, self.n_text)),
        ];
        named.into_iter().filter_map(|(name, mean)| Some((name.to_string(), mean?))).collect()
    }
}

impl SimpleAr {
    /// Log-probabilities, over the full vocabulary, of the trained ids of rows, with the sums of their negatives by row.
    fn row_scores(&self, rows: &[TrainingRow], loss: LossOver) -> Result<(Scores, Vec<RowNll>)> {
        let read: Vec<&[u32]> = rows.iter().map(|row| &row.ids[..row.ids.len().saturating_sub(1)]).collect();
        let (mut places, mut ids, mut of_image) = (Vec::new(), Vec::new(), Vec::new());
        for (row, TrainingRow { ids: all, image_at }) in rows.iter().enumerate() {
            let first = if loss == LossOver::Row { 1 } else { *image_at };
            for (at, id) in all.iter().enumerate().skip(first) {
                places.push((row, at - 1));
                ids.push(*id);
                of_image.push((row, at >= *image_at));
            }
        }
        let slice = 0..self.decoder.config().vocab_size;
        let scores = self.decoder.score(&read, &Targets { places, ids, slice, temperature: 1.0 })?;
        let mut all = vec![RowNll::default(); rows.len()];
        for (log_prob, (row, of_image)) in scores.log_probs.detach().to_vec1::<f32>()?.into_iter().zip(of_image) {
            let (nll, sums) = (-f64::from(log_prob), &mut all[row]);
            match of_image {
                true => (sums.image, sums.n_image) = (sums.image + nll, sums.n_image + 1),
                false => (sums.text, sums.n_text) = (sums.text + nll, sums.n_text + 1),
            }
        }
        Ok((scores, all))
    }

    /// The negative log-likelihood of every id of each row but its first, over the full vocabulary and without a gradient; so
    /// many rows go through the decoder at once.
    pub fn row_nll(&self, rows: &[TrainingRow], at_once: usize) -> Result<Vec<RowNll>> {
        let policy = self.detached()?;
        let mut sums = Vec::with_capacity(rows.len());
        for part in rows.chunks(at_once.max(1)) {
            sums.extend(policy.row_scores(part, LossOver::Row)?.1);
        }
        Ok(sums)
    }

    /// Ids of a caption that the decoder has positions for, beside the image and two specials; the last id is never read.
    fn longest_caption(&self) -> usize {
        (self.decoder.config().max_position_embeddings + 1).saturating_sub(self.n_tokens() + 2)
    }

    /// An error for tokens of another grid or visual tokenizer than the policy's.
    pub fn check_tokens(&self, tokens: &TokenSet) -> Result<()> {
        let fault = |what: String| {
            Err(Error::config(format!("{what}: tokenise the corpus with the policy's own visual tokenizer and size")))
        };
        if tokens.grid() != self.grid {
            return fault(format!(
                "the tokens have a grid of {:?} and the policy one of {:?}",
                tokens.grid(),
                self.grid
            ));
        }
        let (theirs, ours) = (tokens.n_codes(), self.cosmos.n_codes());
        if theirs != ours {
            return fault(format!("the tokens are of a codebook of {theirs} and the policy's has {ours}"));
        }
        match tokens.tokenizer() == self.cosmos.fingerprint()? {
            true => Ok(()),
            false => fault("the tokens were made by another visual tokenizer than the policy's".into()),
        }
    }
}

impl Learner for CaptionedTokens {
    fn params(&self) -> Params {
        self.policy.params()
    }

    fn learn(&mut self, step: usize, gradients: &mut Gradients) -> Result<Learned> {
        let (rows, waited_s) = self.batch(step)?;
        let n_trained = |row: &TrainingRow| match self.plan.loss {
            LossOver::Row => row.ids.len() - 1,
            LossOver::Image => row.ids.len() - row.image_at,
        };
        let total: usize = rows.iter().map(n_trained).sum();
        let mut sums = RowNll::default();
        for part in rows.chunks(self.rows_at_once(&rows)?) {
            let (Scores { log_probs, tape, .. }, of_part) = self.policy.row_scores(part, self.plan.loss)?;
            backward(&log_probs, tape, -1.0 / total.max(1) as f64, &self.policy, gradients)?;
            of_part.into_iter().for_each(|of_row| sums.add(of_row));
        }
        let mut metrics = sums.means(["loss", "loss/image", "loss/text"]);
        let loss = metrics.remove("loss").unwrap_or(f64::NAN);
        let n_seen = (step + 1) * self.plan.batch;
        metrics.insert("epoch".into(), n_seen as f64 / self.order.n_trained() as f64);
        let config = self.policy.decoder.config();
        let flops = rows.iter().map(|row| 3.0 * config.forward_flops(row.ids.len() - 1, n_trained(row))).sum();
        let n_tokens = rows.iter().map(|row| row.ids.len()).sum();
        Ok(Learned { loss, n_images: rows.len(), n_tokens, flops, waited_s, metrics })
    }

    fn validate(&mut self) -> Result<Metrics> {
        let mut sums = RowNll::default();
        let of_rows = self.policy.row_nll(&self.held_out, self.rows_at_once(&self.held_out)?)?;
        of_rows.into_iter().for_each(|of_row| sums.add(of_row));
        Ok(sums.means(["validation/nll", "validation/image_nll", "validation/text_nll"]))
    }

    fn pictures(&mut self) -> Result<Vec<(String, RgbImage)>> {
        let policy = self.policy.detached()?.with_law(self.plan.law.clone())?;
        let seed = Seed::new(0).named("validation pictures");
        let requests: Vec<Request<'_>> = (0u64..)
            .zip(&self.prompts)
            .flat_map(|(row, (prompt, _))| {
                (0..DRAWN).map(move |draw| Request { prompt, seed: seed.fold(row).fold(draw) })
            })
            .collect();
        let mut drawn = Vec::new();
        for part in requests.chunks(self.plan.rows_per_backward) {
            let images = policy.sample(part).map_err(|error| Error::policy("sample", error))?;
            drawn.extend(images.into_iter().map(|completion| completion.sample));
        }
        let rows: Vec<(String, Vec<(String, RgbImage)>)> = self
            .prompts
            .iter()
            .zip(drawn.chunks(DRAWN as usize))
            .map(|((prompt, picture), drawn)| {
                let first = ("its tokens".to_string(), picture.clone());
                let drawn = drawn.iter().enumerate().map(|(at, picture)| (format!("drawn {at}"), picture.clone()));
                (prompt.text.clone(), std::iter::once(first).chain(drawn).collect())
            })
            .collect();
        Ok(gallery(&rows).map(|picture| ("panel/validation".to_string(), picture)).into_iter().collect())
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.policy.save(folder, Precision::F32)
    }

    fn identity(&self) -> Result<String> {
        let plan = BatchPlan { law: Law::default(), pictures: 0, ..self.plan.clone() };
        let plan = toml::to_string(&plan).map_err(|error| Error::config(error.to_string()))?;
        let (rows, columns) = self.policy.grid();
        let text = crc32c::crc32c(self.policy.text.json().as_bytes());
        Ok(format!(
            "{plan}tokens: {}\nheld out: {} rows of {}\ntext tokenizer: crc32c {text:08x}\ngrid: {rows} x {columns}\nseed: {:?}\n",
            self.source.tokens.identity(),
            self.held_out.len(),
            self.held_out_of,
            self.seed
        ))
    }
}

/// Adds the gradient of `share` times the sum of log-probabilities.
fn backward(
    log_probs: &Tensor,
    tape: Option<crate::decoder::Tape>,
    share: f64,
    policy: &SimpleAr,
    gradients: &mut Gradients,
) -> Result<()> {
    match tape {
        Some(tape) => tape.backward(&(log_probs.ones_like()? * share)?, None, gradients),
        None => gradients.add_backward(&(log_probs.sum_all()? * share)?, &policy.params()),
    }
}

/// The first held-out captions with what their tokens look like. One that rows cut is left out: it is not what was trained on.
fn shown_prompts(policy: &SimpleAr, source: &Source, held_out: &[usize], n: usize) -> Result<Vec<(Prompt, RgbImage)>> {
    let mut shown = Vec::new();
    for index in held_out {
        if shown.len() == n {
            break;
        }
        let row = source.tokens.row(*index)?;
        let text = source.config.text(&row.lines, source.seed.fold(0).fold(*index as u64)).unwrap_or_default();
        if policy.prompt_ids(&text, "")?.len() > source.config.max_caption_tokens.saturating_add(2) {
            continue;
        }
        let codes: Vec<u32> = row.codes.iter().map(|code| u32::from(*code)).collect();
        let picture = policy.decode(&[codes])?.pop().unwrap_or_default();
        shown.push((Prompt::new(text), picture));
    }
    Ok(shown)
}
