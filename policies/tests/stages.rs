//! Supervised stages: resumed to the bit, accumulated in parts, averaged, and what they refuse.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use grpo::observe::Metrics;
use grpo::{Error, Gradients, OptimConfig, Params, Result, RunFolder, Seed};
use grpo_policies::corpus::{Caption, Content, Corpus, Entries, Entry};
use grpo_policies::cosmos::{Cosmos, CosmosConfig, Reconstruction, ReconstructionPlan};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::simplear::{
    BatchPlan, CaptionChoice, CaptionedTokens, LossOver, RowConfig, SimpleAr, TextTokenizer, shapes_cosmos, words,
};
use grpo_policies::stage::{Learned, Learner, Stage, StageLog, StagePlan};
use grpo_policies::tokens::{Settings, TokenSet, Workers, tokenise};
use image::RgbImage;

/// Twenty-four pictures of one colour each, which their captions name by number.
struct Colours(u32);

impl Corpus for Colours {
    fn identity(&self) -> String {
        "colours".into()
    }

    fn n_entries(&self) -> Option<u64> {
        Some(24)
    }

    fn entries(&self, first: u64) -> Result<Entries<'_>> {
        let entry = |at: u64| {
            let colour = image::Rgb([(at * 10) as u8, 255 - (at * 9) as u8, (at * 77 % 256) as u8]);
            let lines = vec![format!("colour {at}"), format!("a picture of nothing but the colour {at}")];
            let content = Content::Picture(RgbImage::from_pixel(self.0, self.0, colour));
            Ok(Ok(Entry { name: format!("{at}"), content, caption: Caption { lines } }))
        };
        Ok(Box::new((first..24).map(entry)))
    }
}

fn cosmos() -> Cosmos {
    shapes_cosmos(&Device::Cpu).unwrap()
}

fn tokens(folder: &Path, side: u32) -> Arc<TokenSet> {
    let settings: Settings = toml::from_str(&format!("height = {side}\nwidth = {side}\nrows_per_shard = 10")).unwrap();
    tokenise((&Colours(side), &settings), &cosmos(), folder, Workers { n: 2, batch: 8 }, |_| {}).unwrap();
    Arc::new(TokenSet::open(&[folder]).unwrap())
}

fn policy(tokens: &TokenSet) -> SimpleAr {
    let text = TextTokenizer::of_words(words(tokens.caption_lines(), 1).unwrap().iter().map(String::as_str)).unwrap();
    let config = DecoderConfig {
        vocab_size: text.n_ids() as usize + 1600,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 300,
        ..DecoderConfig::default()
    };
    let decoder = Decoder::init(config, Seed::new(1)).unwrap();
    SimpleAr::new(decoder, Arc::new(cosmos()), Arc::new(text), tokens.grid()).unwrap()
}

fn batch(change: impl FnOnce(&mut BatchPlan)) -> BatchPlan {
    let mut plan: BatchPlan = toml::from_str("batch = 6\nvalidation_rows = 4\npictures = 2").unwrap();
    plan.rows_per_backward = 3;
    change(&mut plan);
    plan
}

fn plan(n_steps: usize, ema: Option<f64>) -> StagePlan {
    let optim = OptimConfig { lr: 3e-3, weight_decay: 0.01, ..OptimConfig::default() };
    let log = StageLog { checkpoint_every: 2, validate_every: 4, pictures_every: 4, keep_checkpoints: 3 };
    StagePlan { seed: 3, n_steps, optim, ema, max_skips_in_row: 3, log }
}

fn learner(tokens: &Arc<TokenSet>, plan: BatchPlan) -> CaptionedTokens {
    CaptionedTokens::new(policy(tokens), plan, (tokens.clone(), None), Seed::new(9)).unwrap()
}

/// A learner whose steps go through a function.
struct Altered<L, F>(L, F);

