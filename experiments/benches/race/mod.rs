//! Contenders of a bench: processes of their own that do one lap when told, so that each has its own memory and threads,
//! and all take turns on the same minutes of the machine.
//!
//! The protocol is lines: a contender says `ready`; to `go` it answers with a [`Lap`], to `end` with an [`End`].

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One lap.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Lap {
    /// Of the clock.
    pub seconds: f64,
    /// What was computed, for comparing contenders.
    pub value: Vec<f64>,
}

/// The last word of a contender.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct End {
    /// The most memory that was resident.
    pub peak_bytes: f64,
}

/// A process that runs laps.
pub struct Contender {
    name: String,
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Contender {
    /// Starts it and waits until it is ready.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context(name.to_string())?;
        let questions = process.stdin.take().context("no pipe to a contender")?;
        let answers = BufReader::new(process.stdout.take().context("no pipe from a contender")?);
        let mut contender = Self { name: name.into(), process, questions, answers };
        let line = contender.line()?;
        ensure!(line == "ready", "{name} said `{line}`");
        Ok(contender)
    }

    /// One lap.
    pub fn lap(&mut self) -> Result<Lap> {
        self.ask("go")
    }

    /// Ends it.
    pub fn end(mut self) -> Result<End> {
        self.ask("end")
    }

    fn ask<T: DeserializeOwned>(&mut self, question: &str) -> Result<T> {
        writeln!(self.questions, "{question}")?;
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("{} said `{line}`", self.name))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "{} ended; its last words are above", self.name);
        Ok(line.trim().to_string())
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // Whoever has ended already needs no ending.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Laps of all contenders in turns, `[contender][round]`, after one that does not count.
pub fn race(contenders: &mut [Contender], rounds: usize) -> Result<Vec<Vec<Lap>>> {
    let mut laps = vec![Vec::new(); contenders.len()];
    for round in 0..=rounds {
        for (contender, laps) in contenders.iter_mut().zip(&mut laps) {
            let lap = contender.lap()?;
            if round > 0 {
                laps.push(lap);
            }
        }
    }
    Ok(laps)
}

/// The median; the lower of two in the middle.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// How many times as long the other takes: the median over rounds, each of which compares two laps of the same moment.
pub fn speed(ours: &[Lap], other: &[Lap]) -> f64 {
    median(ours.iter().zip(other).map(|(ours, other)| other.seconds / ours.seconds))
}

/// Answers the protocol's lines until the end.
pub fn serve(mut lap: impl FnMut() -> Result<Lap>) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "go" => writeln!(out, "{}", serde_json::to_string(&lap()?)?)?,
            _ => break,
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
    let end = End { peak_bytes: 1024.0 * kilobytes.unwrap_or(f64::NAN) };
    Ok(writeln!(out, "{}", serde_json::to_string(&end)?)?)
}
