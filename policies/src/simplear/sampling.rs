//! Drawing the ids of images: prompts read once, branches of guidance side by side, token by token.

#[cfg(feature = "benches")]
pub(super) mod midway;

use std::ops::Range;

use candle_core::Tensor;
use grpo::{Error, Request, Result, Seed};
use rayon::prelude::*;

use super::speculative::speculate;
use super::{ImageTrace, Law, SimpleAr, Vocabulary};
use crate::decoder::{Cache, DecodeBuffers, Snapshot, repeat_rows};
use crate::sampling::Distribution;

/// What an image is made of, and what that took.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// The visual tokens.
    pub trace: ImageTrace,
    /// Log-probability of each token under the law, `[T]`.
    pub log_probs: Vec<f32>,
    /// How often the decoder ran until the last token was known, the pass over the prompt included.
    pub n_passes: usize,
}

/// Choices so far of one row, counted from the first that competes.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) choices: Vec<u32>,
    /// Log-probability of each under the law.
    pub(super) log_probs: Vec<f32>,
    /// Passes of the decoder so far.
    pub(super) n_passes: usize,
}

impl Sequence {
    /// None so far, with memory for so many.
    pub(super) fn with_room(n_tokens: usize) -> Self {
        Self { choices: Vec::with_capacity(n_tokens), log_probs: Vec::with_capacity(n_tokens), n_passes: 0 }
    }

    pub(super) fn push(&mut self, choice: usize, law: &Distribution) {
        self.choices.push(choice as u32);
        self.log_probs.push(law.log_prob(choice));
    }
}

/// Draws token by token; from the second step on nothing is allocated.
fn one_by_one(branches: &mut Branches<'_>, seeds: &[Seed], n_tokens: usize) -> Result<Vec<Sequence>> {
    let row = |seed: &Seed| (*seed, Sequence::with_room(n_tokens), Distribution::default());
    let mut rows: Vec<(Seed, Sequence, Distribution)> = seeds.iter().map(row).collect();
    for position in 0..n_tokens {
        rows.par_iter_mut().enumerate().try_for_each(|(index, (seed, sequence, law))| {
            branches.shape(index, law)?;
            sequence.n_passes += 1;
            sequence.push(law.draw(seed.fold(position as u64).uniform()), law);
            Ok::<(), Error>(())
        })?;
        if position + 1 < n_tokens {
            branches.extend(rows.iter().map(|(_, sequence, _)| &sequence.choices[position..]))?;
        }
    }
    Ok(rows.into_iter().map(|(_, sequence, _)| sequence).collect())
}

impl SimpleAr {
    /// The ids that compete for a place in the image.
    pub(super) fn choices(&self, vocabulary: Vocabulary) -> Range<usize> {
        match vocabulary {
            Vocabulary::Visual => self.visual_ids(),
            Vocabulary::Full => 0..self.decoder.config().vocab_size,
        }
    }

