//! Reports of runs: what rose, what fell, and how sure that is.
//!
//! Everything is read from run folders, so a report can be made of runs that were trained long ago, elsewhere or by another
//! binary. Differences are paired: by held-out prompt and by seed, which share their draws.

mod arms;
mod compare;
mod figures;
mod page;
mod pictures;
mod plots;
mod record;
mod training;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};

use grpo::{Error, Result, write_whole};
use serde::Serialize;

pub use arms::Pairing;
pub use compare::{ArmReport, Effect, Facts, Group, Process, RunFacts};
pub use record::LeftOut;
pub use training::{Cost, Point, Spread, Training};
pub use verdict::{Evidence, Kind, Moved, Verdict};

/// The name under which a run may watch its own mix as one reward, with all changes and gates ([`grpo::Mixed`]): what its
/// verdict then rests on.
pub const OPTIMISED: &str = "optimised";

/// How a report is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// The arm that others are compared with; the ablation's own where absent.
    pub baseline: Option<String>,
    /// The held-out reward that is the score one is after; the ablation's own, or `geneval` if watched, where absent.
    pub evaluation: Option<String>,
    /// The held-out rewards that decide verdicts; the ablation's own, or all that are watched, where there is none.
    pub judges: Vec<String>,
    /// A column of the prompts by which the evaluation is told apart.
    pub by: String,
    /// Prompts shown with their pictures.
    pub n_pictures: usize,
    /// With times and memory, which no two runs share.
    pub times: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { baseline: None, evaluation: None, judges: Vec::new(), by: "tag".into(), n_pictures: 8, times: true }
    }
}

/// A comparison of runs.
pub struct Report {
    facts: Facts,
    figures: Vec<figures::Figure>,
    panel: pictures::Panel,
}

/// What the templates are given.
#[derive(Serialize)]
struct Shown<'a> {
    facts: &'a Facts,
    figures: &'a [figures::Figure],
    panel: &'a pictures::Panel,
}

impl Report {
    /// Of the runs in these folders: an ablation's, an arm's or a run's.
    ///
    /// An error where there is no whole run with held-out prompts. Runs that are not whole are left out and named.
    pub fn of(folders: &[impl AsRef<Path>], options: &Options) -> Result<Self> {
        let folders: Vec<&Path> = folders.iter().map(AsRef::as_ref).collect();
        let found = record::find(&folders)?;
        let arms = arms::Arms::of(found, options)?;
        let facts = Facts::of(&arms, options);
        let figures = figures::all(&facts);
        let panel = pictures::Panel::of(&arms, options.n_pictures)?;
        Ok(Self { facts, figures, panel })
    }

    /// What was found, for programs.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The same as one JSON object.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(&self.facts).map_err(|error| Error::config(error.to_string()))
    }

    /// A line an arm: its name and its verdict.
    pub fn verdicts(&self) -> Vec<String> {
        let width = self.facts.arms.iter().map(|arm| arm.name.len()).max().unwrap_or(0);
        let line = |arm: &ArmReport| Some(format!("{:width$}  {}", arm.name, arm.verdict.as_ref()?));
        self.facts.arms.iter().filter_map(line).collect()
    }

    /// Writes `report.html`, which needs no other file, `report.md` with `figures/`, and `report.json`; returns the first
    /// three paths.
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let figures = folder.join("figures");
        fs::create_dir_all(&figures).map_err(|error| Error::file(&figures, error))?;
        for figure in &self.figures {
            write(&figures.join(format!("{}.svg", figure.name)), figure.svg.as_bytes())?;
        }
        if let Some(picture) = self.panel.drawn() {
            let path = figures.join("panel.png");
            picture.save(&path).map_err(|error| Error::file(&path, error))?;
        }
        let shown = Shown { facts: &self.facts, figures: &self.figures, panel: &self.panel };
        let facts = serde_json::to_string_pretty(&self.facts).map_err(|error| Error::config(error.to_string()))?;
        let files = [
            ("report.html", page::html(&shown)?),
            ("report.md", page::markdown(&shown)?),
            ("report.json", facts + "\n"),
        ];
        let written = files.into_iter().map(|(name, text)| {
            let path = folder.join(name);
            write(&path, text.as_bytes())?;
            Ok(path)
        });
        written.collect()
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole(path, bytes).map_err(|error| Error::file(path, error))
}
