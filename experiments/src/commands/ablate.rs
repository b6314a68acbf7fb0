//! `grpo ablate`: arms × seeds from a TOML file, then their report.

use std::path::PathBuf;

use clap::Args;
use grpo_experiments::report::Options;
use grpo_experiments::{Ablation, Arm, Cell, Report};
use grpo_policies::safetensors_file::Precision;

use super::{ConfigArgs, PartsArgs, at_least_one, tell};
use crate::config::{AblationFile, ArmRun, ArmSetting, RewardSource};
use crate::failure::{Failure, Outcome};

/// Train every arm of an ablation under every seed, from one checkpoint, on the same prompts and draws, and report what
/// differs. Killed, it goes on where it was when the same command is given again.
#[derive(Args)]
pub struct Ablate {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    parts: PartsArgs,
    /// What the file's [quick] leaves: a first look, in a folder of its own.
    #[arg(long)]
    quick: bool,
    /// Only this arm; may be given again.
    #[arg(long = "arm", value_name = "NAME")]
    arms: Vec<String>,
    /// Where runs go: those of an arm to DIR/{ablation}/{arm}/{seed}.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Runs at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    at_once: usize,
    /// Check every arm's configuration, load its parts and say what would be run, then stop.
    #[arg(long)]
    dry_run: bool,
}

impl Ablate {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file = AblationFile::read(&self.config.config, &self.config.changes, self.quick)?;
        let (arms, judges) = file.runs()?;
        let chosen = chosen(&arms, &self.arms)?;
        let parts = self.parts.open(arms.iter().map(|arm| &arm.file))?;
        let n_runs = chosen.len() * file.seeds.len();
        let steps: usize = chosen.iter().map(|arm| arm.file.n_steps * file.seeds.len()).sum();
        let names: Vec<String> = chosen.iter().map(|arm| arm.name.clone()).collect();
        let (name, named) = (&file.name, names.join(", "));
        let mut ablation = Ablation::new(name.clone(), file.seeds.clone())
            .judged_by(judges.iter().map(RewardSource::name))
            .sharing(parts.shared(&judges)?)
            .at_once(self.at_once);
        if let Some(baseline) = &file.baseline {
            ablation = ablation.compared_with(baseline);
        }
        if let Some(evaluation) = &file.evaluation {
            ablation = ablation.evaluated_by(evaluation);
        }
        for arm in arms {
            if self.dry_run {
                parts.paired_trainer(&arm.file).map_err(|failure| failure.of(&format!("arm `{}`", arm.name)))?;
            }
            let setting = ArmSetting::new(arm.file.clone(), parts.scorers_of(&arm.file.rewards)?);
            ablation = ablation.with(Arm { name: arm.name, about: arm.about, setting });
        }
        ablation.check(&self.out)?;
        tell(&format!("{name}: {n_runs} runs of {} arms ({named}), {steps} steps", names.len()));
        if self.dry_run {
            tell("nothing was run");
            return Ok(());
        }
        let make = |cell: &Cell<'_, ArmSetting>| {
            let file = cell.arm.setting.file.under(cell.seed);
            let trainer = parts.paired_trainer(&file).map_err(|failure| failure.to_string())?;
            Ok((trainer, toml::to_string(&file)?))
        };
        let finished = ablation
            .only(names)
            .run(&self.out, make, |_, run, policy| Ok(policy.save(&run.path().join("policy"), Precision::F32)?))?;
        match Report::of(&[&finished.folder], &Options::default()) {
            Ok(report) => super::report::write(&report, &finished.folder.join("report"))?,
            // Where no run is whole, what stopped them is what is to be told.
            Err(error) => return Err(finished.check().err().unwrap_or(error).into()),
        }
        Ok(finished.check()?)
    }
}

/// The arms of these names, or all where none is named.
fn chosen<'a>(arms: &'a [ArmRun], names: &[String]) -> Outcome<Vec<&'a ArmRun>> {
    if let Some(unknown) = names.iter().find(|name| !arms.iter().any(|arm| arm.name == **name)) {
        let known: Vec<&str> = arms.iter().map(|arm| arm.name.as_str()).collect();
        return Err(Failure::user(format!("--arm {unknown}: the arms are {}", known.join(", "))));
    }
    Ok(arms.iter().filter(|arm| names.is_empty() || names.contains(&arm.name)).collect())
}