    /// What every request's image is made of, in order, not yet decoded to pixels.
    ///
    /// Depends on each request's prompt and seed, and on the window, never on neighbours.
    pub fn draw(&self, requests: &[Request<'_>]) -> Result<Vec<Drawn>> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let choices = self.choices(self.law.vocabulary);
        #[cfg(feature = "cuda")]
        if self.window == 1 && self.decoder.on_card() {
            return self.draw_on_card(requests, choices);
        }
        let snapshot = self.decoder.snapshot(choices.clone())?;
        let mut branches = Branches::read(self, &snapshot, requests, self.n_tokens())?;
        let seeds: Vec<Seed> = requests.iter().map(|request| request.seed).collect();
        // A thread of the pool drives the loop: a call from outside would wake the pool, and wait for it, several times a
        // step, and allocate every now and then.
        let sequences = rayon::scope(|_| match self.window {
            1 => one_by_one(&mut branches, &seeds, self.n_tokens()),
            window => speculate(branches, &seeds, (self.n_tokens(), window)),
        })?;
        let drawn = |sequence: Sequence| {
            let ids: Vec<u32> = sequence.choices.iter().map(|choice| choices.start as u32 + choice).collect();
            Drawn { trace: self.trace(&ids), log_probs: sequence.log_probs, n_passes: sequence.n_passes }
        };
        Ok(sequences.into_iter().map(drawn).collect())
    }

    /// As [`SimpleAr::draw`], all choices made where the logits are.
    #[cfg(feature = "cuda")]
    fn draw_on_card(&self, requests: &[Request<'_>], slice: Range<usize>) -> Result<Vec<Drawn>> {
        let (prompts, repeats) = self.distinct_prompts(requests)?;
        let negative = if self.law.guidance == 1.0 { None } else { Some(self.negative_ids()?) };
        let n_tokens = self.n_tokens();
        prompts
            .iter()
            .chain(&negative)
            .try_for_each(|prompt| check_room(prompt.len(), n_tokens, self.decoder.config().max_position_embeddings))?;
        let offset = slice.start as u32;
        let drawn = crate::cuda::draw(
            &self.decoder,
            &crate::cuda::Job {
                prompts: &prompts,
                repeats: &repeats,
                guidance: negative.as_deref().map(|ids| (ids, self.law.guidance)),
                shaping: self.law.shaping(),
                slice,
                n_tokens,
                uniforms: &|row, position| requests[row].seed.fold(position as u64).uniform(),
            },
        )?;
        let drawn = drawn.into_iter().map(|(choices, log_probs)| {
            let ids: Vec<u32> = choices.iter().map(|choice| offset + choice).collect();
            Drawn { trace: self.trace(&ids), log_probs, n_passes: n_tokens }
        });
        Ok(drawn.collect())
    }

    fn negative_ids(&self) -> Result<Vec<u32>> {
        match &self.law.negative_prompt {
            Some(negative) => self.text.prompt(negative),
            None => Ok(self.text.null_prompt()),
        }
    }

    /// Each run of requests for one caption is read once; how often it is repeated.
    fn distinct_prompts(&self, requests: &[Request<'_>]) -> Result<(Vec<Vec<u32>>, Vec<usize>)> {
        let (mut prompts, mut repeats): (Vec<Vec<u32>>, Vec<usize>) = (Vec::new(), Vec::new());
        for run in requests.chunk_by(|a, b| a.prompt.text == b.prompt.text) {
            prompts.push(self.prompt_ids(&run[0].prompt.text, &self.law.prefix)?);
            repeats.push(run.len());
        }
        Ok((prompts, repeats))
    }
}

/// The conditional branch of every row and, under guidance, behind all of those the unconditional ones, which read the
/// same tokens behind a prompt of their own.
///
/// Rows never meet, so both branches go through the decoder as one batch, which reads the weights once.
pub(super) struct Branches<'a> {
    law: &'a Law,
    snapshot: &'a Snapshot,
    /// How often each row is there.
    n_branches: usize,
    cache: Cache,
    /// What the last pass read, in every branch.
    ids: Vec<Vec<u32>>,
    /// Logits of the last pass: those of one branch behind those of the other.
    buffers: DecodeBuffers,
}

impl<'a> Branches<'a> {
    /// Reads the prompts of all requests, with room for `n_tokens` more in each row.
    fn read(policy: &'a SimpleAr, snapshot: &'a Snapshot, requests: &[Request<'_>], n_tokens: usize) -> Result<Self> {
        let (mut prompts, mut repeats) = policy.distinct_prompts(requests)?;
        if n_branches(&policy.law) > 1 {
            prompts.push(policy.negative_ids()?);
            repeats.push(requests.len());
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let most = snapshot.max_positions();
        check_room(longest, n_tokens, most)?;
        // A device writes the filling of an empty run behind the row's end.
        let (cache, hidden) = snapshot.prefill(&prompts, (longest + n_tokens).min(most))?;
        Self::behind(&policy.law, snapshot, (cache.expand(&repeats)?, &repeat_rows(&hidden, &repeats)?))
    }

    /// Branches of rows behind what their caches have read, whose last hidden states come with them.
    fn behind(law: &'a Law, snapshot: &'a Snapshot, (cache, hidden): (Cache, &Tensor)) -> Result<Self> {
        let mut buffers = DecodeBuffers::default();
        snapshot.logits_in(hidden, &mut buffers)?;
        let ids = vec![Vec::new(); cache.rows()];
        Ok(Self { law, snapshot, n_branches: n_branches(law), cache, ids, buffers })
    }

    /// Reads a run of choices in each row.
    pub(super) fn extend<'r>(&mut self, runs: impl Iterator<Item = &'r [u32]> + Clone) -> Result<()> {
        let first = self.snapshot.slice().start as u32;
        for (ids, run) in self.ids.iter_mut().zip(runs.cycle()) {
            ids.clear();
            ids.extend(run.iter().map(|choice| first + choice));
        }
        self.snapshot.extend_logits(&mut self.cache, &self.ids, &mut self.buffers)
    }

    /// Forgets the last so many tokens of each row.
    pub(super) fn take_back(&mut self, n_tokens: &[usize]) -> Result<()> {
        let lengths = self.cache.lengths();
        let lengths: Vec<usize> = lengths.iter().zip(n_tokens.iter().cycle()).map(|(have, back)| have - back).collect();
        self.cache.truncate(&lengths)
    }

    /// Shapes the law behind a token of the last pass, which are counted row after row: at first each row's prompt.
    pub(super) fn shape(&self, token: usize, law: &mut Distribution) -> Result<()> {
        let (shaping, logits) = (self.law.shaping(), self.buffers.logits());
        let (conditional, unconditional) = logits.split_at(logits.len() / self.n_branches);
        let n_choices = self.snapshot.slice().len();
        let at = token * n_choices..(token + 1) * n_choices;
        match self.n_branches {
            1 => law.shape(&conditional[at], &shaping),
            _ => law.shape_guided((&conditional[at.clone()], &unconditional[at]), self.law.guidance, &shaping),
        }
        law.check()
    }

    /// The laws behind all tokens of the last pass.
    pub(super) fn laws(&self) -> Result<Vec<Distribution>> {
        let n_tokens = self.buffers.logits().len() / self.snapshot.slice().len() / self.n_branches;
        let law = |token: usize| {
            let mut law = Distribution::default();
            self.shape(token, &mut law).map(|()| law)
        };
        (0..n_tokens).into_par_iter().map(law).collect()
    }
}

/// How often the decoder reads each row: guidance has a branch of its own.
fn n_branches(law: &Law) -> usize {
    if law.guidance == 1.0 { 1 } else { 2 }
}

/// An error where a prompt and an image do not fit the decoder's positions.
fn check_room(prompt: usize, n_tokens: usize, most: usize) -> Result<()> {
    // The last token is chosen and never read.
    if prompt + n_tokens <= most + 1 {
        return Ok(());
    }
    Err(Error::config(format!(
        "a prompt of {prompt} tokens and an image of {n_tokens} do not fit the decoder's {most} positions; shorten the \
         prompt to {} tokens or take smaller images",
        (most + 1).saturating_sub(n_tokens)
    )))
}
