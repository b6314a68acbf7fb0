//! `grpo pretrain` and `grpo sft`: the miniature's checkpoints, from nothing, on a CPU.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use grpo::Seed;
use grpo_policies::cosmos::{self, Cosmos, TrainPlan};
use grpo_policies::decoder::Decoder;
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::{SimpleAr, StagePlan, TextTokenizer, TrainingImage, train_stage};
use grpo_rewards::shapes::{self, DEFAULT_SIDE};

use super::{ConfigArgs, PolicyArgs, progress, tell};
use crate::config::{self, PretrainFile, SftFile, StageFile};
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
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl Pretrain {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: PretrainFile = config::read(&self.config.config, &self.config.changes)?;
        let device = parts::device(&self.device)?;
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
        let text = TextTokenizer::of_words(shapes::vocabulary())?;
        let sizes = file.decoder.with_vocabulary(text.n_ids() as usize + cosmos.n_codes() as usize);
        let decoder = Decoder::init(sizes, seed.named("decoder"))?;
        let decoder =
            Decoder::from_tensors(decoder.config().clone(), parts::on_device(decoder.tensors(), &device)?, true)?;
        let mut policy = SimpleAr::new(decoder, Arc::new(cosmos), Arc::new(text), grid)?;
        stage(&mut policy, &file.stage, seed.named("pretrain"), Scenes::Free)?;
        policy.save(&self.out, Precision::Bf16)?;
        tell(&format!("policy  {}", self.out.display()));
        Ok(())
    }
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
        let device = parts::device(&self.policy.device)?;
        let mut policy = parts::policy(file.policy, self.policy.policy.as_deref(), &device)?;
        stage(&mut policy, &file.stage, Seed::new(file.seed).named("sft"), Scenes::Tasks)?;
        policy.save(&self.out, Precision::Bf16)?;
        tell(&format!("policy  {}", self.out.display()));
        Ok(())
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
    let bar = progress(plan.n_steps);
    let batch = |step: usize| {
        let image = |row: usize| {
            let seed = seed.fold(step as u64).fold(row as u64);
            shapes::render(&shapes::training_example(seed).scene, DEFAULT_SIDE)
        };
        Ok((0..file.tokenizer.batch).map(image).collect())
    };
    cosmos::train(&mut cosmos, &plan, batch, |step| {
        bar.inc(1);
        report(step.step, plan.n_steps, step.loss, &bar);
        Ok(())
    })?;
    bar.finish();
    Ok(cosmos)
}

fn stage(policy: &mut SimpleAr, file: &StageFile, seed: Seed, scenes: Scenes) -> Outcome<()> {
    if file.n_steps == 0 || file.batch == 0 {
        return Err(Failure::user("stage.n_steps or stage.batch is 0; give at least 1"));
    }
    let plan = StagePlan { n_steps: file.n_steps, optim: file.optim, caption_dropout: file.caption_dropout, seed };
    let n_params = grpo::Policy::params(policy).n_elements();
    tell(&format!("decoder: {n_params} parameters, {} steps of {} images", plan.n_steps, file.batch));
    let bar = progress(plan.n_steps);
    let batch = |step: usize| {
        let seed = seed.named("data").fold(step as u64);
        Ok((0..file.batch).map(|row| scenes.draw(seed.fold(row as u64), file.long_captions)).collect())
    };
    train_stage(policy, &plan, batch, |_, step| {
        bar.inc(1);
        report(step.step, plan.n_steps, step.loss, &bar);
        Ok(())
    })?;
    bar.finish();
    Ok(())
}

/// The loss on the bar, and a line every twentieth of the stage where there is no bar.
fn report(step: usize, n_steps: usize, loss: f64, bar: &indicatif::ProgressBar) {
    bar.set_message(format!("loss {loss:.4}"));
    if bar.is_hidden() && ((step + 1).is_multiple_of((n_steps / 20).max(1)) || step == 0) {
        tell(&format!("step {:>6}/{n_steps}  loss {loss:.4}", step + 1));
    }
}
