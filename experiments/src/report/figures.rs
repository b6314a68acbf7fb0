//! The report's charts: which there are, and what is said below each.

use serde::Serialize;

use super::compare::{ArmReport, Effect, Facts};
use super::plots::{self, Bar, Line};
use super::training::Point;
use crate::intervals::Interval;

/// A chart.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    /// The part of the report it stands in.
    pub(super) part: Part,
    /// Its file's name without the ending.
    pub(super) name: String,
    /// What it is of.
    pub(super) title: String,
    /// What a reader should know of it.
    pub(super) caption: String,
    /// The drawing.
    pub(super) svg: String,
}

/// A part of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Part {
    /// Rises of each reward.
    Effects,
    /// The evaluation by kind of prompt.
    Groups,
    /// What is optimised beside the evaluation.
    Together,
    /// Held-out rewards while training.
    Curves,
    /// Numbers of the training steps.
    Training,
}

/// All charts of a report.
pub(super) fn all(facts: &Facts) -> Vec<Figure> {
    let mut figures = effects(facts);
    figures.extend(groups(facts));
    figures.extend(together(facts));
    figures.extend(curves(facts));
    figures.extend(training(facts));
    for (at, figure) in figures.iter_mut().enumerate() {
        // Two names may differ in what no file's name holds alone.
        figure.name = format!("{:02}_{}", at + 1, figure.name);
    }
    figures
}

fn figure(part: Part, name: &str, (title, caption): (String, String), svg: Option<String>) -> Option<Figure> {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
    let name = name.chars().take(60).map(plain).collect();
    Some(Figure { part, name, title, caption, svg: svg? })
}

/// Bars of those arms that have the interval.
fn bars(facts: &Facts, interval: impl Fn(&ArmReport) -> Option<(Interval, bool)>) -> Vec<Bar> {
    let bar = |(at, arm): (usize, &ArmReport)| {
        let (Interval { mean, low, high }, optimised) = interval(arm)?;
        let mark = if optimised { " *" } else { "" };
        Some(Bar { label: format!("{}{mark}", arm.name), arm: at, mean, low, high })
    };
    facts.arms.iter().enumerate().filter_map(bar).collect()
}

fn effects(facts: &Facts) -> Vec<Figure> {
    let of = |name: &String| {
        let rise = bars(facts, |arm| arm.effects.get(name).and_then(|effect| Some((effect.rise?, effect.optimised))));
        let title = format!("{name}: rise since the start");
        let rise = plots::intervals(&title, &rise).filter(|_| !rise.is_empty());
        let rise = figure(Part::Effects, &format!("rise_{name}"), (title, String::new()), rise);
        let Some(baseline) = &facts.baseline else { return [rise, None] };
        let against =
            bars(facts, |arm| arm.effects.get(name).and_then(|effect| Some((effect.against?, effect.optimised))));
        let title = format!("{name}: difference from {baseline}");
        let against = plots::intervals(&title, &against).filter(|_| !against.is_empty());
        [rise, figure(Part::Effects, &format!("against_{name}"), (title, String::new()), against)]
    };
    facts.watched.iter().filter(|name| facts.judges.contains(name)).flat_map(of).flatten().collect()
}

fn groups(facts: &Facts) -> Vec<Figure> {
    let Some(evaluation) = &facts.evaluation else { return Vec::new() };
    let names = facts.arms.first().into_iter().flat_map(|arm| &arm.groups).map(|group| &group.name);
    let of = |name: &String| {
        let effect = |arm: &ArmReport| arm.groups.iter().find(|group| group.name == *name).map(|group| group.effect);
        let rise = |effect: Effect| Some((effect.rise?, effect.optimised));
        let bars = bars(facts, |arm| effect(arm).and_then(rise));
        let title = format!("{evaluation}, {name}: rise");
        let svg = plots::intervals(&title, &bars).filter(|_| !bars.is_empty());
        figure(Part::Groups, &format!("{evaluation}_{name}"), (title, String::new()), svg)
    };
    names.filter_map(of).collect()
}

fn line(label: String, arm: usize, points: &[Point]) -> Line {
    let points = points.iter().map(|point| (point.step as f64, point.mean, point.low, point.high)).collect();
    Line { label, arm, points }
}

fn together(facts: &Facts) -> Vec<Figure> {
    let Some(evaluation) = &facts.evaluation else { return Vec::new() };
    let of = |arm: &ArmReport| {
        let (target, points) = (&arm.training.target, arm.training.held_out.get(evaluation)?);
        let left = line("what it optimises".into(), 1, target);
        let right = line(evaluation.clone(), 2, points);
        let title = format!("{}: reward and {evaluation}", arm.name);
        let caption = arm.training.with_evaluation.map_or(String::new(), |spread| {
            format!(
                "correlation over a run's evaluations {:+.2} (seeds {:+.2} to {:+.2})",
                spread.mean, spread.low, spread.high
            )
        });
        let svg = plots::two_axes(&title, &left, &right).filter(|_| target.len() > 1);
        figure(Part::Together, &format!("together_{}", arm.name), (title, caption), svg)
    };
    facts.arms.iter().filter(|arm| !arm.optimised.is_empty()).filter_map(of).collect()
}

fn curves(facts: &Facts) -> Vec<Figure> {
    let of = |name: &String| {
        let lines = lines(facts, |arm| arm.training.held_out.get(name));
        let title = format!("{name} on held-out prompts");
        let caption = "band: interval of the rise since the start".to_string();
        let svg = plots::curves(&title, &lines).filter(|_| !lines.is_empty());
        figure(Part::Curves, &format!("curve_{name}"), (title, caption), svg)
    };
    facts.watched.iter().filter(|name| facts.judges.contains(name)).filter_map(of).collect()
}

fn training(facts: &Facts) -> Vec<Figure> {
    let of = |(name, title): (&str, &str)| {
        let lines = lines(facts, |arm| arm.training.curves.get(name));
        let caption = "band: the least and the greatest seed".to_string();
        let svg = plots::curves(title, &lines).filter(|_| !lines.is_empty());
        figure(Part::Training, &format!("training_{name}"), (title.into(), caption), svg)
    };
    [("reward", "reward while training"), ("kl", "KL to the reference"), ("entropy", "entropy")]
        .into_iter()
        .filter_map(of)
        .collect()
}

/// The curves of those arms that have one.
fn lines<'a>(facts: &'a Facts, points: impl Fn(&'a ArmReport) -> Option<&'a Vec<Point>>) -> Vec<Line> {
    let of = |(at, arm): (usize, &'a ArmReport)| {
        points(arm).filter(|points| points.len() > 1).map(|points| line(arm.name.clone(), at, points))
    };
    facts.arms.iter().enumerate().filter_map(of).collect()
}
