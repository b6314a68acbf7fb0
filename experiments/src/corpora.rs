//! Where captioned images come from: files, or the Shapes world.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use grpo::Seed;
use grpo_policies::corpus::{self, Caption, Columns, Content, Corpus, Entries, Entry};
use grpo_rewards::shapes::{self, DEFAULT_SIDE};

use crate::failure::{Failure, Outcome};

/// Which corpus.
#[derive(Args)]
pub struct CorpusArgs {
    /// A .tar of img2dataset or a folder of them, .parquet, a .json or .jsonl list, or a folder of SimpleAR's tokens.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// The folder that image paths of a list are relative to; the list's own where absent.
    #[arg(long, value_name = "DIR", requires = "data")]
    image_root: Option<PathBuf>,
    /// Scenes of the Shapes world in place of a corpus; held-out combinations are never among them.
    #[arg(long, value_name = "SCENES", conflicts_with = "data", requires = "n")]
    shapes: Option<Scenes>,
    /// How many scenes.
    #[arg(short, requires = "shapes")]
    n: Option<u64>,
    /// The root of the scenes' randomness.
    #[arg(long, default_value_t = 0, requires = "shapes")]
    shapes_seed: u64,
}

/// Which scenes of the Shapes world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenes {
    /// Anything the world can draw: pretraining.
    Free,
    /// Scenes of the six tasks under their prompts: fine-tuning.
    Tasks,
}

impl CorpusArgs {
    /// Whether a corpus is named.
    pub fn is_given(&self) -> bool {
        self.data.is_some() || self.shapes.is_some()
    }

    /// Opens it.
    pub fn open(&self, columns: &Columns) -> Outcome<Box<dyn Corpus>> {
        match (&self.data, self.shapes, self.n) {
            (Some(path), _, _) => Ok(corpus::open(path, columns, self.image_root.as_deref())?),
            (None, Some(scenes), Some(n)) => Ok(Box::new(Shapes { scenes, n, seed: self.shapes_seed })),
            (None, _, _) => Err(Failure::user("give --data PATH, or --shapes free -n 10000")),
        }
    }
}

/// A corpus of rendered scenes of any size.
struct Shapes {
    scenes: Scenes,
    n: u64,
    seed: u64,
}

impl Shapes {
    fn entry(&self, index: u64) -> Entry {
        let seed = Seed::new(self.seed).named("shapes corpus").fold(index);
        let mut example = shapes::training_example(seed);
        if self.scenes == Scenes::Tasks {
            // Free scenes are a fixed share of the examples: a few further draws find one of a task.
            let tries = (1..64).map(|attempt| shapes::training_example(seed.named("task").fold(attempt)));
            example = std::iter::once(example.clone()).chain(tries).find(|e| e.metadata.is_some()).unwrap_or(example);
        }
        Entry {
            name: format!("shapes/{index:08}"),
            content: Content::Picture(shapes::render(&example.scene, DEFAULT_SIDE)),
            caption: Caption { lines: vec![example.captions.short, example.captions.long] },
        }
    }
}

impl Corpus for Shapes {
    fn identity(&self) -> String {
        format!("shapes {:?}, {} scenes, seed {}", self.scenes, self.n, self.seed)
    }

    fn n_entries(&self) -> Option<u64> {
        Some(self.n)
    }

    fn entries(&self, first: u64) -> grpo::Result<Entries<'_>> {
        Ok(Box::new((first..self.n).map(|index| Ok(Ok(self.entry(index))))))
    }
}
