//! `grpo tokenize` and `grpo detokenize`: images to codes and back, one JSON object a line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use clap::Args;
use grpo::picture::{self, Transparency};
use grpo_policies::cosmos::Cosmos;
use grpo_policies::simplear::shapes_cosmos;
use grpo_policies::tokens::{self, TokenSet};
use image::RgbImage;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use super::{at_least_one, print, progress, tell};
use crate::config;
use crate::corpora::CorpusArgs;
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

/// Encode a captioned corpus as a folder of tokens that training reads, or some images as one JSON object a line.
#[derive(Args)]
pub struct Tokenize {
    #[command(flatten)]
    tokenizer: TokenizerArgs,
    /// PNG, JPEG or WebP files whose sides are multiples of the tokenizer's patch (16 for Cosmos DV8x16x16), in place of a
    /// corpus.
    #[arg(conflicts_with_all = ["data", "shapes"])]
    images: Vec<PathBuf>,
    #[command(flatten)]
    corpus: CorpusArgs,
    /// How a corpus is cut and filtered: a TOML file, such as experiments/emoji_tokens.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Change one value of the file, such as --set max_bad_share=0.01; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    changes: Vec<String>,
    /// A corpus's folder of tokens; the file of some images' lines, which go to standard output where it is absent.
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Go on with the tokens in that folder.
    #[arg(long)]
    resume: bool,
    /// Threads that decode and crop a corpus's images; as many as there are cores where absent. The tokens are the same.
    #[arg(long, value_parser = at_least_one())]
    threads: Option<usize>,
    /// Images of a corpus that are encoded together. The tokens are the same.
    #[arg(long, default_value_t = 32, value_parser = at_least_one())]
    batch: usize,
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
        match (self.corpus.is_given(), self.images.is_empty()) {
            (true, _) => self.corpus(),
            (false, false) => self.some_images(),
            (false, true) => Err(Failure::user("give images, or a corpus with --data PATH --config FILE --out DIR")),
        }
    }

    /// A folder of tokens.
    fn corpus(self) -> Outcome<()> {
        let (Some(config), Some(out)) = (&self.config, &self.out) else {
            return Err(Failure::user("a corpus needs --config FILE, which says the size, and --out DIR"));
        };
        let settings: tokens::Settings = config::read(config, &self.changes)?;
        let cosmos = self.tokenizer.load()?;
        let corpus = self.corpus.open(&settings.columns)?;
        if out.join(tokens::MANIFEST).exists() && !self.resume {
            let remedy = "pass --resume to go on with it, or choose another --out";
            return Err(Failure::user(format!("{}: the folder already holds tokens; {remedy}", out.display())));
        }
        let was_whole = self.resume && tokens::Manifest::read(out).is_ok_and(|manifest| manifest.complete);
        let n = self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let workers = tokens::Workers { n, batch: self.batch };
        let mut watch = Watch::new(corpus.n_entries());
        let manifest =
            tokens::tokenise((corpus.as_ref(), &settings), &cosmos, out, workers, |reading| watch.see(reading))?;
        watch.bar.finish_and_clear();
        if was_whole {
            TokenSet::verify(&[out])?;
            tell("the tokens were whole already; every file has its checksum");
        }
        tell(&format!("{} rows of {} in {}", manifest.n_rows, manifest.n_read, out.display()));
        tell_skipped(&manifest.skipped);
        if manifest.n_skipped() > 0 {
            tell(&format!("each is named in {}", out.join("skipped.jsonl").display()));
        }
        Ok(())
    }

    /// A line an image.
    fn some_images(self) -> Outcome<()> {
        let cosmos = self.tokenizer.load()?;
        let mut file = self.out.as_deref().map(TokenFile::create).transpose()?;
        let bar = progress(self.images.len());
        for path in &self.images {
            let image = open_opaque(path)?;
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

/// Says what was left out of a corpus.
pub(super) fn tell_skipped(skipped: &BTreeMap<String, u64>) {
    skipped.iter().for_each(|(reason, n)| tell(&format!("left out  {reason} {n}")));
}

/// An image as a corpus's would be read: what is not opaque lies on white.
pub(super) fn open_opaque(path: &Path) -> Outcome<RgbImage> {
    let bytes = std::fs::read(path).map_err(|error| grpo::Error::file(path, error))?;
    Ok(picture::decode(&bytes, Transparency::default()).map_err(|fault| grpo::Error::file(path, fault))?)
}

/// How far the reading of a corpus is, for a person.
struct Watch {
    bar: ProgressBar,
    clock: Instant,
    /// What was read before this process began.
    first: Option<u64>,
    told: u64,
}

impl Watch {
    fn new(n: Option<u64>) -> Self {
        let bar = match n {
            Some(n) => progress(usize::try_from(n).unwrap_or(usize::MAX)),
            None => ProgressBar::new_spinner(),
        };
        Self { bar, clock: Instant::now(), first: None, told: 0 }
    }

    fn see(&mut self, reading: &tokens::Reading) {
        let first = *self.first.get_or_insert(reading.n_read - 1);
        let seconds = self.clock.elapsed().as_secs_f64();
        let speed = (reading.n_read - first) as f64 / seconds.max(1e-3);
        let line = format!("{} kept, {} left out, {speed:.0} images/s", reading.n_rows, reading.n_skipped);
        self.bar.set_position(reading.n_read);
        // Where there is no bar, a line a minute.
        let minute = seconds as u64 / 60;
        if self.bar.is_hidden() && minute > self.told {
            self.told = minute;
            tell(&format!("{} read, {line}", reading.n_read));
        }
        self.bar.set_message(line);
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
