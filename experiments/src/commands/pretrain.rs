//! `grpo pretrain` and `grpo sft`: a decoder on folders of tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use grpo::{Policy, RunFolder, Seed};
use grpo_policies::cosmos::Cosmos;
use grpo_policies::decoder::Decoder;
use grpo_policies::simplear::{self, BatchPlan, CaptionedTokens, SimpleAr, TextTokenizer, shapes_cosmos};
use grpo_policies::stage::{Stage, StagePlan, peak_flops};
use grpo_policies::tokens::TokenSet;
use serde::Serialize;

use super::{ConfigArgs, DeviceArgs, tell};
use crate::config::{self, DecoderSizes, DecoderSource, PretrainFile, SftFile};
use crate::failure::{Failure, Outcome};
use crate::parts;

/// What a stage reads, and where it writes.
#[derive(Args)]
struct StageArgs {
    /// A folder of tokens, as grpo tokenize --data writes it; may be given again.
    #[arg(long = "data", value_name = "DIR", required = true)]
    data: Vec<PathBuf>,
    /// A folder of tokens to hold out; rows of --data where absent.
    #[arg(long, value_name = "DIR")]
    validation: Option<PathBuf>,
    /// Where runs go: the run's folder is DIR/{name}/{seed}, and the checkpoint its `policy`.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Go on with the run in that folder.
    #[arg(long)]
    resume: bool,
    /// Keep each layer's input and make its activations again on the way back: far less memory, the same numbers, the
    /// time of one more forward pass.
    #[arg(long)]
    recompute_layers: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Pretrain a decoder on images as tokens, from fresh weights or from a language model.
#[derive(Args)]
pub struct Pretrain {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    stage: StageArgs,
    /// The folder of the visual tokenizer that made the tokens; the embedded miniature's where absent.
    #[arg(long, value_name = "DIR")]
    cosmos: Option<PathBuf>,
    /// The Qwen2.5 folder that [decoder.language_model] starts from.
    #[arg(long, value_name = "DIR")]
    language_model: Option<PathBuf>,
    /// A tokenizer.json for [decoder.from_scratch], to which SimpleAR's seven tokens are added; one id a word of the captions
    /// where absent.
    #[arg(long, value_name = "FILE", conflicts_with = "language_model")]
    text_tokenizer: Option<PathBuf>,
}

impl Pretrain {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: PretrainFile = config::read(&self.config.config, &self.config.changes)?;
        let run = self.stage.open(&file.name, &file.data, &file.stage)?;
        let tokens = Arc::new(TokenSet::open(&self.stage.data)?);
        let device = parts::device(&self.stage.device.device)?;
        let cosmos = match &self.cosmos {
            Some(folder) => Cosmos::load(folder, &device)?,
            None => shapes_cosmos(&device)?,
        };
        let policy = match (file.decoder, &self.language_model) {
            (DecoderSource::FromScratch(sizes), None) => self.fresh(sizes, cosmos, &tokens, file.stage.seed)?,
            (DecoderSource::LanguageModel { image_positions }, Some(folder)) => {
                let policy = SimpleAr::from_language_model(folder, Arc::new(cosmos), tokens.grid())?;
                policy.with_image_positions(image_positions)
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
        let text = resolved(&file)?;
        self.stage.run(policy, tokens, Science { run, data: file.data, stage: file.stage, text })
    }

    /// A policy of fresh weights.
    fn fresh(&self, sizes: DecoderSizes, cosmos: Cosmos, tokens: &TokenSet, seed: u64) -> Outcome<SimpleAr> {
        let text = match &self.text_tokenizer {
            Some(path) => {
                let json = std::fs::read_to_string(path).map_err(|error| grpo::Error::file(path, error))?;
                TextTokenizer::extended(&json).map_err(|error| grpo::Error::file(path, error))?.0
            }
            None => TextTokenizer::of_words(
                simplear::words(tokens.caption_lines(), sizes.min_word_count)?.iter().map(String::as_str),
            )?,
        };
        let sizes = sizes.with_vocabulary(text.n_ids() as usize + cosmos.n_codes() as usize);
        let decoder = Decoder::init(sizes, Seed::new(seed).named("decoder"))?.on_device(cosmos.device())?;
        Ok(SimpleAr::new(decoder, Arc::new(cosmos), Arc::new(text), tokens.grid())?)
    }
}

/// Fine-tune a policy on images as tokens, of its own size or of another.
#[derive(Args)]
pub struct Sft {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    stage: StageArgs,
    /// The policy's folder, such as a pretraining run's `policy`; the embedded miniature after pretraining where absent.
    #[arg(long, value_name = "DIR")]
    policy: Option<PathBuf>,
}

impl Sft {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: SftFile = config::read(&self.config.config, &self.config.changes)?;
        let run = self.stage.open(&file.name, &file.data, &file.stage)?;
        let tokens = Arc::new(TokenSet::open(&self.stage.data)?);
        let device = parts::device(&self.stage.device.device)?;
        let policy = match &self.policy {
            Some(folder) => SimpleAr::load_with_grid(folder, tokens.grid(), &device)?,
            None => SimpleAr::shapes(simplear::Stage::Pretrained, &device)?.with_grid(tokens.grid())?,
        };
        let text = resolved(&file)?;
        self.stage.run(policy, tokens, Science { run, data: file.data, stage: file.stage, text })
    }
}

/// What a stage's file says beside where the policy comes from, and where the run goes.
struct Science {
    run: RunFolder,
    data: BatchPlan,
    stage: StagePlan,
    /// The whole file with every default filled in.
    text: String,
}

impl StageArgs {
    /// The run's folder, once what the file says can be meant: before anything large is read.
    fn open(&self, name: &str, data: &BatchPlan, stage: &StagePlan) -> Outcome<RunFolder> {
        data.check()?;
        stage.check()?;
        open_run(&self.out, (name, stage.seed), self.resume)
    }

