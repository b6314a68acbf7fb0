//! What follows `cargo bench … --`: words, and flags that all benches know.

use anyhow::{Context, Result, bail};
use candle_core::Device;

/// The command line of a bench.
pub struct Arguments {
    /// What is no flag.
    pub words: Vec<String>,
    /// `--log`: the table goes into LOG.md.
    pub log: bool,
    /// `--device cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// `--memory GB`: cases that need more are left out.
    pub memory_gb: f64,
}

/// What a machine of 16 GB has to give.
const MEMORY_GB: f64 = 14.0;

impl Arguments {
    /// Those of this process.
    pub fn read() -> Result<Self> {
        let mut read = Self { words: Vec::new(), log: false, device: "cpu".into(), memory_gb: MEMORY_GB };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--log" => read.log = true,
                "--device" => read.device = value()?,
                "--memory" => read.memory_gb = value()?.parse().context("--memory is a number of GB")?,
                // Cargo says it to every bench.
                "--bench" => {}
                flag if flag.starts_with("--") => bail!("no flag {flag}; there are --log, --device and --memory"),
                word => read.words.push(word.into()),
            }
        }
        Ok(read)
    }

    /// Those of `all` that are named, or all where none is.
    pub fn chosen<'a>(&self, all: &[&'a str]) -> Vec<&'a str> {
        let named: Vec<&str> = all.iter().copied().filter(|name| self.words.iter().any(|word| word == name)).collect();
        if named.is_empty() { all.to_vec() } else { named }
    }

    /// An error where a word is none of these.
    pub fn check(&self, known: &[&[&str]]) -> Result<()> {
        match self.words.iter().find(|word| !known.iter().any(|names| names.contains(&word.as_str()))) {
            Some(word) => bail!("`{word}` is none of {known:?}"),
            None => Ok(()),
        }
    }
}

/// The device of a name, as the command's `--device`.
pub fn device(name: &str) -> Result<Device> {
    let ordinal = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
    };
    let ordinal = ordinal.with_context(|| format!("--device {name}: give cpu, cuda or cuda:N"))?;
    Device::new_cuda(ordinal).with_context(|| format!("--device {name}; a build for it has --features cuda"))
}
