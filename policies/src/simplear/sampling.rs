//! Drawing the ids of images: prompts read once, branches of guidance side by side, token by token.

use std::ops::Range;

use candle_core::{Device, Tensor};
use grpo::{Request, Result};
use rayon::prelude::*;

use super::{Law, SimpleAr, Vocabulary};
use crate::decoder::{Cache, Snapshot, repeat_rows};
use crate::sampling::{Distribution, guided};

/// An id that was drawn, and its log-probability under the law.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Draw {
    pub(super) id: u32,
    pub(super) log_prob: f32,
}

impl SimpleAr {
    /// The ids that compete for a place in the image.
    pub(super) fn choices(&self, vocabulary: Vocabulary) -> Range<usize> {
        match vocabulary {
            Vocabulary::Visual => self.visual_ids(),
            Vocabulary::Full => 0..self.decoder.config().vocab_size,
        }
    }

    /// Ids and log-probs of every request, in order.
    pub(super) fn draw_ids(&self, requests: &[Request<'_>]) -> Result<Vec<Vec<Draw>>> {
        let choices = self.choices(self.law.vocabulary);
        let snapshot = self.decoder.snapshot(choices.clone())?;
        let mut branches = Branches::read(self, &snapshot, requests, self.n_tokens())?;
        let mut drawn: Vec<Vec<Draw>> = vec![Vec::with_capacity(self.n_tokens()); requests.len()];
        for position in 0..self.n_tokens() {
            let laws = branches.laws()?;
            drawn.par_iter_mut().zip(&laws).zip(requests).for_each(|((drawn, law), request)| {
                let choice = law.draw(request.seed.fold(position as u64).uniform());
                drawn.push(Draw { id: (choices.start + choice) as u32, log_prob: law.log_prob(choice) });
            });
            if position + 1 < self.n_tokens() {
                let ids: Vec<u32> = drawn.iter().filter_map(|row| row.last()).map(|draw| draw.id).collect();
                branches.advance(&ids)?;
            }
        }
        Ok(drawn)
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
    conditional: Branch<'a>,
    unconditional: Option<Branch<'a>>,
}

impl<'a> Branches<'a> {
    /// Reads the prompts of all requests, with room for `n_tokens` more in each row.
    pub(super) fn read(
        policy: &'a SimpleAr,
        snapshot: &'a Snapshot,
        requests: &[Request<'_>],
        n_tokens: usize,
    ) -> Result<Self> {
        let (prompts, repeats) = policy.distinct_prompts(requests)?;
        let conditional = Branch::read(snapshot, &prompts, &repeats, n_tokens)?;
        let unconditional = match policy.law.guidance == 1.0 {
            true => None,
            false => Some(Branch::read(snapshot, &[policy.negative_ids()?], &[requests.len()], n_tokens)?),
        };
        Ok(Self { law: &policy.law, conditional, unconditional })
    }

    /// The law of each row's next token.
    pub(super) fn laws(&self) -> Result<Vec<Distribution>> {
        let c = self.conditional.logits()?;
        let shaping = self.law.shaping();
        let Some(unconditional) = &self.unconditional else {
            return Ok(c.into_par_iter().map(|c| Distribution::new(c, &shaping)).collect());
        };
        let u = unconditional.logits()?;
        let law = |(c, u): (&Vec<f32>, &Vec<f32>)| Distribution::new(guided(c, u, self.law.guidance), &shaping);
        Ok(c.par_iter().zip(&u).map(law).collect())
    }

    /// Reads one more token in each row.
    pub(super) fn advance(&mut self, ids: &[u32]) -> Result<()> {
        self.conditional.advance(ids)?;
        self.unconditional.as_mut().map_or(Ok(()), |branch| branch.advance(ids))
    }
}

/// One decoding branch: a cache and the hidden states after its last token.
struct Branch<'a> {
    snapshot: &'a Snapshot,
    cache: Cache,
    hidden: Tensor,
}

impl<'a> Branch<'a> {
    fn read(snapshot: &'a Snapshot, prompts: &[Vec<u32>], repeats: &[usize], n_tokens: usize) -> Result<Self> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (cache, hidden) = snapshot.prefill(prompts, longest + n_tokens)?;
        Ok(Self { snapshot, cache: cache.expand(repeats)?, hidden: repeat_rows(&hidden, repeats)? })
    }

    fn logits(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.snapshot.logits(&self.hidden)?.to_device(&Device::Cpu)?.to_vec2()?)
    }

    fn advance(&mut self, ids: &[u32]) -> Result<()> {
        self.hidden = self.snapshot.decode_step(&mut self.cache, ids)?;
        Ok(())
    }
}
