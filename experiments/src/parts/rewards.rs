//! Rewards from their names, and scorers from the places that flags give.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use grpo::{BoxError, Changed, Gated, Joined, Reward, RewardSet};
use grpo_rewards::clip::ClipReward;
use grpo_rewards::evaluation::sha256;
use grpo_rewards::geneval::{Detection, Detector, GenEval};
use grpo_rewards::onnx::{Cuda, OnnxReward, OpenVino, OpenVinoPrecision, Provider, SessionOptions};
use grpo_rewards::process::{ProcessConfig, ProcessDetector, ProcessLimits, ProcessReward};
use grpo_rewards::remote::{HttpConfig, HttpDetector, HttpReward};
use grpo_rewards::shapes::ShapesDetector;
use grpo_rewards::{Brightness, JpegCompressibility, Random};
use image::RgbImage;
use serde::Deserialize;

use crate::config::{self, GateFile, RewardSource, Weighed};
use crate::failure::{Failure, Outcome};

/// Where scorers are, and what they compute on.
#[derive(Args)]
pub struct ScorerArgs {
    /// Where a reward's scorer is: a folder with a reward.toml, http://127.0.0.1:PORT/PATH, or exec:PROGRAM ARGUMENTS; may
    /// be given again. `clip=DIR` and `hps=DIR` take the place of the embedded miniatures.
    #[arg(long = "scorer", value_name = "NAME=WHERE", value_parser = named)]
    scorers: Vec<(String, String)>,
    /// A TOML file of scorers with every setting: [[scorers]] and then folder, http or process.
    #[arg(long, value_name = "FILE")]
    scorers_file: Option<PathBuf>,
    #[command(flatten)]
    provider: ProviderArgs,
}

/// What ONNX networks compute on.
#[derive(Args)]
pub struct ProviderArgs {
    /// What ONNX networks of folders compute on: cpu, openvino, openvino-bf16, cuda or cuda:N.
    #[arg(long, value_name = "PROVIDER", default_value = "cpu", value_parser = provider)]
    provider: Provider,
}

impl ProviderArgs {
    /// With all cores.
    pub fn options(&self) -> SessionOptions {
        SessionOptions { provider: self.provider.clone(), ..SessionOptions::default() }
    }

    /// An error where no network of a folder is there to compute on it.
    pub fn check_used(&self, used: bool) -> Outcome<()> {
        match used || self.provider == Provider::Cpu {
            true => Ok(()),
            false => Err(Failure::user(
                "--provider has no say: no network of a folder is asked, embedded ones compute on the CPU and other \
                 programs where they are; leave it out",
            )),
        }
    }
}

fn named(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, place)| !name.is_empty() && !place.is_empty());
    let (name, place) = pair.ok_or("give NAME=WHERE, such as ocr=models/ocr")?;
    Ok((name.into(), place.into()))
}

fn provider(text: &str) -> Result<Provider, String> {
    let openvino = |precision| Ok(Provider::Openvino(OpenVino { precision }));
    match text {
        "cpu" => Ok(Provider::Cpu),
        "openvino" => openvino(OpenVinoPrecision::F32),
        "openvino-bf16" => openvino(OpenVinoPrecision::Bf16),
        "cuda" => Ok(Provider::Cuda(Cuda { device: 0 })),
        other => match other.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
            Some(device) => Ok(Provider::Cuda(Cuda { device })),
            None => Err("give cpu, openvino, openvino-bf16, cuda or cuda:N".into()),
        },
    }
}

/// A file of scorers.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScorersFile {
    scorers: Vec<Place>,
}

/// Where a scorer is, with every setting.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Place {
    Folder(FolderPlace),
    Http(HttpConfig),
    Process(ProcessConfig),
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FolderPlace {
    name: String,
    path: PathBuf,
    provider: Option<Provider>,
}

impl Place {
    fn name(&self) -> &str {
        match self {
            Self::Folder(folder) => &folder.name,
            Self::Http(http) => &http.name,
            Self::Process(process) => &process.name,
        }
    }

    fn of_flag((name, place): &(String, String)) -> Outcome<Self> {
        if place.starts_with("http://") || place.starts_with("https://") {
            return Ok(Self::Http(HttpConfig::new(name, place)));
        }
        let Some(program) = place.strip_prefix("exec:") else {
            return Ok(Self::Folder(FolderPlace { name: name.clone(), path: place.into(), provider: None }));
        };
        let command: Vec<String> = program.split_whitespace().map(String::from).collect();
        match command.is_empty() {
            false => Ok(Self::Process(ProcessConfig { name: name.clone(), command, limits: ProcessLimits::default() })),
            true => {
                Err(Failure::user(format!("--scorer {name}={place}: name a program, such as exec:python3 score.py")))
            }
        }
    }
}

