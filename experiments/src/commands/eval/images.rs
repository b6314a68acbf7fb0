//! `grpo eval geneval --images`, `dpg` and `hps`: benchmarks on folders of any model's images.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clap::{Args, ValueEnum};
use grpo::BoxError;
use grpo_rewards::clip::ClipReward;
use grpo_rewards::detectors::{CenterNet, ClipColors, Colored, Mask2Former};
use grpo_rewards::evaluation::Report;
use grpo_rewards::geneval::{
    Benchmark, COLORS, Detection, Detector, GenEval, ImageVerdict, RecordedDetections, Rules, Sample, Verdict,
    object_names,
};
use grpo_rewards::{dpg, hps_benchmark};
use image::RgbImage;

use super::report::{ReportArgs, name_file, name_folder};
use crate::commands::{progress, tell};
use crate::failure::{Failure, Outcome};
use crate::parts::{Origin, ProviderArgs, RemoteDetector, ScorerArgs};

/// A folder of images under GenEval's rules, in place of a policy.
#[derive(Args)]
pub struct FolderArgs {
    /// Judge images that are there, DIR/00000/metadata.jsonl with DIR/00000/samples/0000.png, and no policy.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["policy", "device", "n", "seed", "panel", "LawArgs"])]
    pub images: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
    /// A CLIP of rewards/export/export_clip.py that names the colours of objects; ViT-L-14 in the paper.
    #[arg(long, value_name = "DIR", requires = "images")]
    colors: Option<PathBuf>,
    /// Drop boxes that overlap a better one of their class by this share; off in the paper.
    #[arg(long, value_name = "SHARE", requires = "images", value_parser = share)]
    max_overlap: Option<f64>,
    #[command(flatten)]
    provider: ProviderArgs,
    /// A JSON line for each image with its verdict and reason, as the original's results.jsonl.
    #[arg(long, value_name = "FILE", requires = "images")]
    results: Option<PathBuf>,
}

/// What finds the objects.
#[derive(Args)]
#[group(multiple = false)]
struct SourceArgs {
    /// Detections of another program: a JSON line {"image", "detections": [{"class", "score", "bbox", "color"}]} each.
    #[arg(long, value_name = "FILE", requires = "images")]
    detections: Option<PathBuf>,
    /// What finds objects: mask2former=DIR (the paper's), centernet=DIR, or remote=WHERE, a server http://127.0.0.1:PORT/PATH
    /// or a program exec:PROGRAM ARGUMENTS that answers with detections.
    #[arg(long, value_name = "NAME=WHERE", requires = "images", value_parser = detector)]
    detector: Option<(DetectorName, String)>,
}

/// The networks that `--detector` knows.
#[derive(Clone, Copy, ValueEnum)]
enum DetectorName {
    Mask2former,
    Centernet,
    Remote,
}

fn detector(text: &str) -> Result<(DetectorName, String), String> {
    let (name, place) = text.split_once('=').ok_or("give NAME=WHERE, such as centernet=models/centernet")?;
    Ok((DetectorName::from_str(name, false)?, place.into()))
}

fn share(text: &str) -> Result<f64, String> {
    let share: Option<f64> = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "give a share from 0 to 1".into())
}

/// A detector, and the names it used that no rule of GenEval's can match.
struct Watched<'a, D: ?Sized> {
    detector: &'a D,
    strange: &'a Mutex<BTreeMap<String, usize>>,
}

impl<D: Detector + ?Sized> Detector for Watched<'_, D> {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        let found = self.detector.detect(image)?;
        let mut strange = self.strange.lock().unwrap_or_else(PoisonError::into_inner);
        for Detection { class, color, .. } in &found {
            let color = color.as_deref().filter(|color| !COLORS.contains(color));
            let class = Some(class.as_str()).filter(|class| !object_names().any(|name| name == *class));
            for name in class.into_iter().chain(color) {
                *strange.entry(name.into()).or_default() += 1;
            }
        }
        Ok(found)
    }

    fn classify_colors(&self, image: &RgbImage, objects: &mut [Detection]) -> Result<(), BoxError> {
        self.detector.classify_colors(image, objects)
    }
}

/// Where boxes and colours come from.
struct Judge {
    source: Source,
    colors: Option<ClipColors>,
    rules: Rules,
    strange: Mutex<BTreeMap<String, usize>>,
}

