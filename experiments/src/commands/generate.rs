//! `grpo generate`: images for prompts.

use std::path::PathBuf;

use clap::Args;
use grpo::{Policy, Prompt, Request, Seed};
use grpo_policies::simplear::{Law, SimpleAr};
use serde_json::json;

use super::{PolicyArgs, print, tell};
use crate::config::PolicySource;
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Draw images for prompts as PNG files; image N of a prompt is the same whatever else is drawn.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    policy: PolicyArgs,
    /// What to draw; may be given again.
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// Images of each prompt.
    #[arg(short, default_value_t = 4)]
    n: usize,
    /// The seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    law: LawArgs,
    /// Where the images go.
    #[arg(long, value_name = "DIR", default_value = "generated")]
    out: PathBuf,
    /// One JSON object a line for each image.
    #[arg(long)]
    json: bool,
}

/// How tokens are drawn.
#[derive(Args)]
pub struct LawArgs {
    /// Logits are divided by it.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Keep the most likely codes only.
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the most likely codes that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 1.0)]
    guidance: f32,
    /// The prompt that guidance moves away from; the null row where absent.
    #[arg(long, value_name = "TEXT")]
    negative: Option<String>,
}

impl LawArgs {
    /// The law.
    pub fn law(&self) -> Law {
        Law {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            guidance: self.guidance,
            negative_prompt: self.negative.clone(),
            ..Law::default()
        }
    }
}

impl Generate {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        if self.n == 0 {
            return Err(Failure::user("-n is 0; ask for at least one image"));
        }
        let device = parts::device(&self.policy.device)?;
        let policy = parts::policy(PolicySource::ShapesSft, self.policy.policy.as_deref(), &device)?;
        let policy = policy.with_law(self.law.law())?;
        std::fs::create_dir_all(&self.out).map_err(|error| grpo::Error::file(&self.out, error))?;
        for (row, text) in self.prompt.iter().enumerate() {
            self.draw(&policy, row, &Prompt::new(text))?;
        }
        tell(&format!("{} images in {}", self.prompt.len() * self.n, self.out.display()));
        Ok(())
    }

    fn draw(&self, policy: &SimpleAr, row: usize, prompt: &Prompt) -> Outcome<()> {
        let seed = Seed::new(self.seed).fold(row as u64);
        let requests: Vec<Request<'_>> =
            (0..self.n).map(|draw| Request { prompt, seed: seed.fold(draw as u64) }).collect();
        for (draw, completion) in policy.sample(&requests)?.into_iter().enumerate() {
            let path = self.out.join(format!("{row:03}-{draw:02}.png"));
            completion.sample.save(&path).map_err(|error| grpo::Error::file(&path, error))?;
            if self.json {
                let log_prob: f32 = completion.log_probs.iter().sum();
                let line = json!({"prompt": prompt.text, "image": path, "log_prob": log_prob, "codes": completion.trace.codes});
                print(&line.to_string())?;
            }
        }
        Ok(())
    }
}
