//! What decides a run's rewards, kept with it: a run that goes on under another reward is another run.

use std::collections::BTreeMap;
use std::fs;

use grpo::{Prompt, RunFolder};
use serde::Serialize;
use serde_json::{Value, json};

use crate::config::RewardSource;
use crate::failure::{Failure, Outcome};

/// The file in the run's folder.
const FILE: &str = "judges.json";

/// Rewards with their arithmetic and gates, the scorers behind them, and checksums of the prompts with the columns that
/// they read, by name.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Judges(BTreeMap<String, Value>);

impl Judges {
    /// Of what is trained on and what is held out; `scorers` has a folder's checksum, an address or a program by name.
    pub fn new(
        [rewards, held_out]: [&[RewardSource]; 2],
        scorers: &BTreeMap<String, String>,
        [prompts, held_out_prompts]: [&[Prompt]; 2],
    ) -> Outcome<Self> {
        let parts = [
            ("rewards", json!(rewards)),
            ("held-out rewards", json!(held_out)),
            ("scorers", json!(scorers)),
            ("prompts", json!(checksum(prompts)?)),
            ("held-out prompts", json!(checksum(held_out_prompts)?)),
        ];
        Ok(Self(parts.map(|(name, value)| (name.to_string(), value)).into()))
    }

    /// Writes them into a new run; one that is gone on with must have the same. A run from before there was such a file is
    /// given one.
    pub fn check_or_write(&self, run: &RunFolder, resumed: bool) -> Outcome<()> {
        let path = run.path().join(FILE);
        if resumed && path.exists() {
            let text = fs::read(&path).map_err(|error| grpo::Error::file(&path, error))?;
            let before: BTreeMap<String, Value> =
                serde_json::from_slice(&text).map_err(|error| grpo::Error::file(&path, error))?;
            let Some((name, now)) = self.0.iter().find(|(name, now)| before.get(*name) != Some(now)) else {
                return Ok(());
            };
            let before = before.get(name).unwrap_or(&Value::Null);
            return Err(Failure::user(format!(
                "{}: the run's {name} were {before} and are {now}; resume with the former, or start a new run",
                path.display()
            )));
        }
        let text = serde_json::to_string_pretty(self).map_err(anyhow::Error::from)?;
        Ok(fs::write(&path, text + "\n").map_err(|error| grpo::Error::file(&path, error))?)
    }
}

fn checksum(prompts: &[Prompt]) -> Outcome<String> {
    let text = serde_json::to_vec(prompts).map_err(anyhow::Error::from)?;
    Ok(format!("{} prompts, crc32c {:08x}", prompts.len(), crc32c::crc32c(&text)))
}
