//! `grpo report`: runs compared.

use std::path::{Path, PathBuf};

use clap::Args;
use grpo_experiments::Report;
use grpo_experiments::report::Options;

use super::{at_least_one, print, tell};
use crate::failure::Outcome;

/// Compare runs: those of an ablation's folder, or any with held-out prompts in common. Arms are folders, seeds the folders
/// in them.
#[derive(Args)]
pub struct ReportRuns {
    /// The folders: of an ablation, an arm or a run.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Where the report goes; `report` in the first folder where absent.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The arm that others are compared with; the ablation's own where absent.
    #[arg(long, value_name = "ARM")]
    baseline: Option<String>,
    /// The held-out reward that is the score one is after; the ablation's own, or geneval, where absent.
    #[arg(long, value_name = "REWARD")]
    evaluation: Option<String>,
    /// A held-out reward that decides verdicts where an arm does not optimise it; may be given again.
    #[arg(long = "judge", value_name = "REWARD")]
    judges: Vec<String>,
    /// A column of the prompts by which the evaluation is told apart.
    #[arg(long, value_name = "COLUMN", default_value = "tag")]
    by: String,
    /// Prompts shown with their pictures.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one())]
    pictures: usize,
    /// Leave out times and memory, so that the same runs give the same bytes.
    #[arg(long)]
    without_times: bool,
    /// Print the report as JSON as well.
    #[arg(long)]
    json: bool,
}

impl ReportRuns {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let options = Options {
            baseline: self.baseline,
            evaluation: self.evaluation,
            judges: self.judges,
            by: self.by,
            n_pictures: self.pictures,
            times: !self.without_times,
        };
        let report = Report::of(&self.runs, &options)?;
        let out = self.out.or_else(|| self.runs.first().map(|first| first.join("report"))).unwrap_or_default();
        write(&report, &out)?;
        if self.json { print(&report.json()?) } else { Ok(()) }
    }
}

/// Writes a report and says what it found.
pub fn write(report: &Report, out: &Path) -> Outcome<()> {
    for file in report.write(out)? {
        tell(&format!("report       {}", file.display()));
    }
    for line in report.verdicts() {
        tell(&line);
    }
    Ok(())
}