    fn run(&self, policy: SimpleAr, tokens: Arc<TokenSet>, science: Science) -> Outcome<()> {
        let Science { run, data, stage, text } = science;
        let policy = policy.with_compute(self.device.compute());
        let policy = if self.recompute_layers { policy.recompute_layers() } else { policy };
        let validation = self.validation.as_ref().map(|folder| TokenSet::open(&[folder])).transpose()?;
        let n_parameters = policy.params().n_elements();
        let peak = peak_flops(&policy.params().device())?;
        let batch = data.batch;
        let seed = Seed::new(stage.seed).named("stage");
        let n_rows = tokens.len();
        let learner = CaptionedTokens::new(policy, data, (tokens, validation.map(Arc::new)), seed)?;
        let (rows, columns) = learner.policy().grid();
        tell(&format!(
            "decoder: {n_parameters} parameters, {n_rows} rows of {rows} x {columns} tokens; {} steps of {batch} rows are {:.2} \
             epochs",
            stage.n_steps,
            (stage.n_steps * batch) as f64 / learner.n_trained() as f64
        ));
        let mut stage = Stage::new(stage, learner)?.measure_against(Some(peak)).record_in(&run, &text)?;
        stage.run()?;
        finish(&run, "policy")
    }
}

/// A new folder, or that of the run which is gone on with.
pub(super) fn open_run(out: &Path, (name, seed): (&str, u64), resume: bool) -> Outcome<RunFolder> {
    Ok(match resume {
        true => RunFolder::open(out.join(name).join(seed.to_string()))?,
        false => RunFolder::create(out, name, seed)?,
    })
}

/// A file with every default filled in.
pub(super) fn resolved<T: Serialize>(file: &T) -> Outcome<String> {
    toml::to_string(file).map_err(|error| Failure::from(anyhow::Error::from(error)))
}

/// Draws the curves and says where everything is.
pub(super) fn finish(run: &RunFolder, what: &str) -> Outcome<()> {
    let shown = ["loss", "validation/nll", "validation/image_nll", "validation/psnr", "throughput/tokens_per_s"];
    let pictures = run.draw_pictures(&shown)?;
    let place = |path: &Path| path.display().to_string();
    tell(&format!("{what}  {}", place(&run.path().join("policy"))));
    for picture in pictures {
        tell(&format!("drawn  {}", place(&picture)));
    }
    tell(&format!("curves  tensorboard --logdir {}", place(run.path())));
    Ok(())
}
