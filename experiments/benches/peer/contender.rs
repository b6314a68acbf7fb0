//! Both ends of the line protocol between a bench and a contender; peers/protocol.py is a peer's end in Python.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a contender says of a lap.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lap {
    /// The seconds of what is timed, without the making of `value`.
    pub seconds: f64,
    /// Numbers to compare with those of another contender.
    pub value: Vec<f64>,
}

/// What a contender says last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// The most memory that the process has held.
    pub peak_bytes: f64,
    /// What else it measured, by name.
    #[serde(default)]
    pub notes: BTreeMap<String, f64>,
}

/// A child process that runs a lap whenever it is told to.
pub struct Contender {
    name: String,
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Contender {
    /// Starts the program and waits until it says that it is ready.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = piped.spawn().with_context(|| format!("{name}: {piped:?}"))?;
        let questions = process.stdin.take().with_context(|| format!("no pipe to {name}"))?;
        let answers = BufReader::new(process.stdout.take().with_context(|| format!("no pipe from {name}"))?);
        let mut contender = Self { name: name.into(), process, questions, answers };
        let ready = contender.line()?;
        ensure!(ready == "ready", "{name} said `{ready}`");
        Ok(contender)
    }

    /// A Python program of benches/peers.
    pub fn start_peer(python: &str, program: &str, arguments: &[String]) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers").join(program);
        Self::start(program, Command::new(python).arg(path).args(arguments))
    }

    /// This very program, given `worker` and the arguments.
    pub fn start_worker(arguments: &[String]) -> Result<Self> {
        // Candle's second pool spins; .cargo/config.toml says why it has one thread wherever cargo starts us.
        Self::start_with(arguments, 1)
    }

    /// The same with so many threads in candle's second pool, which has the element-wise work of whatever is not ours.
    pub fn start_with(arguments: &[String], candle_threads: usize) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("worker").args(arguments).env("RAYON_NUM_THREADS", super::THREADS.to_string());
        Self::start("our worker", command.env("CANDLE_NUM_THREADS", candle_threads.to_string()))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "{} ended; its last words are above", self.name);
        Ok(line.trim().to_string())
    }

    /// What it answers to a line.
    pub fn ask<T: DeserializeOwned>(&mut self, question: &str) -> Result<T> {
        writeln!(self.questions, "{question}").with_context(|| format!("{} ended", self.name))?;
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("{} said `{line}` to `{question}`", self.name))
    }

    /// One lap.
    pub fn lap(&mut self) -> Result<Lap> {
        self.ask("go")
    }

    /// Lets it end by itself.
    pub fn end(mut self) -> Result<End> {
        let end = self.ask("end")?;
        let status = self.process.wait()?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(end)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // Whoever has ended already needs no ending.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The worker's end: runs `lap` whenever it is asked to, and says at last what `end` makes of the peak.
pub fn serve(mut lap: impl FnMut() -> Result<Lap>, end: impl FnOnce(f64) -> End) -> Result<()> {
    let say = |text: String| -> Result<()> {
        let mut out = stdout().lock();
        writeln!(out, "{text}")?;
        Ok(out.flush()?)
    };
    say("ready".into())?;
    for line in stdin().lines() {
        match line?.as_str() {
            "go" => say(serde_json::to_string(&lap()?)?)?,
            "end" => return say(serde_json::to_string(&end(peak_bytes()?))?),
            other => bail!("`{other}` is neither `go` nor `end`"),
        }
    }
    Ok(())
}

/// The most memory that this process has held, loading included.
fn peak_bytes() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"));
    let kilobytes: f64 = peak.context("/proc/self/status has no VmHWM")?.trim().parse()?;
    Ok(kilobytes * 1024.0)
}

/// The cells of two peaks and of their ratio; a peer says how much of its own are libraries, before there is a model.
pub fn peaks(ours: &End, peer: &End) -> [String; 2] {
    let gigabytes = |bytes: f64| format!("{:.2} GB", bytes / 1e9);
    let libraries = peer.notes.get("libraries_bytes").map(|bytes| format!(" (libraries {})", gigabytes(*bytes)));
    let both =
        format!("{}, {}{}", gigabytes(ours.peak_bytes), gigabytes(peer.peak_bytes), libraries.unwrap_or_default());
    [both, format!("{:.2}", peer.peak_bytes / ours.peak_bytes)]
}
