//! Policies: what can be sampled, replayed and differentiated.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use serde::Serialize;

use crate::{BoxError, DeviceOptimiser, Error, Gradients, Prompt, Result, Seed};

/// What a policy makes and rewards judge, and how a person looks at it.
pub trait Sample: Send + Sync {
    /// The sample as a picture for panels; `None` where it is not one.
    fn picture(&self) -> Option<&RgbImage> {
        None
    }

    /// The sample as text for tables; `None` where it is not text.
    fn text(&self) -> Option<&str> {
        None
    }

    /// How different two samples are, from 0 for equal ones to 1: the `diversity` of groups. `None` where that means
    /// nothing.
    fn difference(&self, _other: &Self) -> Option<f64>
    where
        Self: Sized,
    {
        None
    }
}

/// Rows and columns of an image that [`Sample::difference`] looks at, evenly spread.
const COMPARED_SIDE: u32 = 64;

impl Sample for RgbImage {
    fn picture(&self) -> Option<&RgbImage> {
        Some(self)
    }

    /// The mean absolute difference of colour values, over 255; images of two sizes differ wholly.
    fn difference(&self, other: &Self) -> Option<f64> {
        if self.dimensions() != other.dimensions() {
            return Some(1.0);
        }
        let every = |side: u32| side.div_ceil(COMPARED_SIDE).max(1) as usize;
        let (columns, rows) = (every(self.width()), every(self.height()));
        let (mut sum, mut n) = (0u64, 0u64);
        for (row, other) in self.rows().zip(other.rows()).step_by(rows) {
            for (pixel, other) in row.zip(other).step_by(columns) {
                sum += pixel.0.iter().zip(other.0).map(|(a, b)| u64::from(a.abs_diff(b))).sum::<u64>();
                n += 3;
            }
        }
        Some(sum as f64 / (255.0 * n.max(1) as f64))
    }
}

impl Sample for String {
    fn text(&self) -> Option<&str> {
        Some(self)
    }

    /// The share of words, as a bag, that the two do not share (one minus Dice's coefficient).
    fn difference(&self, other: &Self) -> Option<f64> {
        let mut left: BTreeMap<&str, usize> = BTreeMap::new();
        self.split_whitespace().for_each(|word| *left.entry(word).or_default() += 1);
        let (mut shared, mut n) = (0i32, left.values().sum::<usize>());
        for word in other.split_whitespace() {
            n += 1;
            if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
                *count -= 1;
                shared += 2;
            }
        }
        Some(if n == 0 { 0.0 } else { 1.0 - f64::from(shared) / n as f64 })
    }
}

/// One sample wanted: which prompt, and the node of the tree of randomness it is drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The prompt.
    pub prompt: &'a Prompt,
    /// Every choice at position `t` is drawn from `seed.fold(t)`.
    pub seed: Seed,
}

/// One sample, with what is needed to replay the choices that made it.
pub struct Completion<P: Policy + ?Sized> {
    /// What rewards judge.
    pub sample: P::Sample,
    /// What replay needs: the choices and the law they were drawn by.
    pub trace: P::Trace,
    /// Log-probability of each choice under the law that drew it, `[T]`.
    pub log_probs: Vec<f32>,
}

impl<P: Policy> Completion<P> {
    /// The same as another policy's: for a policy that wraps one.
    pub fn of<Q: Policy<Sample = P::Sample, Trace = P::Trace>>(wrapped: Completion<Q>) -> Self {
        Self { sample: wrapped.sample, trace: wrapped.trace, log_probs: wrapped.log_probs }
    }
}

/// Whether the law that draws samples is the one whose log-probabilities are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// `log_probs` replays the law of `sample`: ratios are exact.
    Exact,
    /// `log_probs` scores the conditional model while `sample` drew from another law (guidance, truncation);
    /// the difference is measured and logged.
    Conditional,
}