enum Source {
    Recorded(RecordedDetections),
    Network(Box<dyn Detector>),
    Remote(Box<RemoteDetector>),
}

impl Judge {
    fn verdict(&self, sample: Sample<'_>) -> Result<Verdict, BoxError> {
        match &self.source {
            Source::Recorded(recorded) => self.verdict_of(&recorded.of(sample.name)?, sample),
            Source::Network(network) => self.verdict_of(&**network, sample),
            Source::Remote(remote) => self.verdict_of(&**remote, sample),
        }
    }

    fn verdict_of(
        &self,
        detector: &(impl Detector + ?Sized),
        Sample { metadata, image, .. }: Sample<'_>,
    ) -> Result<Verdict, BoxError> {
        let detector = Watched { detector, strange: &self.strange };
        match &self.colors {
            None => GenEval::new(detector).with_rules(self.rules).verdict(metadata, image),
            Some(colors) => {
                GenEval::new(Colored::new(detector, colors)).with_rules(self.rules).verdict(metadata, image)
            }
        }
    }
}

impl FolderArgs {
    /// Judges the folder.
    pub fn run(&self, images: &Path, out: &ReportArgs) -> Outcome<()> {
        let mut models = Report::default();
        let judge = self.judge(&mut models)?;
        let benchmark = Benchmark::read(images)?;
        let bar = progress(benchmark.n_images());
        let (mut report, verdicts) = benchmark.judge(|sample| {
            let verdict = judge.verdict(sample);
            bar.inc(1);
            verdict
        })?;
        bar.finish_and_clear();
        report.models = models.models;
        report.notes.extend(models.notes);
        let strange = judge.strange.into_inner().unwrap_or_else(PoisonError::into_inner);
        let strange: Vec<String> = strange.iter().map(|(name, n)| format!("`{name}` ({n})")).collect();
        if !strange.is_empty() {
            let names = strange.join(", ");
            report.notes.push(format!("detected under names that are none of GenEval's classes or colours: {names}"));
        }
        if let Source::Remote(remote) = &judge.source {
            report.notes.push(format!("detected by {remote}"));
        }
        if let Some(path) = &self.results {
            save_results(path, &verdicts)?;
        }
        out.write(&report)
    }

    fn judge(&self, report: &mut Report) -> Outcome<Judge> {
        let options = self.provider.options();
        let network = |name: &DetectorName| matches!(name, DetectorName::Mask2former | DetectorName::Centernet);
        let with_network = self.source.detector.as_ref().is_some_and(|(name, _)| network(name));
        self.provider.check_used(with_network || self.colors.is_some())?;
        let source = match (&self.source.detections, &self.source.detector) {
            (Some(path), _) => {
                name_file(report, "detections", path)?;
                Source::Recorded(RecordedDetections::read(path)?)
            }
            (None, Some((DetectorName::Remote, place))) => Source::Remote(Box::new(RemoteDetector::of_flag(place)?)),
            (None, Some((DetectorName::Mask2former, folder))) => {
                let network = Mask2Former::load(Path::new(folder), &options)?;
                name_folder(report, "detector", Path::new(folder))?;
                Source::Network(Box::new(network))
            }
            (None, Some((DetectorName::Centernet, folder))) => {
                let network = CenterNet::load(Path::new(folder), &options)?;
                name_folder(report, "detector", Path::new(folder))?;
                report.notes.push("CenterNet is not the published detector; its number does not compare".into());
                Source::Network(Box::new(network))
            }
            (None, None) => {
                let remedy =
                    "--images needs --detections FILE, or --detector mask2former=DIR, centernet=DIR or remote=WHERE";
                return Err(Failure::user(remedy));
            }
        };
        let colors = match &self.colors {
            None => None,
            Some(folder) => {
                let clip = ClipReward::load_with(folder, &options)?;
                name_folder(report, "colors", folder)?;
                Some(ClipColors::new(clip))
            }
        };
        let rules = Rules { max_overlap: self.max_overlap };
        Ok(Judge { source, colors, rules, strange: Mutex::default() })
    }
}

fn save_results(path: &Path, verdicts: &[ImageVerdict]) -> Outcome<()> {
    let failed = |error| grpo::Error::file(path, error);
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).map_err(failed)?);
    for verdict in verdicts {
        let line = serde_json::to_string(verdict).map_err(anyhow::Error::from)?;
        writeln!(file, "{line}").map_err(failed)?;
    }
    file.flush().map_err(failed)?;
    tell(&format!("results {}", path.display()));
    Ok(())
}

