//! `metrics.jsonl`: every number of a run, for programs.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{HeldOutReport, Metrics, Observer, StepReport};
use crate::{BoxError, Error, Policy, Result, RunFolder, write_whole};

/// One JSON object a step in `metrics.jsonl`.
pub struct JsonLines {
    file: File,
    path: PathBuf,
}

impl JsonLines {
    /// Appends to the run's file after dropping the lines of steps that will be done again.
    pub fn create(run: &RunFolder, first_step: usize) -> Result<Self> {
        let path = run.metrics();
        let kept = if path.exists() { lines_before(&path, first_step)? } else { String::new() };
        write_whole(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::file(&path, error))?;
        Ok(Self { file, path })
    }

    /// Appends the numbers of a step, whose `kind` is "step", or of an evaluation after so many steps, "held_out" or
    /// "validation".
    pub fn write(&mut self, kind: &str, step: usize, metrics: &Metrics) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), json!(step));
        line.insert("kind".into(), json!(kind));
        line.extend(metrics.iter().map(|(name, value)| (name.clone(), json!(value))));
        writeln!(self.file, "{}", Value::Object(line)).map_err(|error| Error::file(&self.path, error))
    }
}

fn lines_before(path: &Path, first_step: usize) -> Result<String> {
    let file = File::open(path).map_err(|error| Error::file(path, error))?;
    let mut kept = String::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| Error::file(path, error))?;
        // A line that a crash cut short is dropped: its step is done again.
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        let step = value["step"].as_u64().unwrap_or(u64::MAX) as usize;
        // An evaluation at step N is written when N steps are done, before a checkpoint of step N.
        let done = if value["kind"] == "step" { step < first_step } else { step <= first_step && first_step > 0 };
        if done {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    Ok(kept)
}

impl<P: Policy> Observer<P> for JsonLines {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        Ok(self.write("step", report.step, report.metrics)?)
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        Ok(self.write("held_out", report.step, report.metrics)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_resumed_log_drops_the_steps_that_are_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [
            r#"{"step":0,"kind":"held_out"}"#,
            r#"{"step":0,"kind":"step"}"#,
            r#"{"step":1,"kind":"step"}"#,
            r#"{"step":2,"kind":"held_out"}"#,
            r#"{"step":2,"kind":"step"}"#,
            r#"{"step":3,"ki"#,
        ];
        fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(lines_before(&path, 2).unwrap().lines().collect::<Vec<_>>(), &lines[..4]);
        assert_eq!(lines_before(&path, 0).unwrap(), "");
    }
}
