//! Where a benchmark's report goes.

use std::path::{Path, PathBuf};

use clap::Args;
use grpo_rewards::evaluation::{Report, sha256};

use crate::commands::{print, tell};
use crate::failure::{Failure, Outcome};

/// Files for a report; a table is printed where no JSON is.
#[derive(Args)]
pub struct ReportArgs {
    /// The report as one JSON object, on standard output or in FILE.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// The report as a page of Markdown.
    #[arg(long, value_name = "FILE.md")]
    pub report: Option<PathBuf>,
}

impl ReportArgs {
    /// Writes what was asked for; a report in which nothing was judged fails after that.
    pub fn write(&self, report: &Report) -> Outcome<()> {
        let json = || serde_json::to_string_pretty(report).map_err(|error| Failure::from(anyhow::Error::from(error)));
        match self.json.as_deref() {
            Some(path) if path == Path::new("-") => {
                print(&serde_json::to_string(report).map_err(|error| Failure::from(anyhow::Error::from(error)))?)?;
            }
            Some(path) => {
                save(path, &json()?)?;
                print_table(report)?;
            }
            None => print_table(report)?,
        }
        if let Some(path) = &self.report {
            save(path, &report.to_markdown())?;
        }
        let (n_failed, n_missing) = (report.failed.len(), report.missing.len());
        if n_failed + n_missing > 0 {
            let named = if self.json.is_some() || self.report.is_some() { "" } else { "; --report FILE.md names them" };
            tell(&format!("{n_failed} images failed, {n_missing} entries are missing{named}"));
        }
        match (report.overall, report.failed.first()) {
            (None, Some(failed)) => {
                let (n, image, reason) = (report.images.found, &failed.image, &failed.reason);
                Err(Failure::user(format!("none of {n} images could be judged; {image}: {reason}")))
            }
            (None, None) => Err(Failure::user("there is no image to judge; see the layout in --help")),
            (Some(_), _) => Ok(()),
        }
    }
}

fn print_table(report: &Report) -> Outcome<()> {
    let mut group = "";
    for row in &report.rows {
        if row.group != group {
            group = &row.group;
            print(&row.group)?;
        }
        let spread = row.std.map_or_else(String::new, |std| format!("  std {std:.4}"));
        print(&format!("{:<24} {:>9.4}{spread}  ({})", row.name, row.score, row.n))?;
    }
    let line = |name: &str, number: Option<f64>| number.map(|number| format!("{name:<24} {number:>9.4}"));
    let totals = [line("overall", report.overall), line("missing, failed as wrong", report.pessimistic)];
    totals.into_iter().flatten().try_for_each(|line| print(&line))
}

fn save(path: &Path, text: &str) -> Outcome<()> {
    std::fs::write(path, format!("{text}\n")).map_err(|error| grpo::Error::file(path, error))?;
    tell(&format!("report  {}", path.display()));
    Ok(())
}

/// Names a file that judged in the report.
pub fn name_file(report: &mut Report, role: &str, path: &Path) -> Outcome<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    report.models.insert(format!("{role}/{name}"), sha256(path)?);
    Ok(())
}

/// Names every file of a model's folder and of those in it in the report.
pub fn name_folder(report: &mut Report, role: &str, folder: &Path) -> Outcome<()> {
    let failed = |error| grpo::Error::file(folder, error);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        match path.file_name() {
            Some(name) if path.is_dir() => name_folder(report, &format!("{role}/{}", name.to_string_lossy()), &path)?,
            _ if path.is_file() => name_file(report, role, &path)?,
            _ => {}
        }
    }
    Ok(())
}