/// What a report says of a scorer.
pub enum Origin<'a> {
    /// A folder, whose files can be named.
    Folder(&'a Path),
    /// Something that runs elsewhere.
    Program(String),
}

/// The scorers that flags gave.
pub struct Scorers {
    places: Vec<Place>,
    provider: Provider,
    /// Those that a reward has asked for; each is opened once, however many rewards name it.
    opened: Mutex<BTreeMap<String, Shared>>,
}

/// A scorer that several rewards may ask.
type Shared = Arc<dyn Reward<RgbImage>>;

impl ScorerArgs {
    /// Reads the flags; nothing is opened yet.
    pub fn scorers(&self) -> Outcome<Scorers> {
        let mut places = self.scorers.iter().map(Place::of_flag).collect::<Outcome<Vec<Place>>>()?;
        if let Some(path) = &self.scorers_file {
            places.extend(config::read::<ScorersFile>(path, &[])?.scorers);
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = places.iter().find(|place| !names.insert(place.name())) {
            return Err(Failure::user(format!("scorer `{}` is given twice; give it once", twice.name())));
        }
        self.provider.check_used(places.iter().any(|place| matches!(place, Place::Folder(_))))?;
        Ok(Scorers { places, provider: self.provider.provider.clone(), opened: Mutex::default() })
    }
}

impl Scorers {
    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.iter().map(Place::name)
    }

    /// A mix of rewards for images.
    pub fn rewards(&self, sources: &[RewardSource]) -> Outcome<RewardSet<RgbImage>> {
        let mut set = RewardSet::new();
        for source in sources {
            set = set.with(self.reward(source)?, source.counts().weight)?;
        }
        if set.is_empty() {
            return Err(Failure::user(
                "rewards is empty; name at least one, such as rewards = [{ clip = { weight = 1.0 } }]",
            ));
        }
        Ok(set)
    }

    /// An error where a scorer was given that none of these asks for: its name is misspelt there or here.
    ///
    /// Nothing is opened, so a mistake is found before a model is loaded.
    pub fn check_all_asked(&self, asked: &BTreeSet<String>, remedy: &str) -> Outcome<()> {
        match self.names().find(|name| !asked.contains(*name)) {
            None => Ok(()),
            Some(name @ ("brightness" | "random" | "compressibility" | "geneval")) => {
                Err(Failure::user(format!("--scorer {name}: that reward is built in; give the scorer another name")))
            }
            Some(name) => Err(Failure::user(format!("nothing asks for the scorer `{name}`; {remedy}"))),
        }
    }

    fn reward(&self, source: &RewardSource) -> Outcome<Box<dyn Reward<RgbImage>>> {
        let plain: Box<dyn Reward<RgbImage>> = match source {
            RewardSource::Clip(_) => match self.place("clip") {
                Some(place) => Box::new(self.shared(place)?),
                None => Box::new(ClipReward::tiny()?),
            },
            RewardSource::Hps(_) => match self.place("hps") {
                Some(place) => Box::new(self.shared(place)?),
                None => Box::new(ClipReward::tiny_hps()?),
            },
            RewardSource::Geneval(_) => Box::new(GenEval::new(ShapesDetector::new())),
            RewardSource::Brightness(_) => Box::new(Brightness),
            RewardSource::Random(_) => Box::new(Random),
            RewardSource::Compressibility(_) => Box::new(JpegCompressibility),
            RewardSource::Given(given) => Box::new(self.given(&given.name)?),
            RewardSource::Joined(joined) => {
                let parts = joined.of.iter().map(|part| self.reward(part)).collect::<Outcome<Vec<_>>>()?;
                Box::new(Joined::new(&joined.name, parts, joined.by)?)
            }
        };
        self.counted(plain, source.counts())
    }

    /// The reward after its changes, behind its gate.
    fn counted(&self, plain: Box<dyn Reward<RgbImage>>, counts: &Weighed) -> Outcome<Box<dyn Reward<RgbImage>>> {
        let changed = match counts.changes.as_slice() {
            [] => plain,
            changes => Box::new(Changed::new(plain, changes.to_vec())?),
        };
        let Some(GateFile { reward, at_least, otherwise }) = counts.gate.as_deref() else { return Ok(changed) };
        Ok(Box::new(Gated::new(changed, self.reward(reward)?, *at_least, *otherwise)?))
    }

