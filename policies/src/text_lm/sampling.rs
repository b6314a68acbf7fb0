//! Drawing completions: each prompt read once, all rows decoded together, each until it ends.

use grpo::{Error, Request, Result, Seed};
use rayon::prelude::*;

use super::TextLm;
use crate::decoder::{Cache, DecodeBuffers, Snapshot, repeat_rows};
use crate::sampling::{Distribution, Shaping};

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
        let open = Open::read(&snapshot, &prompts, &repeats, self.room(&prompts)?)?;
        let rows = prompts.iter().zip(&repeats).flat_map(|(prompt, times)| std::iter::repeat_n(prompt, *times));
        let n = self.law.max_new_tokens;
        let mut drawn: Vec<Drawn> = rows
            .map(|prompt| Drawn {
                prompt: prompt.clone(),
                ids: Vec::with_capacity(n),
                log_probs: Vec::with_capacity(n),
            })
            .collect();
        let seeds: Vec<Seed> = requests.iter().map(|request| request.seed).collect();
        // A thread of the pool drives the loop: see SimpleAR's.
        rayon::scope(|_| self.complete(open, &seeds, &mut drawn))?;
        Ok(drawn)
    }

    /// Draws token by token; from the second step on nothing is allocated.
    fn complete(&self, mut open: Open<'_>, seeds: &[Seed], drawn: &mut [Drawn]) -> Result<()> {
        let shaping = self.law.shaping();
        for position in 0..self.law.max_new_tokens {
            open.choose(&shaping, |row| seeds[row].fold(position as u64))?;
            for row in &open.rows {
                drawn[row.index].ids.push(row.last[0]);
                drawn[row.index].log_probs.push(row.log_prob);
            }
            if position + 1 == self.law.max_new_tokens || !open.advance(&self.ends)? {
                break;
            }
        }
        Ok(())
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

/// The rows that have not ended, their caches, and the logits behind their last tokens.
struct Open<'a> {
    snapshot: &'a Snapshot,
    rows: Vec<Row>,
    cache: Cache,
    buffers: DecodeBuffers,
}

/// A row that has not ended.
#[derive(Default)]
struct Row {
    /// Its request's.
    index: usize,
    law: Distribution,
    /// The last token drawn, a run of one.
    last: [u32; 1],
    log_prob: f32,
}

impl AsRef<[u32]> for Row {
    fn as_ref(&self) -> &[u32] {
        &self.last
    }
}

impl<'a> Open<'a> {
    fn read(snapshot: &'a Snapshot, prompts: &[Vec<u32>], repeats: &[usize], room: usize) -> Result<Self> {
        let (cache, hidden) = snapshot.prefill(prompts, room)?;
        let rows = (0..repeats.iter().sum()).map(|index| Row { index, ..Row::default() }).collect();
        let mut buffers = DecodeBuffers::default();
        snapshot.logits_in(&repeat_rows(&hidden, repeats)?, &mut buffers)?;
        Ok(Self { snapshot, rows, cache: cache.expand(repeats)?, buffers })
    }

    /// Draws every row's next token.
    fn choose(&mut self, shaping: &Shaping, seed_of: impl Fn(usize) -> Seed + Sync) -> Result<()> {
        let logits = self.buffers.logits().par_chunks(self.snapshot.slice().len());
        self.rows.par_iter_mut().zip(logits).try_for_each(|(row, logits)| {
            row.law.shape(logits, shaping);
            row.law.check()?;
            let choice = row.law.draw(seed_of(row.index).uniform());
            (row.last, row.log_prob) = ([choice as u32], row.law.log_prob(choice));
            Ok(())
        })
    }

    /// Drops the rows that have ended and reads the last token of the others; whether there are others.
    fn advance(&mut self, ends: &[u32]) -> Result<bool> {
        let goes_on = |row: &Row| !ends.contains(&row.last[0]);
        if !self.rows.iter().any(goes_on) {
            return Ok(false);
        }
        if !self.rows.iter().all(goes_on) {
            self.cache.retain(|row| goes_on(&self.rows[row]))?;
            self.rows.retain(goes_on);
        }
        self.snapshot.extend_logits(&mut self.cache, &self.rows, &mut self.buffers)?;
        Ok(true)
    }
}
