//! `grpo generate`: images for prompts.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use grpo::{Prompt, Request, Seed};
use grpo_policies::simplear::{Drawn, Law, SimpleAr, Vocabulary};
use grpo_rewards::geneval::{self, Metadata};
use image::RgbImage;
use image::imageops::replace;
use serde_json::json;

use super::tokens::{TokenFile, TokenLine};
use super::{SampledPolicyArgs, at_least_one, print, progress, tell};
use crate::failure::Outcome;
use crate::prompts;

/// Draw images for prompts as PNG files; image N of a prompt is the same whatever else is drawn.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    policy: SampledPolicyArgs,
    /// What to draw; may be given again.
    #[arg(long, required_unless_present_any = ["prompts", "layout"])]
    prompt: Vec<String>,
    /// A file of what to draw: a prompt a line, or a JSON object with a "prompt" a line, as GenEval's metadata.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Images of each prompt.
    #[arg(short, default_value_t = 4, value_parser = at_least_one())]
    n: usize,
    /// The seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    law: LawArgs,
    /// Tokens decided in one pass of the decoder by speculative decoding: 1 is plain, 16 or 32 usual, or `full`.
    #[arg(long, default_value = "1", value_parser = window)]
    window: usize,
    /// Images drawn at a time; the images do not depend on it, memory does.
    #[arg(long, default_value_t = 16, value_parser = at_least_one())]
    batch: usize,
    /// Where the images go.
    #[arg(long, value_name = "DIR", default_value = "generated")]
    out: PathBuf,
    /// How the images lie, for a benchmark: `geneval` writes DIR/00000/metadata.jsonl and DIR/00000/samples/0000.png, of
    /// its own 553 prompts where none are given.
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Also put each prompt's images side by side in one file, without borders.
    #[arg(long)]
    grids: bool,
    /// Also write the images' tokens to DIR/tokens.jsonl, for `grpo detokenize`.
    #[arg(long)]
    save_tokens: bool,
    /// One JSON object a line for each image.
    #[arg(long)]
    json: bool,
}

/// A benchmark's folders.
#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    Geneval,
}

/// How tokens are drawn.
#[derive(Args)]
pub struct LawArgs {
    /// As the original's generate.py: guidance 6, its negative prompt and prefix; other flags change single values.
    #[arg(long)]
    published: bool,
    /// Logits are divided by it; 1 where absent.
    #[arg(long)]
    temperature: Option<f32>,
    /// Keep so many of the most likely codes only.
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the most likely codes that together reach this probability.
    #[arg(long)]
    top_p: Option<f32>,
    /// Keep codes of at least this share of the likeliest one's probability.
    #[arg(long)]
    min_p: Option<f32>,
    /// Always take the likeliest code.
    #[arg(long)]
    greedy: bool,
    /// Let all ids compete and not the codebook alone, as the original does.
    #[arg(long)]
    full_vocabulary: bool,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long)]
    guidance: Option<f32>,
    /// The prompt that guidance moves away from; the null row where absent.
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
    /// Put before every prompt, such as 'A photo of '.
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
}

impl LawArgs {
    /// The law.
    pub fn law(&self) -> Law {
        let base = if self.published { Law::published() } else { Law::default() };
        Law {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            greedy: self.greedy,
            vocabulary: if self.full_vocabulary { Vocabulary::Full } else { base.vocabulary },
            guidance: self.guidance.unwrap_or(base.guidance),
            negative_prompt: self.negative.clone().or(base.negative_prompt),
            prefix: self.prefix.clone().unwrap_or(base.prefix),
            ..Law::default()
        }
    }
}

fn window(text: &str) -> Result<usize, String> {
    match text {
        "full" => Ok(usize::MAX),
        number => number.parse().ok().filter(|n| *n > 0).ok_or_else(|| "give a number from 1 on, or `full`".into()),
    }
}

/// One image to draw.
struct Job<'a> {
    row: usize,
    draw: usize,
    prompt: &'a Prompt,
}