/// A stochastic generator whose choices can be replayed and differentiated.
///
/// Required: the two kinds, `sample`, `log_probs` and `params`. The testing kit's toy
/// ([`crate::testing::ToyPolicy`]) implements it in fifty lines.
///
/// With [`crate::RolloutConfig::parts_at_once`] above 1, `log_probs` and `backward` are called for several micro-batches
/// at a time, from several threads; each must give what it gives alone.
pub trait Policy: Sync {
    /// What rewards judge: an image, a text.
    type Sample: Sample;
    /// What replay needs: token ids and the sampling law, latents.
    type Trace: Serialize + Send + Sync;

    /// One completion per request, in order, without a gradient.
    ///
    /// Depends on the request's prompt and seed and on the weights, never on its neighbours.
    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError>;

    /// Log-probability of every choice in `batch` under the current weights: `[B, T]` and its mask, differentiable.
    fn log_probs(&self, batch: &[(&Prompt, &Self::Trace)]) -> Result<LogProbs, BoxError>;

    /// The trainable variables; none for a frozen policy.
    fn params(&self) -> Params;

    /// Adds `d loss / d params` to `gradients`, given the gradients by the log-probs and the entropies, `[B, T]`.
    ///
    /// The default uses candle's autograd on the graph of `log_probs`; a large model overrides it with its own
    /// backward, layer by layer, which finds what it needs in [`LogProbs::tape`].
    fn backward(
        &self,
        log_probs: &LogProbs,
        gradient: &LossGradient,
        gradients: &mut Gradients,
    ) -> Result<(), BoxError> {
        Ok(gradients.add_backward(&log_probs.surrogate(gradient)?, &self.params())?)
    }

    /// The optimiser's work in code of the policy's device; `None` leaves it to candle's operations.
    fn device_optimiser(&self) -> Option<Arc<dyn DeviceOptimiser>> {
        None
    }

    /// How many of these rows one pass forward and back has memory for: no micro-batch is larger. All of them where
    /// nothing is known.
    fn rows_that_fit(&self, batch: &[(&Prompt, &Self::Trace)]) -> Result<usize, BoxError> {
        Ok(batch.len())
    }

    /// How far a replayed log-prob may be from the sampled one by rounding alone: more than this, or a tenth of it in the
    /// mean over a sample, is refused before training. What computes in less than f32 says more.
    fn replay_tolerance(&self) -> f32 {
        1e-2
    }

    /// Rows and columns in which a sample's choices lie, for maps of what happens where; `None` where they are no grid.
    fn grid(&self) -> Option<(usize, usize)> {
        None
    }

    /// Whether a sample ended by itself rather than at a limit of its length; `None` where that means nothing.
    fn finished(_trace: &Self::Trace) -> Option<bool>
    where
        Self: Sized,
    {
        None
    }

    /// Whether `log_probs` replays the law of `sample`.
    fn scoring(&self) -> Scoring {
        Scoring::Exact
    }
}

/// What the loss asks of a batch of choices: its gradients by what [`Policy::log_probs`] gave.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LossGradient {
    /// `d loss / d log_probs`, `[B, T]`.
    pub log_probs: Tensor,
    /// `d loss / d entropy`, `[B, T]`; `None` without an entropy bonus.
    pub entropy: Option<Tensor>,
}

impl LossGradient {
    /// The gradient of a loss without an entropy bonus.
    pub fn new(log_probs: Tensor) -> Self {
        Self { log_probs, entropy: None }
    }

    /// Adds `d loss / d entropy`, `[B, T]`.
    #[must_use]
    pub fn with_entropy(self, entropy: Tensor) -> Self {
        Self { entropy: Some(entropy), ..self }
    }
}

/// Log-probabilities of a batch of choices and the mask of those that count.
#[derive(Clone, Debug)]
pub struct LogProbs {
    values: Tensor,
    mask: Tensor,
    entropy: Option<Tensor>,
    tape: Option<Arc<dyn Any + Send + Sync>>,
}

