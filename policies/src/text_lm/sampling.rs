//! Drawing completions: each prompt read once, all rows decoded together, each until it ends.

use candle_core::Tensor;
use grpo::{Error, Request, Result};
use rayon::prelude::*;

use super::TextLm;
use crate::decoder::{Cache, Snapshot, repeat_rows};
use crate::sampling::Distribution;

/// What was drawn for a request.
pub(super) struct Drawn {
    pub(super) prompt: Vec<u32>,
    pub(super) ids: Vec<u32>,
    pub(super) log_probs: Vec<f32>,
}

impl TextLm {
    /// A completion of every request, in order.
    pub(super) fn draw(&self, requests: &[Request<'_>]) -> Result<Vec<Drawn>> {
        let (prompts, repeats) = self.distinct_prompts(requests)?;
        let snapshot = self.decoder.snapshot(0..self.decoder.config().vocab_size)?;
        let mut open = Open::read(&snapshot, &prompts, &repeats, self.room(&prompts)?)?;
        let rows = prompts.iter().zip(&repeats).flat_map(|(prompt, times)| std::iter::repeat_n(prompt, *times));
        let mut drawn: Vec<Drawn> =
            rows.map(|prompt| Drawn { prompt: prompt.clone(), ids: Vec::new(), log_probs: Vec::new() }).collect();
        for position in 0..self.law.max_new_tokens {
            for (row, id, log_prob) in self.choose(&open, requests, position)? {
                drawn[row].ids.push(id);
                drawn[row].log_probs.push(log_prob);
            }
            if position + 1 == self.law.max_new_tokens || !open.advance(&drawn, &self.ends)? {
                break;
            }
        }
        Ok(drawn)
    }

    /// The choice of every open row at a position: row, id and its log-probability.
    fn choose(&self, open: &Open<'_>, requests: &[Request<'_>], position: usize) -> Result<Vec<(usize, u32, f32)>> {
        let shaping = self.law.shaping();
        let choose = |(logits, row): (Vec<f32>, &usize)| {
            let law = Distribution::new(logits, &shaping);
            law.check()?;
            let choice = law.draw(requests[*row].seed.fold(position as u64).uniform());
            Ok((*row, choice as u32, law.log_prob(choice)))
        };
        open.logits()?.into_par_iter().zip(&open.rows).map(choose).collect()
    }

    /// Each run of requests for one prompt is read once; how often it is repeated.
    fn distinct_prompts(&self, requests: &[Request<'_>]) -> Result<(Vec<Vec<u32>>, Vec<usize>)> {
        let (mut prompts, mut repeats): (Vec<Vec<u32>>, Vec<usize>) = (Vec::new(), Vec::new());
        for run in requests.chunk_by(|a, b| a.prompt.text == b.prompt.text) {
            prompts.push(self.prompt_ids(&run[0].prompt.text)?);
            repeats.push(run.len());
        }
        Ok((prompts, repeats))
    }

    /// How many tokens a row needs room for; the last one is chosen and never read.
    fn room(&self, prompts: &[Vec<u32>]) -> Result<usize> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (new, most) = (self.law.max_new_tokens, self.decoder.config().max_position_embeddings);
        match longest.checked_add(new - 1).filter(|room| *room <= most) {
            Some(room) => Ok(room),
            None => Err(Error::config(format!(
                "a prompt of {longest} tokens and max_new_tokens {new} do not fit the decoder's {most} positions; \
                 shorten the prompt or take max_new_tokens lower"
            ))),
        }
    }
}

/// The rows that have not ended: their numbers, their caches, and the hidden states after their last tokens.
struct Open<'a> {
    snapshot: &'a Snapshot,
    rows: Vec<usize>,
    cache: Cache,
    hidden: Tensor,
}

impl<'a> Open<'a> {
    fn read(snapshot: &'a Snapshot, prompts: &[Vec<u32>], repeats: &[usize], room: usize) -> Result<Self> {
        let (cache, hidden) = snapshot.prefill(prompts, room)?;
        let rows = (0..repeats.iter().sum()).collect();
        Ok(Self { snapshot, rows, cache: cache.expand(repeats)?, hidden: repeat_rows(&hidden, repeats)? })
    }

    fn logits(&self) -> Result<Vec<Vec<f32>>> {
        self.snapshot.logit_rows(&self.hidden)
    }

    /// Drops the rows that have ended and reads the last token of the others; whether there are others.
    fn advance(&mut self, drawn: &[Drawn], ends: &[u32]) -> Result<bool> {
        let last = |row: &usize| drawn[*row].ids.last().copied().filter(|id| !ends.contains(id));
        let (keep, ids): (Vec<usize>, Vec<Option<u32>>) =
            self.rows.iter().map(last).map(|id| (usize::from(id.is_some()), id)).unzip();
        let ids: Vec<u32> = ids.into_iter().flatten().collect();
        if ids.is_empty() {
            return Ok(false);
        }
        if ids.len() < self.rows.len() {
            self.cache = self.cache.expand(&keep)?;
            let mut kept = keep.iter();
            self.rows.retain(|_| kept.next() == Some(&1));
        }
        self.hidden = self.snapshot.decode_step(&mut self.cache, &ids)?;
        Ok(true)
    }
}