impl Generate {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let prompts = self.asked()?;
        let policy = self.policy.load()?.with_law(self.law.law())?.with_window(self.window)?;
        std::fs::create_dir_all(&self.out).map_err(|error| grpo::Error::file(&self.out, error))?;
        self.note_sampler()?;
        self.note_metadata(&prompts)?;
        let jobs: Vec<Job<'_>> = prompts
            .iter()
            .enumerate()
            .flat_map(|(row, prompt)| (0..self.n).map(move |draw| Job { row, draw, prompt }))
            .collect();
        let (start, bar) = (Instant::now(), progress(jobs.len()));
        let tokens = self.save_tokens.then(|| TokenFile::create(&self.out.join("tokens.jsonl"))).transpose()?;
        let mut results = Results { options: &self, tokens, sheet: Vec::new(), n_passes: 0 };
        for jobs in jobs.chunks(self.batch) {
            results.add(&policy, jobs)?;
            bar.inc(jobs.len() as u64);
        }
        bar.finish_and_clear();
        let (n, seconds) = (jobs.len() as f64, start.elapsed().as_secs_f64());
        tell(&format!("{} images in {}, {:.2} s each", jobs.len(), self.out.display(), seconds / n));
        if self.window > 1 {
            let (rows, columns) = policy.grid();
            let passes = results.n_passes as f64 / n;
            tell(&format!("{passes:.1} passes of the decoder for {} tokens", rows * columns));
        }
        Ok(())
    }

    /// What each image should show, where the layout asks for it.
    fn note_metadata(&self, prompts: &[Prompt]) -> Outcome<()> {
        if self.layout.is_none() {
            return Ok(());
        }
        // All are read before a folder is made.
        let metadata: Vec<Metadata> = prompts.iter().map(Metadata::from_prompt).collect::<grpo::Result<_>>()?;
        for (row, metadata) in metadata.iter().enumerate() {
            let folder = self.out.join(format!("{row:05}"));
            std::fs::create_dir_all(folder.join("samples")).map_err(|error| grpo::Error::file(&folder, error))?;
            let line = serde_json::to_string(metadata).map_err(anyhow::Error::from)?;
            let path = folder.join("metadata.jsonl");
            std::fs::write(&path, line + "\n").map_err(|error| grpo::Error::file(&path, error))?;
        }
        Ok(())
    }

    /// Where an image goes, and a prompt's sheet of images.
    fn paths(&self, row: usize, draw: usize) -> [PathBuf; 2] {
        match self.layout {
            None => [format!("{row:03}-{draw:02}.png"), format!("{row:03}.png")],
            Some(Layout::Geneval) => [format!("{row:05}/samples/{draw:04}.png"), format!("{row:05}/grid.png")],
        }
        .map(|name| self.out.join(name))
    }

    /// How the images are drawn, for the reports of `grpo eval`, in `sampler.json` beside them.
    fn note_sampler(&self) -> Outcome<()> {
        let path = self.out.join("sampler.json");
        let settings = json!({"law": self.law.law(), "seed": self.seed, "images_of_each_prompt": self.n});
        Ok(std::fs::write(&path, format!("{settings}\n")).map_err(|error| grpo::Error::file(&path, error))?)
    }

    fn asked(&self) -> Outcome<Vec<Prompt>> {
        let mut asked: Vec<Prompt> = self.prompt.iter().map(Prompt::new).collect();
        if let Some(path) = &self.prompts {
            asked.extend(prompts::read(path)?);
        }
        if asked.is_empty() {
            // Only a layout comes without a prompt.
            let published = geneval::prompts()?;
            asked = published.iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;
        }
        Ok(asked)
    }
}

/// Where images go as they are drawn.
struct Results<'a> {
    options: &'a Generate,
    tokens: Option<TokenFile>,
    /// Images of the prompt at hand.
    sheet: Vec<RgbImage>,
    n_passes: usize,
}

impl Results<'_> {
    fn add(&mut self, policy: &SimpleAr, jobs: &[Job<'_>]) -> Outcome<()> {
        let seed = |job: &Job<'_>| Seed::new(self.options.seed).fold(job.row as u64).fold(job.draw as u64);
        let requests: Vec<Request<'_>> =
            jobs.iter().map(|job| Request { prompt: job.prompt, seed: seed(job) }).collect();
        let drawn = policy.draw(&requests)?;
        let codes: Vec<Vec<u32>> = drawn.iter().map(|drawn| drawn.trace.codes.clone()).collect();
        for ((job, drawn), image) in jobs.iter().zip(drawn).zip(policy.decode(&codes)?) {
            self.n_passes += drawn.n_passes;
            self.write(policy, job, drawn, image)?;
        }
        Ok(())
    }

    fn write(&mut self, policy: &SimpleAr, job: &Job<'_>, drawn: Drawn, image: RgbImage) -> Outcome<()> {
        let [path, sheet_path] = self.options.paths(job.row, job.draw);
        image.save(&path).map_err(|error| grpo::Error::file(&path, error))?;
        let log_prob: f32 = drawn.log_probs.iter().sum();
        if let Some(tokens) = &mut self.tokens {
            let image = path.display().to_string();
            let grid = policy.grid();
            let (codes, prompt) = (drawn.trace.codes.clone(), Some(job.prompt.text.clone()));
            tokens.add(&TokenLine { image: Some(image), prompt, grid, codes })?;
        }
        if self.options.json {
            let line = json!({"prompt": job.prompt.text, "image": path, "log_prob": log_prob, "passes": drawn.n_passes,
                "codes": drawn.trace.codes});
            print(&line.to_string())?;
        }
        if self.options.grids {
            self.sheet.push(image);
            if self.sheet.len() == self.options.n {
                save_sheet(&std::mem::take(&mut self.sheet), &sheet_path)?;
            }
        }
        Ok(())
    }
}

/// Images of one size side by side, in as many columns as rows or one more.
fn save_sheet(images: &[RgbImage], path: &Path) -> Outcome<()> {
    let columns = (1..=images.len()).find(|side| side * side >= images.len()).unwrap_or(1);
    let (width, height) = images.first().map_or((0, 0), |image| image.dimensions());
    let rows = images.len().div_ceil(columns);
    let mut sheet = RgbImage::new(width * columns as u32, height * rows as u32);
    for (index, image) in images.iter().enumerate() {
        let (row, column) = (index / columns, index % columns);
        replace(&mut sheet, image, i64::from(width) * column as i64, i64::from(height) * row as i64);
    }
    Ok(sheet.save(path).map_err(|error| grpo::Error::file(path, error))?)
}