impl LogProbs {
    /// `values` and `mask` of one shape `[B, T]`; the mask is 1 where a choice counts and 0 where it is padding.
    pub fn new(values: Tensor, mask: Tensor) -> Result<Self> {
        let values = values.to_dtype(DType::F32)?;
        let mask = mask.to_dtype(DType::F32)?;
        if values.rank() != 2 || values.dims() != mask.dims() {
            return Err(Error::Shape {
                what: "the mask of the log-probs",
                got: mask.dims().to_vec(),
                expected: values.dims().to_vec(),
            });
        }
        Ok(Self { values, mask, entropy: None, tape: None })
    }

    /// Adds the entropy in nats of the law at each position, `[B, T]`.
    ///
    /// An entropy bonus needs it differentiable; where it has no graph, the bonus moves nothing and is refused before
    /// training.
    pub fn with_entropy(mut self, entropy: Tensor) -> Result<Self> {
        if entropy.dims() != self.values.dims() {
            return Err(Error::Shape {
                what: "the entropy of the log-probs",
                got: entropy.dims().to_vec(),
                expected: self.values.dims().to_vec(),
            });
        }
        self.entropy = Some(entropy.to_dtype(DType::F32)?);
        Ok(self)
    }

    /// Adds what the policy's own [`Policy::backward`] needs of this pass, in place of a graph.
    #[must_use]
    pub fn with_tape(self, tape: Arc<dyn Any + Send + Sync>) -> Self {
        Self { tape: Some(tape), ..self }
    }

    /// The log-probabilities, `[B, T]`, f32.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// 1 where a choice counts, `[B, T]`, f32.
    pub fn mask(&self) -> &Tensor {
        &self.mask
    }

    /// The entropy of the law at each position, `[B, T]`, where the policy gives it.
    pub fn entropy(&self) -> Option<&Tensor> {
        self.entropy.as_ref()
    }

    /// What [`LogProbs::with_tape`] added; a policy that adds one knows its type.
    pub fn tape(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.tape.as_deref()
    }

    /// The scalar on the graph of these numbers whose gradients are those of the loss that `gradient` belongs to.
    pub fn surrogate(&self, gradient: &LossGradient) -> Result<Tensor> {
        let surrogate = (&self.values * gradient.log_probs.detach())?.sum_all()?;
        match (&self.entropy, &gradient.entropy) {
            (Some(entropy), Some(gradient)) => Ok((surrogate + (entropy * gradient.detach())?.sum_all()?)?),
            _ => Ok(surrogate),
        }
    }

    /// The same numbers without a graph or a tape.
    pub fn detached(&self) -> Result<Self> {
        let entropy = self.entropy.as_ref().map(Tensor::detach);
        Ok(Self { values: self.values.detach(), mask: self.mask.detach(), entropy, tape: None })
    }

    /// The values as rows, for code that works on slices.
    pub fn rows(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.values.to_vec2()?)
    }
}

/// Named variables, always in name order.
#[derive(Clone, Debug, Default)]
pub struct Params(BTreeMap<String, Var>);

impl Params {
    /// No variables: a frozen policy.
    pub fn none() -> Self {
        Self::default()
    }

    /// Variables by name; a name given twice is an error.
    pub fn new(vars: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        let mut params = BTreeMap::new();
        for (name, var) in vars {
            if params.contains_key(&name) {
                return Err(Error::config(format!("parameter `{name}` is given twice; names must differ")));
            }
            params.insert(name, var);
        }
        Ok(Self(params))
    }

    /// Names and variables in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.0.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// The variable of this name.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.0.get(name)
    }

    /// How many variables there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many numbers the variables hold together.
    pub fn n_elements(&self) -> usize {
        self.0.values().map(|var| var.elem_count()).sum()
    }

    /// The device of the first variable; the CPU where there is none.
    pub fn device(&self) -> Device {
        self.0.values().next().map_or(Device::Cpu, |var| var.device().clone())
    }
}