impl<L: Learner, F: FnMut(&mut L, usize, &mut Gradients) -> Result<Learned>> Learner for Altered<L, F> {
    fn params(&self) -> Params {
        self.0.params()
    }
    fn learn(&mut self, step: usize, gradients: &mut Gradients) -> Result<Learned> {
        (self.1)(&mut self.0, step, gradients)
    }
    fn validate(&mut self) -> Result<Metrics> {
        self.0.validate()
    }
    fn pictures(&mut self) -> Result<Vec<(String, RgbImage)>> {
        self.0.pictures()
    }
    fn save(&self, folder: &Path) -> Result<()> {
        self.0.save(folder)
    }
    fn identity(&self) -> Result<String> {
        self.0.identity()
    }
}

/// The numbers of a run that no clock decides, and the bytes of what it trained.
fn outcome(run: &RunFolder, saved: &[&str]) -> (Vec<String>, Vec<Vec<u8>>) {
    let text = std::fs::read_to_string(run.metrics()).unwrap();
    let timed = ["time/", "throughput/", "memory/", "data/"];
    let lines = text.lines().map(|line| {
        let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        line.retain(|name, _| !timed.iter().any(|prefix| name.starts_with(prefix)));
        serde_json::to_string(&line).unwrap()
    });
    (lines.collect(), saved.iter().map(|file| std::fs::read(run.path().join(file)).unwrap()).collect())
}

/// A run that is never broken off against runs that were, at every step.
fn check_resume<L: Learner>(make: impl Fn() -> L, plan: &StagePlan, saved: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let whole = RunFolder::create(folder.path(), "whole", 3).unwrap();
    Stage::new(plan.clone(), make()).unwrap().record_in(&whole, "").unwrap().run().unwrap();
    let expected = outcome(&whole, saved);
    assert!(expected.0.len() > plan.n_steps);
    for step in 0..plan.n_steps {
        let run = RunFolder::create(folder.path(), &format!("broken-{step}"), 3).unwrap();
        let breaks = |learner: &mut L, at: usize, gradients: &mut Gradients| match at == step {
            true => Err(Error::config("the power went off")),
            false => learner.learn(at, gradients),
        };
        let mut broken = Stage::new(plan.clone(), Altered(make(), breaks)).unwrap().record_in(&run, "").unwrap();
        assert!(broken.run().unwrap_err().to_string().contains("the power went off"));
        if step % 2 == 1 {
            // A kill leaves no checkpoint of the very step, and goes on from the one before.
            std::fs::remove_dir_all(run.path().join(format!("checkpoints/step-{step}"))).unwrap();
        }
        let run = RunFolder::open(run.path()).unwrap();
        let mut resumed = Stage::new(plan.clone(), make()).unwrap().record_in(&run, "").unwrap();
        assert_eq!(resumed.n_done(), step / 2 * 2, "broken at {step}");
        resumed.run().unwrap();
        assert!(outcome(&run, saved) == expected, "broken at {step}: {:?}", outcome(&run, saved).0);
    }
}

#[test]
fn a_resumed_pretraining_equals_the_unbroken_one() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let make = || learner(&tokens, batch(|_| {}));
    check_resume(make, &plan(6, Some(0.9)), &["policy/model.safetensors", "policy_ema/model.safetensors"]);
}

fn small_tokenizer() -> Reconstruction {
    let images = (0..6).map(|at| RgbImage::from_pixel(16, 16, image::Rgb([at * 40, 100, 20]))).collect();
    let small = CosmosConfig { channels: 8, z_channels: 4, ..CosmosConfig::shapes() };
    let cosmos = Cosmos::init(small, Seed::new(2), &Device::Cpu).unwrap();
    let plan = ReconstructionPlan { batch: 3, validation_images: 2 };
    Reconstruction::new(cosmos, plan, images, Seed::new(4)).unwrap()
}

#[test]
fn a_resumed_visual_tokenizer_equals_the_unbroken_one() {
    check_resume(small_tokenizer, &plan(4, None), &["policy/model.safetensors"]);
}

