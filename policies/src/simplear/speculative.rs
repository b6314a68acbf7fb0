//! Speculative Jacobi decoding: several tokens a pass, of the law that draws them one by one.
//!
//! Each row keeps drafts of the tokens that follow. One pass of the decoder gives the law `p` of every draft's place,
//! given the drafts before it; a draft `x` that was drawn from `q` is kept with probability `min(1, p(x) / q(x))` and
//! else replaced by a draw from the normalised `max(0, p - q)`, so that what stands there follows `p` (Leviathan et al.,
//! 2023, arXiv 2211.17192). Up to the first replacement, `p` is the law itself and the tokens are final. From Teng et
//! al., 2024, arXiv 2410.01699, with these differences:
//! 1. Drafts behind the first replacement pass the same test instead of being drawn afresh (maximal coupling, as in
//!    arXiv 2510.24211): most survive, so later drafts keep their context. A draft's law depends on the tokens before it
//!    alone, and given all of those, in every pass, the draft follows that law; so the first place that is decided
//!    later still gets a draw from `q` that is independent of `p`, which is all that the test needs.
//! 2. The replacement is final in the same pass, and where every draft is kept the pass gives one token more.
//! 3. A new draft is drawn from the law behind the last one, a neighbour's, and not from noise or a constant.
//! 4. Keys and values are cached and those of refused drafts forgotten; rows of a batch advance each at their own pace;
//!    under guidance both branches read the drafts.

use std::sync::Arc;

use grpo::{Result, Seed};
use rayon::prelude::*;

use super::sampling::{Branches, Sequence};
use crate::sampling::Distribution;

/// A guess at a token that is not yet due, and the law it was drawn from.
struct Draft {
    choice: usize,
    law: Arc<Distribution>,
}

struct Row {
    seed: Seed,
    sequence: Sequence,
    drafts: Vec<Draft>,
    /// What the next pass reads: the last final token, then the drafts; nothing at the end.
    run: Vec<u32>,
}

/// Draws `n_tokens` for each seed, deciding up to `window` places in a pass.
pub(super) fn speculate(
    mut branches: Branches<'_>,
    seeds: &[Seed],
    (n_tokens, window): (usize, usize),
) -> Result<Vec<Sequence>> {
    let row =
        |seed: &Seed| Row { seed: *seed, sequence: Sequence::with_room(n_tokens), drafts: Vec::new(), run: Vec::new() };
    let mut rows: Vec<Row> = seeds.iter().map(row).collect();
    loop {
        let mut laws_left = branches.laws()?.into_iter().map(Arc::new);
        // The first pass read prompts and judges no draft; a row that is done reads nothing and gets no law.
        let of_rows: Vec<Vec<Arc<Distribution>>> =
            rows.iter().map(|row| laws_left.by_ref().take(row.n_laws(n_tokens)).collect()).collect();
        let refused: Vec<usize> = rows
            .par_iter_mut()
            .zip(of_rows)
            .map(|(row, laws)| if laws.is_empty() { 0 } else { row.settle(&laws, (n_tokens, window)) })
            .collect();
        branches.take_back(&refused)?;
        if rows.iter().all(|row| row.run.is_empty()) {
            return Ok(rows.into_iter().map(|row| row.sequence).collect());
        }
        branches.extend(rows.iter().map(|row| row.run.as_slice()))?;
    }
}

impl Row {
    /// How many laws the last pass gave for it: one per draft, and one behind them.
    fn n_laws(&self, n_tokens: usize) -> usize {
        if self.sequence.choices.len() == n_tokens { 0 } else { self.drafts.len() + 1 }
    }

    /// Decides places by the laws of a pass and drafts the next ones; how many of the tokens read were refused.
    fn settle(&mut self, laws: &[Arc<Distribution>], (n_tokens, window): (usize, usize)) -> usize {
        let (first, n_drafts) = (self.sequence.choices.len(), self.drafts.len());
        self.sequence.n_passes += 1;
        let pass = self.sequence.n_passes as u64;
        let seed_at = |place: usize| self.seed.fold(place as u64).fold(pass);
        let mut final_so_far = true;
        let mut next = Vec::with_capacity(window);
        for (index, (draft, law)) in self.drafts.drain(..).zip(laws).enumerate() {
            let choice = couple(&draft, law, seed_at(first + index));
            if final_so_far {
                self.sequence.push(choice, law);
                final_so_far = choice == draft.choice;
            } else {
                next.push(Draft { choice, law: law.clone() });
            }
        }
        let Some(behind) = laws.last() else { return 0 };
        if final_so_far {
            self.sequence.push(behind.draw(seed_at(first + n_drafts).uniform()), behind);
        }
        let n_final = self.sequence.choices.len();
        // The last token is chosen and never read.
        let wanted = (window - 1).min((n_tokens - n_final).saturating_sub(1));
        for place in n_final + next.len()..n_final + wanted {
            next.push(Draft { choice: behind.draw(seed_at(place).named("draft").uniform()), law: behind.clone() });
        }
        self.drafts = next;
        self.run.clear();
        if n_final < n_tokens {
            self.run.extend(self.sequence.choices.last());
            self.run.extend(self.drafts.iter().map(|draft| draft.choice as u32));
        }
        first + n_drafts + 1 - n_final
    }
}

/// A choice that follows `law` and is the draft's wherever that can be.
fn couple(draft: &Draft, law: &Distribution, seed: Seed) -> usize {
    let kept = seed.named("keep").uniform() * draft.law.probability(draft.choice) < law.probability(draft.choice);
    if kept { draft.choice } else { law.draw_excess(&draft.law, seed.named("replace").uniform()) }
}
