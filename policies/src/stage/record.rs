//! Where a stage's numbers and pictures go: `metrics.jsonl`, TensorBoard, `samples/`, the console.

use std::fs;

use grpo::observe::{Console, JsonLines, Metrics};
use grpo::tensorboard::{Category, Chart, EventWriter, HParam};
use grpo::{Error, Result, RunFolder};
use image::RgbImage;

/// The metrics that runs are compared by.
const FINALS: [&str; 4] = ["validation/nll", "validation/image_nll", "loss", "throughput/tokens_per_s"];

/// Tables in tables of a stage's configuration: `stage.plan.optim`, `stage.data.rows`.
const DEPTH: usize = 3;

/// A run's files.
pub(super) struct Record {
    run: RunFolder,
    lines: JsonLines,
    board: EventWriter,
    console: Console,
    n_steps: usize,
}

impl Record {
    pub(super) fn create(run: &RunFolder, (first_step, n_steps): (usize, usize), config_toml: &str) -> Result<Self> {
        let mut board = EventWriter::create(run.path(), first_step)?;
        if first_step == 0 {
            board.text("config", 0, &format!("```toml\n{config_toml}\n```"))?;
        }
        let table: toml::Table = toml::from_str(config_toml).map_err(|error| Error::config(error.to_string()))?;
        let group = run.path().parent().and_then(|name| name.file_name()).unwrap_or_default();
        board.hparams(&HParam::settings(&table, DEPTH), &FINALS, &group.to_string_lossy())?;
        board.layout(&charts())?;
        board.flush()?;
        let lines = JsonLines::create(run, first_step)?;
        Ok(Self { run: run.clone(), lines, board, console: Console::new(first_step, n_steps), n_steps })
    }

    pub(super) fn step(&mut self, step: usize, metrics: &Metrics, fault: Option<&str>) -> Result<()> {
        self.lines.write("step", step, metrics)?;
        for (name, value) in metrics {
            self.board.scalar(name, step, *value)?;
        }
        if let Some(why) = fault {
            self.board.text("skipped_updates", step, why)?;
            self.console.say(&format!("step {step}: an update was skipped: {why}"));
        }
        self.board.flush()?;
        self.console.advance(step, self.n_steps, brief(metrics));
        Ok(())
    }

    pub(super) fn validation(&mut self, step: usize, metrics: &Metrics, pictures: &[(String, RgbImage)]) -> Result<()> {
        self.lines.write("validation", step, metrics)?;
        for (name, value) in metrics {
            self.board.scalar(name, step, *value)?;
        }
        for (name, picture) in pictures {
            self.board.image(name, step, picture)?;
            let folder = self.run.samples();
            fs::create_dir_all(&folder).map_err(|error| Error::file(&folder, error))?;
            let path = folder.join(format!("{}-{step:06}.png", name.replace('/', "_")));
            picture.save(&path).map_err(|error| Error::file(&path, error))?;
        }
        self.board.flush()?;
        let told: Vec<String> = metrics
            .iter()
            .filter_map(|(name, value)| Some(format!("{} {value:.4}", name.strip_prefix("validation/")?)))
            .collect();
        if !told.is_empty() {
            self.console.say(&format!("validation after {step:>5} steps:  {}", told.join("  ")));
        }
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<()> {
        self.board.session_end(true)?;
        self.board.flush()?;
        self.console.close();
        Ok(())
    }
}

/// The numbers a person watches, where the step has them.
fn brief(metrics: &Metrics) -> String {
    let shown = [
        ("loss", "loss"),
        ("loss/image", "image"),
        ("loss/text", "text"),
        ("grad_norm", "grad"),
        ("throughput/tokens_per_s", "tokens/s"),
        ("throughput/images_per_s", "images/s"),
    ];
    let digits = |label: &str| if label.ends_with("/s") { 0 } else { 3 };
    let parts = shown
        .iter()
        .filter_map(|(name, label)| metrics.get(*name).map(|value| format!("{label} {value:.*}", digits(label))));
    parts.collect::<Vec<_>>().join("  ")
}

/// What is looked at first.
fn charts() -> Vec<Category> {
    let chart = |title: &str, tags: &[&str]| Chart {
        title: title.into(),
        tags: tags.iter().map(|tag| format!("^{tag}$")).collect(),
    };
    let learning = vec![
        chart("loss", &["loss"]),
        chart("loss of image and text tokens", &["loss/image", "loss/text"]),
        chart("held-out loss", &["validation/nll", "validation/nll_ema"]),
        chart("held-out loss of image tokens", &["validation/image_nll", "validation/image_nll_ema"]),
    ];
    let health = vec![
        chart("gradient norm", &["grad_norm"]),
        chart("learning rate", &["learning_rate"]),
        chart("tokens a second", &["throughput/tokens_per_s"]),
        chart("share of the peak", &["throughput/mfu"]),
        chart("share of a step that waits for data", &["data/wait_share"]),
    ];
    [("learning", learning), ("health", health)].map(|(title, charts)| Category { title: title.into(), charts }).into()
}
