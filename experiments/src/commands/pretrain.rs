//! `grpo pretrain` and `grpo sft`: the miniature's checkpoints, from nothing, on a CPU.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use grpo::Seed;
use grpo_policies::cosmos::{self, Cosmos, TrainPlan};
use grpo_policies::decoder::Decoder;
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::{Grid, SimpleAr, StagePlan, TextTokenizer, TrainingImage, train_stage};
use grpo_rewards::shapes::{self, DEFAULT_SIDE};

use super::{ConfigArgs, DeviceArgs, PolicyArgs, progress, tell};
use crate::config::{self, DecoderSizes, DecoderSource, PretrainFile, SftFile, StageFile};
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Train the visual tokenizer and the decoder on free scenes, from nothing.
#[derive(Args)]
pub struct Pretrain {
    #[command(flatten)]
    config: ConfigArgs,
    /// Where the checkpoint goes.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Take the visual tokenizer of this folder instead of training one, such as OUT/cosmos of a run broken off.
    #[arg(long, value_name = "DIR")]
    cosmos: Option<PathBuf>,
    /// The Qwen2.5 folder that `[decoder.language_model]` starts from.
    #[arg(long, value_name = "DIR")]
    language_model: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Pretrain {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: PretrainFile = config::read(&self.config.config, &self.config.changes)?;
        let device = parts::device(&self.device.device)?;
        let seed = Seed::new(file.seed);
        let cosmos = match &self.cosmos {
            Some(folder) => Cosmos::load(folder, &device)?,
            None => {
                let cosmos = train_cosmos(&file, &device)?;
                // Kept before the longer half begins: a run that is broken off there goes on with --cosmos.
                cosmos.save(self.out.join("cosmos"), Precision::Bf16)?;
                cosmos
            }
        };
        let side = DEFAULT_SIDE as usize;
        let grid = cosmos.grid(side, side)?;
        let mut policy = match (file.decoder, &self.language_model) {
            (DecoderSource::FromScratch(sizes), None) => from_scratch(sizes, cosmos, grid, seed)?,
            (DecoderSource::LanguageModel { image_positions }, Some(folder)) => {
                SimpleAr::from_language_model(folder, Arc::new(cosmos), grid)?.with_image_positions(image_positions)
            }
            (DecoderSource::FromScratch(_), Some(_)) => {
                return Err(Failure::user(
                    "--language-model: the configuration says [decoder.from_scratch]; change one",
                ));
            }
            (DecoderSource::LanguageModel { .. }, None) => {
                return Err(Failure::user("[decoder.language_model] needs --language-model DIR, a Qwen2.5 folder"));
            }
        };
        policy = policy.with_compute(self.device.compute());
        stage(&mut policy, &file.stage, seed.named("pretrain"), Scenes::Free, &self.out)
    }
}

/// A policy of fresh weights that reads the words of the Shapes world.
fn from_scratch(sizes: DecoderSizes, cosmos: Cosmos, grid: Grid, seed: Seed) -> Outcome<SimpleAr> {
    let text = TextTokenizer::of_words(shapes::vocabulary())?;
    let sizes = sizes.with_vocabulary(text.n_ids() as usize + cosmos.n_codes() as usize);
    let decoder = Decoder::init(sizes, seed.named("decoder"))?.on_device(cosmos.device())?;
    Ok(SimpleAr::new(decoder, Arc::new(cosmos), Arc::new(text), grid)?)
}

/// Fine-tune a policy on the six tasks' prompts.
#[derive(Args)]
pub struct Sft {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Where the checkpoint goes.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Sft {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: SftFile = config::read(&self.config.config, &self.config.changes)?;
        let mut policy = self.policy.load(file.policy)?;
        stage(&mut policy, &file.stage, Seed::new(file.seed).named("sft"), Scenes::Tasks, &self.out)
    }
}

/// What a stage sees. Neither ever says a held-out combination.
#[derive(Clone, Copy)]
enum Scenes {
    /// Anything the world can draw, told at length or in short: pretraining.
    Free,
    /// Scenes of the six tasks under their prompts: fine-tuning.
    Tasks,
}

