//! Scores on the CPU in f32, and the way back through what their forward pass left.

use candle_core::Tensor;
use grpo::{Gradients, Result};

use super::Decoder;
use super::model::EMBEDDING;
use super::pass::{Made, Pass, Workspace};
use super::tape::{Targets, check_places};
use crate::ops::attention::Attention;
use crate::ops::head::Scored;
use crate::ops::{host, tensor};

/// What the forward pass of [`HostTape::score`] left.
pub(super) struct HostTape {
    decoder: Decoder,
    attention: Attention,
    /// Rows one behind another.
    ids: Vec<u32>,
    /// Each row's first token.
    starts: Vec<usize>,
    layers: Vec<Kept>,
    /// What the last norm read, `[tokens, H]`.
    last: Vec<f32>,
    /// The token that each target was chosen after.
    at: Vec<usize>,
    /// What the head read, `[targets, H]`.
    hidden: Tensor,
    scored: Scored,
}

/// What is kept of a layer.
struct Kept {
    /// `[tokens, H]`.
    input: Vec<f32>,
    /// `None` where it is made again.
    made: Option<Made>,
}

impl std::fmt::Debug for HostTape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTape of {} layers over {} tokens", self.layers.len(), self.ids.len())
    }
}

impl HostTape {
    /// Log-probabilities and entropies, `[N]` each, and the way back where the decoder is trained.
    pub(super) fn score(
        decoder: &Decoder,
        rows: &[impl AsRef<[u32]>],
        targets: &Targets,
    ) -> Result<(Tensor, Tensor, Self)> {
        let lengths = decoder.checked_lengths(rows)?;
        check_places(&targets.places, &lengths)?;
        let starts: Vec<usize> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end - length)
            })
            .collect();
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.as_ref()).copied().collect();
        let at: Vec<usize> = targets.places.iter().map(|(row, position)| starts[*row] + position).collect();
        let attention = decoder.attention(lengths, rows);
        let pass = Pass { decoder, attention: &attention, starts: &starts };
        let (layers, last) = forward(&pass, &ids)?;
        let hidden = tensor(pass.normed_at(&last, &at)?, (at.len(), decoder.config().hidden_size))?;
        let scored = targets.choice().scored(&hidden, decoder.head())?;
        let (log_probs, entropies) = (scored.log_probs.clone(), scored.entropies.clone());
        let tape = Self { decoder: decoder.clone(), attention, ids, starts, layers, last, at, hidden, scored };
        Ok((log_probs, entropies, tape))
    }

    /// Adds the gradient of every variable.
    pub(super) fn backward(
        &self,
        by_log_probs: &Tensor,
        by_entropies: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let decoder = &self.decoder;
        let pass = Pass { decoder, attention: &self.attention, starts: &self.starts };
        let (to_hidden, to_head) = self.scored.gradients(&self.hidden, decoder.head(), by_log_probs, by_entropies)?;
        let (mut to, norm) = pass.leave_normed_at(&self.last, &self.at, host(&to_hidden)?.values()?)?;
        gradients.add_values("model.norm.weight", norm, decoder.config().hidden_size)?;
        let (mut space, mut again, mut unread) = (Workspace::default(), Made::default(), Vec::new());
        for (index, kept) in self.layers.iter().enumerate().rev() {
            let made = match &kept.made {
                Some(made) => made,
                None => {
                    unread.resize(kept.input.len(), 0.0);
                    let layer = &decoder.layers()[index];
                    pass.read_layer((layer, &kept.input), &mut again, &mut unread, &mut space)?;
                    &again
                }
            };
            pass.leave_layer((index, &kept.input, made), &mut to, gradients, &mut space)?;
        }
        self.add_embedding(&to, to_head, gradients)
    }

    /// The gradient of the embedding is one buffer, to which a tied head adds first and then every token read.
    fn add_embedding(&self, to: &[f32], to_head: Option<Tensor>, gradients: &mut Gradients) -> Result<()> {
        let embedding = self.decoder.embedding();
        let tied = self.decoder.config().tie_word_embeddings;
        if let (false, Some(to_head)) = (tied, &to_head) {
            gradients.add("lm_head.weight", to_head)?;
        }
        let mut sum = match to_head.filter(|_| tied) {
            Some(to_head) => host(&to_head)?.values()?.to_vec(),
            None => vec![0.0; embedding.elem_count()],
        };
        Pass::add_embedded(to, &self.ids, &mut sum);
        gradients.add_values(EMBEDDING, sum, embedding.shape())
    }
}

/// What each layer read and, where it is kept, made; and what the last one gave. Nothing is kept of a decoder that is not
/// trained.
fn forward(pass: &Pass<'_>, ids: &[u32]) -> Result<(Vec<Kept>, Vec<f32>)> {
    let decoder = pass.decoder;
    let hidden = decoder.config().hidden_size;
    let embedding = host(decoder.embedding())?;
    let embedding = embedding.values()?;
    let mut x: Vec<f32> = Vec::with_capacity(ids.len() * hidden);
    ids.iter().for_each(|id| x.extend_from_slice(&embedding[*id as usize * hidden..][..hidden]));
    let trained = !decoder.params.is_empty();
    let keeps_all = trained && !decoder.recomputes_layers();
    let (mut layers, mut space, mut made) = (Vec::new(), Workspace::default(), Made::default());
    let mut out = vec![0.0; x.len()];
    for layer in decoder.layers() {
        pass.read_layer((layer, &x), &mut made, &mut out, &mut space)?;
        std::mem::swap(&mut x, &mut out);
        if trained {
            let made = keeps_all.then(|| std::mem::take(&mut made));
            let input = std::mem::replace(&mut out, vec![0.0; x.len()]);
            layers.push(Kept { input, made });
        }
    }
    Ok((layers, x))
}
