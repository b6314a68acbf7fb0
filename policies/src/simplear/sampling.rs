//! Drawing the ids of images: prompts read once, branches of guidance side by side, token by token.

use std::ops::Range;

use candle_core::Tensor;
use grpo::{Error, Request, Result, Seed};
use rayon::prelude::*;

use super::speculative::speculate;
use super::{ImageTrace, Law, SimpleAr, Vocabulary};
use crate::decoder::{Cache, Snapshot, repeat_rows};
use crate::sampling::{Distribution, guided};

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
#[derive(Clone, Debug, Default)]
pub(super) struct Sequence {
    pub(super) choices: Vec<u32>,
    /// Log-probability of each under the law.
    pub(super) log_probs: Vec<f32>,
    /// Passes of the decoder so far.
    pub(super) n_passes: usize,
}

impl Sequence {
    pub(super) fn push(&mut self, choice: usize, law: &Distribution) {
        self.choices.push(choice as u32);
        self.log_probs.push(law.log_prob(choice));
    }
}

/// Draws token by token.
fn one_by_one(mut branches: Branches<'_>, seeds: &[Seed], n_tokens: usize) -> Result<Vec<Sequence>> {
    let mut rows = vec![Sequence::default(); seeds.len()];
    let mut laws = branches.first_laws()?;
    for position in 0..n_tokens {
        rows.par_iter_mut().zip(&laws).zip(seeds).for_each(|((row, law), seed)| {
            row.n_passes += 1;
            row.push(law.draw(seed.fold(position as u64).uniform()), law);
        });
        if position + 1 < n_tokens {
            let lasts: Vec<&[u32]> = rows.iter().map(|row| &row.choices[position..]).collect();
            laws = branches.extend(&lasts)?;
        }
    }
    Ok(rows)
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
        let branches = Branches::read(self, &snapshot, requests, self.n_tokens())?;
        let seeds: Vec<Seed> = requests.iter().map(|request| request.seed).collect();
        let sequences = match self.window {
            1 => one_by_one(branches, &seeds, self.n_tokens())?,
            window => speculate(branches, &seeds, (self.n_tokens(), window))?,
        };
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

/// The conditional branch and, under guidance, the unconditional one, which reads the same tokens behind its own prompt.
pub(super) struct Branches<'a> {
    law: &'a Law,
    /// The id of the first choice.
    offset: u32,
    conditional: Branch<'a>,
    unconditional: Option<Branch<'a>>,
}

impl<'a> Branches<'a> {
    /// Reads the prompts of all requests, with room for `n_tokens` more in each row.
    fn read(policy: &'a SimpleAr, snapshot: &'a Snapshot, requests: &[Request<'_>], n_tokens: usize) -> Result<Self> {
        let (prompts, repeats) = policy.distinct_prompts(requests)?;
        let conditional = Branch::read(snapshot, &prompts, &repeats, n_tokens)?;
        let unconditional = match policy.law.guidance == 1.0 {
            true => None,
            false => Some(Branch::read(snapshot, &[policy.negative_ids()?], &[requests.len()], n_tokens)?),
        };
        Ok(Self { law: &policy.law, offset: snapshot.slice().start as u32, conditional, unconditional })
    }

    /// The law of each row's first token.
    pub(super) fn first_laws(&self) -> Result<Vec<Distribution>> {
        let conditional = self.conditional.logits(&self.conditional.prompt_hidden)?;
        let unconditional =
            self.unconditional.as_ref().map(|branch| branch.logits(&branch.prompt_hidden)).transpose()?;
        checked(self.laws(conditional, unconditional))
    }

    /// Reads a run of choices in each row; the law behind every one of them, row after row.
    pub(super) fn extend(&mut self, runs: &[&[u32]]) -> Result<Vec<Distribution>> {
        let ids: Vec<Vec<u32>> =
            runs.iter().map(|run| run.iter().map(|choice| self.offset + choice).collect()).collect();
        let conditional = self.conditional.extend(&ids)?;
        let unconditional = self.unconditional.as_mut().map(|branch| branch.extend(&ids)).transpose()?;
        checked(self.laws(conditional, unconditional))
    }

    /// Forgets the last so many tokens of each row.
    pub(super) fn take_back(&mut self, n_tokens: &[usize]) -> Result<()> {
        self.conditional.take_back(n_tokens)?;
        self.unconditional.as_mut().map_or(Ok(()), |branch| branch.take_back(n_tokens))
    }

    fn laws(&self, conditional: Vec<Vec<f32>>, unconditional: Option<Vec<Vec<f32>>>) -> Vec<Distribution> {
        let shaping = self.law.shaping();
        let Some(unconditional) = unconditional else {
            return conditional.into_par_iter().map(|c| Distribution::new(c, &shaping)).collect();
        };
        let law = |(c, u): (&Vec<f32>, &Vec<f32>)| Distribution::new(guided(c, u, self.law.guidance), &shaping);
        conditional.par_iter().zip(&unconditional).map(law).collect()
    }
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

/// Laws of which nothing can be drawn are an error.
fn checked(laws: Vec<Distribution>) -> Result<Vec<Distribution>> {
    laws.iter().try_for_each(Distribution::check)?;
    Ok(laws)
}

/// One decoding branch: its prompt, read, and the cache of what follows.
struct Branch<'a> {
    snapshot: &'a Snapshot,
    cache: Cache,
    /// Hidden states after each row's prompt.
    prompt_hidden: Tensor,
}

impl<'a> Branch<'a> {
    fn read(snapshot: &'a Snapshot, prompts: &[Vec<u32>], repeats: &[usize], n_tokens: usize) -> Result<Self> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let most = snapshot.max_positions();
        check_room(longest, n_tokens, most)?;
        // A device writes the filling of an empty run behind the row's end.
        let (cache, hidden) = snapshot.prefill(prompts, (longest + n_tokens).min(most))?;
        Ok(Self { snapshot, cache: cache.expand(repeats)?, prompt_hidden: repeat_rows(&hidden, repeats)? })
    }

    fn logits(&self, hidden: &Tensor) -> Result<Vec<Vec<f32>>> {
        self.snapshot.logit_rows(hidden)
    }

    fn extend(&mut self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let hidden = self.snapshot.extend(&mut self.cache, ids)?;
        self.logits(&hidden)
    }

    fn take_back(&mut self, n_tokens: &[usize]) -> Result<()> {
        let lengths: Vec<usize> = self.cache.lengths().iter().zip(n_tokens).map(|(have, back)| have - back).collect();
        self.cache.truncate(&lengths)
    }
}