/// DPG-Bench: questions about the pictures of long prompts.
#[derive(Args)]
pub struct Dpg {
    /// Files named by their item, such as partiprompts97.png, each with the prompt's pictures in two columns.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The table of questions, dpg_bench.csv.
    #[arg(long, value_name = "FILE")]
    csv: PathBuf,
    /// Answers of a model: a JSON line {"image", "crop", "question", "answer"} each.
    #[arg(long, value_name = "FILE", required_unless_present = "vqa")]
    answers: Option<PathBuf>,
    /// The NAME of a --scorer that answers: it is asked with the question as its prompt, and above 0.5 is "yes".
    #[arg(long, value_name = "NAME", conflicts_with = "answers")]
    vqa: Option<String>,
    #[command(flatten)]
    scorers: ScorerArgs,
    /// As the published program counts, or without its faults.
    #[arg(long, value_enum, default_value_t = DpgMode::Official)]
    mode: DpgMode,
    /// The side of one picture in pixels; 1024 for SimpleAR.
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=8192))]
    resolution: u32,
    /// Pictures in a file, 1 to 4.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pictures: usize,
    #[command(flatten)]
    out: ReportArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum DpgMode {
    Official,
    Fixed,
}

impl Dpg {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let mode = match self.mode {
            DpgMode::Official => dpg::Mode::Official,
            DpgMode::Fixed => dpg::Mode::Fixed,
        };
        let settings = dpg::Settings { mode, n_pictures: self.pictures, resolution: self.resolution };
        let questions = dpg::Questions::read(&self.csv, mode)?;
        let vqa = self.vqa()?;
        let benchmark = dpg::Benchmark::read(&self.images, questions, settings)?;
        let bar = progress(benchmark.n_images());
        let mut report = benchmark.judge(vqa.as_ref(), || bar.inc(1));
        bar.finish_and_clear();
        name_file(&mut report, "questions", &self.csv)?;
        if let Some(path) = &self.answers {
            name_file(&mut report, "answers", path)?;
        }
        if let Some(name) = &self.vqa {
            report.notes.push(format!("answered by the scorer `{name}`, not by mPLUG-large"));
            match self.scorers.scorers()?.origin(name) {
                Some(Origin::Folder(folder)) => name_folder(&mut report, name, folder)?,
                Some(Origin::Program(program)) => report.notes.push(format!("scorer `{name}`: {program}")),
                None => {}
            }
        }
        self.out.write(&report)
    }

    /// Who answers.
    fn vqa(&self) -> Outcome<Box<dyn dpg::Vqa>> {
        let scorers = self.scorers.scorers()?;
        scorers.check_all_asked(&self.vqa.iter().cloned().collect(), "ask it by --vqa NAME")?;
        let vqa: Box<dyn dpg::Vqa> = match (&self.answers, &self.vqa) {
            (Some(path), _) => Box::new(dpg::RecordedAnswers::read(path)?),
            (None, Some(name)) => Box::new(dpg::ScoredAnswers(scorers.given(name)?)),
            (None, None) => {
                return Err(Failure::user("dpg needs --answers FILE, or --vqa NAME and --scorer NAME=WHERE"));
            }
        };
        Ok(vqa)
    }
}

/// The HPSv2 benchmark: the mean score of each style.
#[derive(Args)]
pub struct Hps {
    /// A folder for each style, such as DIR/anime/00000.jpg.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The prompts of each style as a list of texts, such as DIR/anime.json.
    #[arg(long, value_name = "DIR")]
    prompts: PathBuf,
    /// The scorer's folder, made by rewards/export/export_clip.py --hps.
    #[arg(long, value_name = "DIR")]
    reward: PathBuf,
    #[command(flatten)]
    provider: ProviderArgs,
    #[command(flatten)]
    out: ReportArgs,
}

impl Hps {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let benchmark = hps_benchmark::Benchmark::read(&self.images, &self.prompts)?;
        let reward = ClipReward::load_with(&self.reward, &self.provider.options())?;
        let bar = progress(benchmark.n_images());
        let mut report = benchmark.judge(&reward, |n| bar.inc(n as u64));
        bar.finish_and_clear();
        name_folder(&mut report, "reward", &self.reward)?;
        self.out.write(&report)
    }
}
