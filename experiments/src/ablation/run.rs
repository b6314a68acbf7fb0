//! The runs of an ablation, in turn or several at a time.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use grpo::{BoxError, Error, Policy, Result, RunFolder, Trainer, write_whole};
use serde::{Deserialize, Serialize};

use super::progress::{Progress, Watch};
use super::{Ablation, Cell, Plan};

/// The mark of a run that is over: written last.
const FINISHED: &str = "finished";

/// An ablation whose runs are over.
#[derive(Debug)]
pub struct Finished {
    /// The folder of all its runs.
    pub folder: PathBuf,
    /// Runs that stopped with an error; the others are whole.
    pub failed: Vec<Failed>,
}

/// A run that stopped with an error.
#[derive(Debug)]
pub struct Failed {
    /// Its arm.
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// Why it stopped.
    pub error: String,
}

/// What a caller's `make` gives: a trainer before its first step, and what its run is as TOML, with a key `n_steps`, as
/// [`TrainConfig::to_toml`](grpo::TrainConfig::to_toml) has it.
pub type Made<P> = Result<(Trainer<P>, String), BoxError>;

impl Finished {
    /// An error that names the runs that failed, where there are any.
    pub fn check(&self) -> Result<()> {
        let Some(first) = self.failed.first() else { return Ok(()) };
        let named: Vec<String> = self.failed.iter().map(|run| format!("{}/{}", run.arm, run.seed)).collect();
        Err(Error::file(
            &self.folder,
            format!(
                "{} runs failed ({}), the first with: {}; run the same command again to go on with them",
                named.len(),
                named.join(", "),
                first.error
            ),
        ))
    }
}

impl<A: Serialize + Sync> Ablation<A> {
    /// Trains every arm under every seed into `{root}/{name}/{arm}/{seed}`.
    ///
    /// Runs that are finished are left alone and one that was broken off is gone on with, so that an ablation that was
    /// killed is started again with the same call. Seeds are the outer loop: the first of them compares all arms. `make` gives
    /// the trainer of a run, without a record; `done` is called with the trained policy, before the run is marked as
    /// finished. A run that fails does not stop the others.
    pub fn run<P: Policy>(
        &self,
        root: &Path,
        make: impl Fn(&Cell<'_, A>) -> Made<P> + Sync,
        done: impl Fn(&Cell<'_, A>, &RunFolder, &P) -> Result<(), BoxError> + Sync,
    ) -> Result<Finished> {
        let plan = Plan::of(self)?;
        let folder = root.join(&self.name);
        fs::create_dir_all(&folder).map_err(|error| Error::file(&folder, error))?;
        let _lock = lock(&folder)?;
        plan.joined(&folder)?.write(&folder)?;
        let arms = || self.arms.iter().filter(|arm| self.only.is_empty() || self.only.contains(&arm.name));
        let cells: Vec<Cell<'_, A>> =
            self.seeds.iter().flat_map(|&seed| arms().map(move |arm| Cell { arm, seed })).collect();
        let open: Vec<&Cell<'_, A>> =
            cells.iter().filter(|cell| !cell.folder(&folder).join(FINISHED).exists()).collect();
        let progress = Arc::new(Progress::new(cells.len(), cells.len() - open.len()));
        let work = Work { folder: &folder, make, done, progress };
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let in_turn = || {
            while let Some(cell) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
                let failure = work.on(cell);
                failed.lock().unwrap_or_else(PoisonError::into_inner).extend(failure);
            }
        };
        std::thread::scope(|scope| {
            (1..self.at_once.min(open.len())).for_each(|_| drop(scope.spawn(in_turn)));
            in_turn();
        });
        work.progress.close();
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Finished { folder, failed })
    }
}

impl<A> Cell<'_, A> {
    fn label(&self) -> String {
        format!("{}/{}", self.arm.name, self.seed)
    }

    /// The folder of this run below that of the ablation.
    fn folder(&self, ablation: &Path) -> PathBuf {
        ablation.join(&self.arm.name).join(self.seed.to_string())
    }
}

/// How each run is made.
struct Work<'a, Make, Done> {
    /// The ablation's.
    folder: &'a Path,
    make: Make,
    done: Done,
    progress: Arc<Progress>,
}

impl<Make, Done> Work<'_, Make, Done> {
    /// Makes one run, tells of its end, and gives its failure.
    fn on<A, P: Policy>(&self, cell: &Cell<'_, A>) -> Option<Failed>
    where
        Make: Fn(&Cell<'_, A>) -> Made<P>,
        Done: Fn(&Cell<'_, A>, &RunFolder, &P) -> Result<(), BoxError>,
    {
        let clock = Instant::now();
        let watch = Watch::new(&self.progress, cell.label());
        match self.run(cell, &watch) {
            Ok(()) => {
                watch.end(&format!("{:.0} s", clock.elapsed().as_secs_f64()));
                None
            }
            Err(error) => {
                watch.end(&format!("FAILED: {error}"));
                Some(Failed { arm: cell.arm.name.clone(), seed: cell.seed, error: error.to_string() })
            }
        }
    }

    fn run<A, P: Policy>(&self, cell: &Cell<'_, A>, watch: &Watch) -> Result<(), BoxError>
    where
        Make: Fn(&Cell<'_, A>) -> Made<P>,
        Done: Fn(&Cell<'_, A>, &RunFolder, &P) -> Result<(), BoxError>,
    {
        let folder = cell.folder(self.folder);
        let run = match folder.join("metrics.jsonl").exists() {
            true => RunFolder::open(&folder)?,
            false => RunFolder::create(self.folder, &cell.arm.name, cell.seed)?,
        };
        let (trainer, config) = (self.make)(cell)?;
        let n_steps = n_steps(&config)?;
        let mut trainer = trainer.record_quietly_in(&run, &config)?.observe(watch.clone());
        watch.begin_at(trainer.n_done(), n_steps);
        trainer.run()?;
        (self.done)(cell, &run, trainer.policy())?;
        Ok(write_whole(&folder.join(FINISHED), b"")?)
    }
}

/// The steps of a run by its TOML, which tell whether it is whole.
pub(crate) fn n_steps(config: &str) -> Result<usize> {
    #[derive(Deserialize)]
    struct Length {
        n_steps: usize,
    }
    let length: Result<Length, _> = toml::from_str(config);
    length.map(|length| length.n_steps).map_err(|error| {
        Error::config(format!("the run's TOML: {}; give a key n_steps, as TrainConfig::to_toml does", error.message()))
    })
}

/// Holds the folder for this process, until it is dropped.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = File::create(&path).map_err(|error| Error::file(&path, error))?;
    match file.try_lock() {
        // Where there are no locks, nobody can be kept out.
        Err(TryLockError::Error(error)) if error.kind() != ErrorKind::Unsupported => Err(Error::file(&path, error)),
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let remedy = "wait for it, or choose another folder with --out";
            Err(Error::file(&path, format!("another process runs this ablation; {remedy}")))
        }
    }
}