    /// The scorer that a flag gave under this name.
    pub fn given(&self, name: &str) -> Outcome<Shared> {
        match self.place(name) {
            Some(place) => self.shared(place),
            None => Err(Failure::user(format!("reward `{name}` has no scorer; give --scorer {name}=WHERE"))),
        }
    }

    /// Where the scorer of this name is: its folder, or an address or a program as text.
    pub fn origin(&self, name: &str) -> Option<Origin<'_>> {
        self.places.iter().find(|place| place.name() == name).map(|place| match place {
            Place::Folder(folder) => Origin::Folder(&folder.path),
            Place::Http(http) => Origin::Program(http.url.clone()),
            Place::Process(process) => Origin::Program(process.command.join(" ")),
        })
    }

    /// What each scorer is: of a folder the checksum of its reward.toml, which lists those of its files; else where it runs.
    pub fn origins(&self) -> Outcome<BTreeMap<String, String>> {
        let origin = |name: &str| match self.origin(name) {
            Some(Origin::Folder(folder)) => sha256(&folder.join("reward.toml")).map(|sum| format!("reward.toml {sum}")),
            Some(Origin::Program(program)) => Ok(program),
            None => Ok(String::new()),
        };
        self.names().map(|name| Ok((name.to_string(), origin(name)?))).collect()
    }

    fn place(&self, name: &str) -> Option<&Place> {
        self.places.iter().find(|place| place.name() == name)
    }

    fn shared(&self, place: &Place) -> Outcome<Shared> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(scorer) = opened.get(place.name()) {
            return Ok(Arc::clone(scorer));
        }
        let scorer = self.open(place)?;
        opened.insert(place.name().into(), Arc::clone(&scorer));
        Ok(scorer)
    }

    fn open(&self, place: &Place) -> Outcome<Shared> {
        Ok(match place {
            Place::Folder(FolderPlace { name, path, provider }) => {
                let provider = provider.clone().unwrap_or_else(|| self.provider.clone());
                Arc::new(folder(name, path, provider)?)
            }
            Place::Http(http) => Arc::new(HttpReward::new(http.clone())?),
            Place::Process(process) => Arc::new(ProcessReward::new(process.clone())?),
        })
    }
}

/// A detector in another program.
pub struct RemoteDetector {
    place: String,
    program: Program,
}

enum Program {
    Http(HttpDetector),
    Process(ProcessDetector),
}

impl RemoteDetector {
    /// Starts the program or prepares the connection that `remote=WHERE` names.
    pub fn of_flag(place: &str) -> Outcome<Self> {
        let program = match Place::of_flag(&("remote".into(), place.into()))? {
            Place::Http(http) => Program::Http(HttpDetector::new(http)?),
            Place::Process(process) => Program::Process(ProcessDetector::new(process)?),
            Place::Folder(_) => {
                return Err(Failure::user(format!(
                    "--detector remote={place}: give http://127.0.0.1:PORT/PATH or exec:PROGRAM ARGUMENTS; a folder is \
                     mask2former=DIR or centernet=DIR"
                )));
            }
        };
        Ok(Self { place: place.into(), program })
    }
}

impl Detector for RemoteDetector {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        match &self.program {
            Program::Http(http) => http.detect(image),
            Program::Process(process) => process.detect(image),
        }
    }
}

/// Where it is and what it calls itself.
impl fmt::Display for RemoteDetector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scorer = match &self.program {
            Program::Http(http) => http.scorer(),
            Program::Process(process) => process.scorer(),
        };
        write!(f, "{} ({})", self.place, scorer.as_deref().unwrap_or("never answered"))
    }
}

/// The reward of a folder, which must bear the name it is asked for by: logs of two rewards are not to be mixed up.
fn folder(name: &str, path: &Path, provider: Provider) -> Outcome<OnnxReward> {
    let reward = OnnxReward::load(path, &SessionOptions { provider, ..SessionOptions::default() })?;
    match reward.name() {
        own if own == name => Ok(reward),
        own => Err(Failure::user(format!(
            "{}: the reward there is named `{own}`, not `{name}`; give --scorer {own}={} and name it so in the \
             configuration, or change its reward.toml",
            path.display(),
            path.display()
        ))),
    }
}