#[test]
fn parts_of_a_batch_add_up_and_the_loss_falls() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let losses = |rows_per_backward: usize| {
        let mut learner = learner(&tokens, batch(|plan| plan.rows_per_backward = rows_per_backward));
        let mut gradients = Gradients::new();
        let learned = learner.learn(0, &mut gradients).unwrap();
        (learned.loss, gradients)
    };
    let (whole, gradients) = losses(6);
    for rows in [1, 4] {
        let (loss, parts) = losses(rows);
        assert!((loss - whole).abs() < 1e-6, "{rows}: {loss} and {whole}");
        for (name, gradient) in gradients.iter() {
            let (gradient, part) = (gradient.flatten_all().unwrap(), parts.get(name).unwrap().flatten_all().unwrap());
            let size = gradient.abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let off = (gradient - part).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(off <= 1e-5 * size + 1e-8, "{rows}: `{name}` off by {off} of {size}");
        }
    }
    let mut stage = Stage::new(plan(40, None), learner(&tokens, batch(|_| {}))).unwrap();
    let before = learner(&tokens, batch(|_| {})).validate().unwrap();
    stage.run().unwrap();
    let mut policy = learner(&tokens, batch(|_| {}));
    for (name, var) in policy.params().iter() {
        var.set(stage.learner().params().get(name).unwrap()).unwrap();
    }
    let after = policy.validate().unwrap();
    // Held-out captions hold numbers that training never says.
    for name in ["validation/nll", "validation/image_nll"] {
        assert!(after[name] < 0.8 * before[name], "{name}: {} to {}", before[name], after[name]);
    }
}

#[test]
fn the_loss_is_over_what_the_plan_says() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let learned = |loss: LossOver, rows: RowConfig| {
        let mut learner = learner(&tokens, batch(|plan| (plan.loss, plan.rows) = (loss, rows)));
        learner.learn(0, &mut Gradients::new()).unwrap()
    };
    let said = RowConfig { caption_dropout: 0.0, captions: CaptionChoice::Short, ..RowConfig::default() };
    let (row, image) = (learned(LossOver::Row, said.clone()), learned(LossOver::Image, said.clone()));
    assert_eq!(image.loss, image.metrics["loss/image"]);
    assert!(!image.metrics.contains_key("loss/text"));
    assert!((image.loss - row.metrics["loss/image"]).abs() < 1e-6);
    // `<|t2i|> colour N <|soi|>` and 64 codes: of the 67 trained ids three are text.
    let mean = (3.0 * row.metrics["loss/text"] + 64.0 * row.metrics["loss/image"]) / 67.0;
    assert!((row.loss - mean).abs() < 1e-9, "{} and {mean}", row.loss);
    assert_eq!((row.n_images, row.n_tokens), (6, 6 * 68));
    let dropped = learned(LossOver::Row, RowConfig { caption_dropout: 1.0, ..said });
    assert_eq!(dropped.n_tokens, 6 * 66);
}

#[test]
fn the_average_forgets_as_fast_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let values = |params: &Params| params.get("model.norm.weight").unwrap().to_vec1::<f32>().unwrap();
    let run = RunFolder::create(folder.path(), "ema", 3).unwrap();
    let mut stage =
        Stage::new(plan(2, Some(0.75)), learner(&tokens, batch(|_| {}))).unwrap().record_in(&run, "").unwrap();
    let mut weights = vec![values(&stage.learner().params())];
    for _ in 0..2 {
        stage.step().unwrap();
        weights.push(values(&stage.learner().params()));
    }
    // All steps are done: what is left is to evaluate and to save.
    stage.run().unwrap();
    assert_eq!(values(&stage.learner().params()), weights[2], "the weights came back");
    let saved = SimpleAr::load(&run.path().join("policy_ema"), None, &Device::Cpu).unwrap();
    for (at, got) in values(&grpo::Policy::params(&saved)).into_iter().enumerate() {
        let expected = 0.75 * (0.75 * weights[0][at] + 0.25 * weights[1][at]) + 0.25 * weights[2][at];
        assert!((got - expected).abs() < 1e-6, "{got} is not {expected}");
    }
    assert_ne!(weights[0], weights[2]);
}

