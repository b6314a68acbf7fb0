//! What a race is told by: a Markdown table, and an entry of LOG.md that holds it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// A Markdown table.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of these columns and no row.
    pub fn new(columns: &[&str]) -> Self {
        let rule = vec!["---".to_string(); columns.len()];
        Self { rows: vec![columns.iter().map(ToString::to_string).collect(), rule] }
    }

    /// Adds a row.
    pub fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Writes it into LOG.md as its newest entry, with what it was measured on.
    pub fn log(&self, title: &str, about: &str) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("LOG.md");
        let text = fs::read_to_string(&path)?;
        let newest = text.find("\n## ").context("LOG.md has no entry; the newest begins with `## `")?;
        let (head, entries) = text.split_at(newest + 1);
        let date = said_by("date", &["-u", "+%F"])?;
        let commit = said_by("git", &["describe", "--always", "--dirty"])?;
        let entry = format!("## {date}: {title}\n\nCommit {commit}; {}. {about}\n\n{self}\n", machine()?);
        Ok(fs::write(path, format!("{head}{entry}{entries}"))?)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "| {} |", row.join(" | ")))
    }
}

fn said_by(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    Ok(String::from_utf8(output.with_context(|| program.to_string())?.stdout)?.trim().to_string())
}

/// The processor's name, how many of its cores there are, and the GPU's name.
fn machine() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or("unknown processor", |(_, name)| name);
    let gpu = said_by("nvidia-smi", &["--query-gpu=name", "--format=csv,noheader"]).unwrap_or("no GPU".into());
    Ok(format!("{name}, {} cores, {gpu}", std::thread::available_parallelism()?))
}