impl Scenes {
    fn draw(self, seed: Seed, long_captions: f64) -> TrainingImage {
        let mut example = shapes::training_example(seed);
        if matches!(self, Self::Tasks) {
            // Free scenes are a fixed share of the examples: a few further draws find one of a task.
            let tries = (1..64).map(|attempt| shapes::training_example(seed.named("task").fold(attempt)));
            example = std::iter::once(example.clone()).chain(tries).find(|e| e.metadata.is_some()).unwrap_or(example);
        }
        let long = seed.named("caption").uniform() < long_captions;
        let captions = example.captions;
        let caption = if long { captions.long } else { captions.short };
        TrainingImage { caption, image: shapes::render(&example.scene, DEFAULT_SIDE) }
    }
}

fn train_cosmos(file: &PretrainFile, device: &candle_core::Device) -> Outcome<Cosmos> {
    let seed = Seed::new(file.seed).named("cosmos");
    let mut cosmos = Cosmos::init(file.cosmos.clone(), seed, device)?;
    let plan = TrainPlan { n_steps: file.tokenizer.n_steps, optim: file.tokenizer.optim };
    tell(&format!("visual tokenizer: {} parameters, {} steps", cosmos.params().n_elements(), plan.n_steps));
    let mut curve = Curve::new(plan.n_steps);
    let batch = |step: usize| {
        let image = |row: usize| {
            let seed = seed.fold(step as u64).fold(row as u64);
            shapes::render(&shapes::training_example(seed).scene, DEFAULT_SIDE)
        };
        Ok((0..file.tokenizer.batch).map(image).collect())
    };
    cosmos::train(&mut cosmos, &plan, batch, |step| {
        curve.add(step.step, step.loss);
        Ok(())
    })?;
    curve.bar.finish();
    Ok(cosmos)
}

/// Trains and saves; what is there when a run is broken off is a checkpoint like any other, without AdamW's moments.
fn stage(policy: &mut SimpleAr, file: &StageFile, seed: Seed, scenes: Scenes, out: &Path) -> Outcome<()> {
    if file.n_steps == 0 || file.batch == 0 {
        return Err(Failure::user("stage.n_steps or stage.batch is 0; give at least 1"));
    }
    let plan = StagePlan { n_steps: file.n_steps, optim: file.optim, caption_dropout: file.caption_dropout, seed };
    let n_params = grpo::Policy::params(policy).n_elements();
    tell(&format!("decoder: {n_params} parameters, {} steps of {} images", plan.n_steps, file.batch));
    let mut curve = Curve::new(plan.n_steps);
    let batch = |step: usize| {
        let seed = seed.named("data").fold(step as u64);
        Ok((0..file.batch).map(|row| scenes.draw(seed.fold(row as u64), file.long_captions)).collect())
    };
    train_stage(policy, &plan, batch, |policy, step| {
        curve.add(step.step, step.loss);
        let n_done = step.step + 1;
        let due = n_done == plan.n_steps || n_done.is_multiple_of(file.save_every);
        if due { policy.save(out, Precision::Bf16) } else { Ok(()) }
    })?;
    curve.bar.finish();
    tell(&format!("policy  {}", out.display()));
    Ok(())
}

/// The loss on the bar, and a line every twentieth of the stage where there is no bar: the mean since the last line, for
/// the loss of one batch says little.
struct Curve {
    bar: indicatif::ProgressBar,
    n_steps: usize,
    sum: f64,
    steps: usize,
}

impl Curve {
    fn new(n_steps: usize) -> Self {
        Self { bar: progress(n_steps), n_steps, sum: 0.0, steps: 0 }
    }

    fn add(&mut self, step: usize, loss: f64) {
        self.sum += loss;
        self.steps += 1;
        let mean = self.sum / self.steps as f64;
        self.bar.inc(1);
        self.bar.set_message(format!("loss {mean:.4}"));
        if (step + 1).is_multiple_of((self.n_steps / 20).max(1)) || step == 0 {
            if self.bar.is_hidden() {
                tell(&format!("step {:>6}/{}  loss {mean:.4}", step + 1, self.n_steps));
            }
            (self.sum, self.steps) = (0.0, 0);
        }
    }
}