#[test]
fn updates_that_are_not_finite_are_skipped_and_end_the_run() {
    let nan = |learner: &mut CaptionedTokens, step: usize, gradients: &mut Gradients| {
        let learned = learner.learn(step, gradients)?;
        Ok(Learned { loss: if step == 1 || step > 2 { f64::NAN } else { learned.loss }, ..learned })
    };
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let run = RunFolder::create(folder.path(), "nan", 3).unwrap();
    let mut stage =
        Stage::new(plan(20, None), Altered(learner(&tokens, batch(|_| {})), nan)).unwrap().record_in(&run, "").unwrap();
    let params = stage.learner().params();
    let values = || params.get("model.norm.weight").unwrap().to_vec1::<f32>().unwrap();
    stage.step().unwrap();
    let first = values();
    stage.step().unwrap();
    assert_eq!(values(), first, "a skipped update moved a weight");
    stage.step().unwrap();
    assert_ne!(values(), first);
    let third = values();
    let error = stage.run().unwrap_err().to_string();
    assert!(error.contains("3 updates in a row were skipped, the last at step 5"), "{error}");
    assert_eq!(values(), third);
    assert!(run.path().join("checkpoints/step-6/manifest.json").exists());
    let last = std::fs::read_to_string(run.metrics()).unwrap().lines().last().unwrap().to_string();
    assert!(last.contains("\"skipped_updates\":4.0"), "{last}");
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (small, large) = (tokens(&folder.path().join("64"), 64), tokens(&folder.path().join("128"), 128));
    let check = |result: Result<CaptionedTokens>, words: &str| {
        let error = result.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(words), "no `{words}` in `{error}`");
    };
    let make = |policy: SimpleAr, tokens: &Arc<TokenSet>, plan: BatchPlan| {
        CaptionedTokens::new(policy, plan, (tokens.clone(), None), Seed::new(0))
    };
    check(
        make(policy(&small), &large, batch(|_| {})),
        "the tokens have a grid of (16, 16) and the policy one of (8, 8)",
    );
    // The next stage at another size is the same policy with another grid.
    let larger = policy(&small).with_grid(large.grid()).unwrap();
    assert_eq!(make(larger, &large, batch(|_| {})).unwrap().n_trained(), 20);
    let other = Cosmos::init(CosmosConfig::shapes(), Seed::new(5), &Device::Cpu).unwrap();
    let text = TextTokenizer::of_words(["colour"]).unwrap();
    let config = DecoderConfig { vocab_size: text.n_ids() as usize + 1600, ..DecoderConfig::default() };
    let decoder = Decoder::init(config, Seed::new(0)).unwrap();
    let stranger = SimpleAr::new(decoder, Arc::new(other), Arc::new(text), (8, 8)).unwrap();
    check(make(stranger, &small, batch(|_| {})), "made by another visual tokenizer");
    check(make(policy(&small), &small, batch(|plan| plan.validation_rows = 24)), "data.validation_rows is 24");
    check(make(policy(&small), &small, batch(|plan| plan.rows.caption_dropout = 1.5)), "caption_dropout is 1.5");
    check(make(policy(&small), &small, batch(|plan| plan.law.prefix = "A ".into())), "law.prefix is `A `");
    let frozen = learner(&small, batch(|_| {})).policy().frozen().unwrap();
    let frozen = make(frozen, &small, batch(|_| {})).unwrap();
    assert!(Stage::new(plan(1, None), frozen).err().unwrap().to_string().contains("nothing is trainable"));
    let error = Stage::new(plan(1, Some(1.0)), learner(&small, batch(|_| {}))).err().unwrap().to_string();
    assert!(error.contains("ema is 1"), "{error}");
}

/// The names that a run logged.
fn logged(run: &RunFolder) -> BTreeSet<String> {
    grpo::chart::curves(run).unwrap().into_keys().collect()
}

