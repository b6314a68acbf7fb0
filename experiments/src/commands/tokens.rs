//! `grpo tokenize` and `grpo detokenize`: images to codes and back, one JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::Args;
use grpo::picture::open_image;
use grpo_policies::cosmos::Cosmos;
use grpo_policies::simplear::shapes_cosmos;
use serde::{Deserialize, Serialize};

use super::{print, progress, tell};
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Which visual tokenizer, and where it computes.
#[derive(Args)]
struct TokenizerArgs {
    /// A visual tokenizer's folder, or a policy's that holds one; the embedded miniature's where absent.
    #[arg(long, value_name = "DIR")]
    cosmos: Option<PathBuf>,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl TokenizerArgs {
    fn load(&self) -> Outcome<Cosmos> {
        let device: Device = parts::device(&self.device)?;
        let Some(folder) = &self.cosmos else { return Ok(shapes_cosmos(&device)?) };
        let inner = folder.join("cosmos");
        Ok(Cosmos::load(if inner.is_dir() { &inner } else { folder }, &device)?)
    }
}

/// Encode images as the codes of a visual tokenizer.
#[derive(Args)]
pub struct Tokenize {
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// PNG, JPEG or WebP files whose sides are multiples of the tokenizer's patch (16 for Cosmos DV8x16x16).
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Where the lines go; standard output where absent.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Decode codes, as `grpo tokenize` and `grpo generate --save-tokens` write them, to PNG files.
#[derive(Args)]
pub struct Detokenize {
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// A file of one JSON object a line with "grid" and "codes".
    tokens: PathBuf,
    /// Where the images go, numbered by line.
    #[arg(long, value_name = "DIR", default_value = "detokenized")]
    out: PathBuf,
}

/// An image's tokens as a line of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenLine {
    /// The file the image is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Rows and columns of codes.
    pub grid: (usize, usize),
    /// Codes in raster order.
    pub codes: Vec<u32>,
}

/// A file of token lines that is being written.
pub struct TokenFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl TokenFile {
    /// An empty file.
    pub fn create(path: &Path) -> Outcome<Self> {
        let file = File::create(path).map_err(|error| grpo::Error::file(path, error))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// Writes a line through to the file, so that nothing is lost where a later image fails.
    pub fn add(&mut self, line: &TokenLine) -> Outcome<()> {
        let text = json(line)?;
        let written = writeln!(self.file, "{text}").and_then(|()| self.file.flush());
        Ok(written.map_err(|error| grpo::Error::file(&self.path, error))?)
    }
}

/// Reads a file of token lines; an error names the line.
pub fn read_tokens(path: &Path) -> Outcome<Vec<TokenLine>> {
    let fault = |message: String| Failure::user(format!("{}: {message}", path.display()));
    let file = File::open(path).map_err(|error| fault(format!("{error}; give a file that `grpo tokenize` wrote")))?;
    let mut lines = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|error| fault(format!("line {}: {error}", number + 1)))?;
        if !line.trim().is_empty() {
            lines.push(serde_json::from_str(&line).map_err(|error| fault(format!("line {}: {error}", number + 1)))?);
        }
    }
    match lines.is_empty() {
        false => Ok(lines),
        true => Err(fault("holds no line of tokens; write it again".into())),
    }
}

fn json(line: &TokenLine) -> Outcome<String> {
    serde_json::to_string(line).map_err(|error| Failure::from(anyhow::Error::from(error)))
}

impl Tokenize {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let cosmos = self.tokenizer.load()?;
        let mut file = self.out.as_deref().map(TokenFile::create).transpose()?;
        let bar = progress(self.images.len());
        for path in &self.images {
            let image = open_image(path)?;
            let grid = cosmos.grid(image.height() as usize, image.width() as usize);
            let grid = grid.map_err(|error| Failure::user(format!("{}: {error}", path.display())))?;
            let codes = cosmos.encode(&[&image])?.into_iter().next().unwrap_or_default();
            let line = TokenLine { image: Some(path.display().to_string()), prompt: None, grid, codes };
            match &mut file {
                Some(file) => file.add(&line)?,
                None => print(&json(&line)?)?,
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }
}

impl Detokenize {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let cosmos = self.tokenizer.load()?;
        let lines = read_tokens(&self.tokens)?;
        std::fs::create_dir_all(&self.out).map_err(|error| grpo::Error::file(&self.out, error))?;
        let bar = progress(lines.len());
        for (number, line) in lines.iter().enumerate() {
            let decoded = cosmos.decode(std::slice::from_ref(&line.codes), line.grid);
            let decoded = decoded
                .map_err(|error| Failure::user(format!("{}: line {}: {error}", self.tokens.display(), number + 1)))?;
            for image in decoded {
                let path = self.out.join(format!("{number:05}.png"));
                image.save(&path).map_err(|error| grpo::Error::file(&path, error))?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        tell(&format!("{} images in {}", lines.len(), self.out.display()));
        Ok(())
    }
}