#[test]
fn the_page_of_metrics_has_every_name_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let run = RunFolder::create(folder.path(), "rows", 3).unwrap();
    let stage = Stage::new(plan(2, Some(0.5)), learner(&tokens, batch(|_| {}))).unwrap();
    stage.measure_against(Some(1e12)).record_in(&run, "").unwrap().run().unwrap();
    let mut emitted = logged(&run);
    let run = RunFolder::create(folder.path(), "images", 3).unwrap();
    Stage::new(plan(2, Some(0.5)), small_tokenizer()).unwrap().record_in(&run, "").unwrap().run().unwrap();
    emitted.extend(logged(&run));

    let page = include_str!("../../src/docs/metrics.md").split("# Metrics of the stages").nth(1).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let documented: BTreeSet<String> = rows
        .flat_map(|cell| cell.split('`').step_by(2))
        .filter(|n| !n.contains([' ', ',']))
        .map(String::from)
        .collect();
    assert_eq!(emitted, documented);
}

#[test]
fn pictures_come_as_often_as_the_plan_says() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let run = RunFolder::create(folder.path(), "pictures", 3).unwrap();
    let mut plan = plan(6, None);
    (plan.log.validate_every, plan.log.pictures_every) = (3, 2);
    Stage::new(plan, learner(&tokens, batch(|_| {}))).unwrap().record_in(&run, "").unwrap().run().unwrap();
    let drawn = |step: usize| run.samples().join(format!("panel_validation-{step:06}.png")).exists();
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(drawn), [true, false, true, false, true, false, true]);
    let at: Vec<f64> = grpo::chart::curves(&run).unwrap()["validation/nll"].iter().map(|(step, _)| *step).collect();
    assert_eq!(at, [0.0, 2.0, 3.0, 4.0, 6.0]);
}

#[test]
fn what_gets_no_gradient_is_named_before_anything_moves() {
    let cut = |learner: &mut CaptionedTokens, step: usize, gradients: &mut Gradients| {
        let mut all = Gradients::new();
        let learned = learner.learn(step, &mut all)?;
        for (name, gradient) in all.iter().filter(|(name, _)| !name.contains("layers.1.mlp")) {
            gradients.add(name, gradient)?;
        }
        Ok(learned)
    };
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let mut stage = Stage::new(plan(2, None), Altered(learner(&tokens, batch(|_| {})), cut)).unwrap();
    let error = stage.run().unwrap_err().to_string();
    assert!(error.contains("3 of 26 trainable tensors get no gradient, the first `model.layers.1.mlp"), "{error}");
}

#[test]
fn a_checkpoint_of_another_run_is_refused_by_the_setting_that_differs() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tokens(folder.path(), 64);
    let run = RunFolder::create(folder.path(), "a", 3).unwrap();
    Stage::new(plan(2, None), learner(&tokens, batch(|_| {}))).unwrap().record_in(&run, "").unwrap().run().unwrap();
    let resume = |plan: StagePlan, data: BatchPlan| {
        Stage::new(plan, learner(&tokens, data)).unwrap().record_in(&run, "").err().unwrap().to_string()
    };
    let mut longer = plan(2, None);
    longer.n_steps = 4;
    assert!(resume(longer, batch(|_| {})).contains("there n_steps = 2, here n_steps = 4"));
    let held_out = Some(tokens.clone());
    let other = CaptionedTokens::new(policy(&tokens), batch(|_| {}), (tokens.clone(), held_out), Seed::new(9)).unwrap();
    let error = Stage::new(plan(2, None), other).unwrap().record_in(&run, "").err().unwrap().to_string();
    assert!(error.contains("held out: 4 rows of these tokens, here held out: 4 rows of 24 rows"), "{error}");
    let error = resume(plan(2, None), batch(|plan| plan.loss = LossOver::Image));
    assert!(error.contains("there loss = \"row\", here loss = \"image\""), "{error}");
}
