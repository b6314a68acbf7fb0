//! What an arm did, in a word: it improved what it never saw, or hacked it, or nothing.

use std::fmt;

use grpo::RunRewards;
use serde::Serialize;

use super::OPTIMISED;
use super::compare::{LEVEL, Quantity, Side, of_reward, paired};
use crate::intervals::{Interval, bootstrap};

/// What an arm did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// For programs.
    pub kind: Kind,
    /// In a word.
    pub label: &'static str,
    /// What it rests on: first what the arm optimises, then each judge that it does not.
    pub evidence: Vec<Evidence>,
}

/// What became of a reward, at the level at which all of an arm's intervals hold together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evidence {
    /// The reward.
    pub name: String,
    /// Which way it went.
    pub moved: Moved,
    /// Its rise.
    pub rise: Interval,
}

/// Which way a reward went: up or down where its interval does not hold 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moved {
    /// Up.
    Rose,
    /// Down.
    Fell,
    /// Neither is shown.
    DidNotMove,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rose => "rose",
            Self::Fell => "fell",
            Self::DidNotMove => "did not move",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.label)?;
        for (at, Evidence { name, moved, rise }) in self.evidence.iter().enumerate() {
            write!(f, "{} {name} {moved} ({rise})", if at == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

/// The kinds of verdicts; "rose" and "fell" are intervals that do not hold 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// What is optimised rose, and so did a judge that is not; none fell.
    Improved,
    /// What is optimised rose, and a judge that is not optimised fell.
    Hacked,
    /// What is optimised rose, and no other judge moved.
    RewardOnly,
    /// What is optimised did not rise, and no judge moved.
    NoEffect,
    /// What is optimised did not rise, and judges moved all the same: by drift, or by chance.
    Drifted,
    /// What is optimised rose, and it optimises every judge.
    NotJudged,
}

impl Kind {
    /// As a reader sees it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Improved => "improved",
            Self::Hacked => "hacked",
            Self::RewardOnly => "reward only",
            Self::NoEffect => "no effect",
            Self::Drifted => "no effect, but drifted",
            Self::NotJudged => "not judged",
        }
    }
}

/// The verdict on an arm by its target and by judges that it does not optimise; `None` where there is no interval.
///
/// All the intervals it rests on hold together at [`LEVEL`] (Bonferroni): each alone at `1 − (1 − LEVEL) / n`.
pub(super) fn of(
    side: &Side<'_>,
    (rewards, target): (&RunRewards, Quantity<'_>),
    judges: &[String],
) -> Option<Verdict> {
    let level = 1.0 - (1.0 - LEVEL) / (judges.len() + 1) as f64;
    let rises = side.rises();
    let interval = |quantity: Quantity<'_>| bootstrap(&paired(&rises, quantity)?.rows, level);
    let target = interval(target)?;
    let judged: Vec<(&str, Interval)> =
        judges.iter().filter_map(|name| Some((name.as_str(), interval(&of_reward(name))?))).collect();
    let kind = kind(&target, &judged.iter().map(|(_, interval)| *interval).collect::<Vec<_>>());
    let of = |(name, rise): (&str, Interval)| Evidence { name: name.into(), moved: moved(&rise), rise };
    let name = target_name(rewards);
    let evidence = std::iter::once((name.as_str(), target)).chain(judged).map(of).collect();
    Some(Verdict { kind, label: kind.label(), evidence })
}

/// What an arm's target is called: its reward, or the sum of several.
fn target_name(rewards: &RunRewards) -> String {
    let is_watched_as_one = rewards.held_out.iter().any(|name| name == OPTIMISED);
    match rewards.optimised.iter().next().filter(|_| rewards.optimised.len() == 1 && !is_watched_as_one) {
        Some((name, weight)) if *weight == 1.0 => format!("its own {name}"),
        Some((name, weight)) => format!("its own {weight} × {name}"),
        None => "the sum of its own rewards".into(),
    }
}

fn moved(rise: &Interval) -> Moved {
    match (rise.low > 0.0, rise.high < 0.0) {
        (true, _) => Moved::Rose,
        (_, true) => Moved::Fell,
        _ => Moved::DidNotMove,
    }
}

fn kind(target: &Interval, judges: &[Interval]) -> Kind {
    let fell = judges.iter().any(|judge| judge.high < 0.0);
    let rose = judges.iter().any(|judge| judge.low > 0.0);
    match (target.low > 0.0, judges.is_empty()) {
        (true, true) => Kind::NotJudged,
        (true, false) if fell => Kind::Hacked,
        (true, false) if rose => Kind::Improved,
        (true, false) => Kind::RewardOnly,
        (false, _) if fell || rose => Kind::Drifted,
        (false, _) => Kind::NoEffect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_intervals_that_hold_no_zero() {
        let at = |mean: f64| Interval { mean, low: mean - 0.1, high: mean + 0.1 };
        let (up, flat, down) = (at(0.2), at(0.05), at(-0.2));
        let check = |target: Interval, judges: &[Interval], expected| {
            assert_eq!(kind(&target, judges), expected, "{target:?} {judges:?}");
        };
        check(up, &[up, flat], Kind::Improved);
        check(up, &[up, down], Kind::Hacked);
        check(up, &[flat, down], Kind::Hacked);
        check(up, &[flat, flat], Kind::RewardOnly);
        check(up, &[], Kind::NotJudged);
        check(flat, &[flat, flat], Kind::NoEffect);
        check(flat, &[], Kind::NoEffect);
        check(flat, &[down], Kind::Drifted);
        check(down, &[up], Kind::Drifted);
        let evidence = [("what it optimises", up), ("geneval", down), ("hps", flat)].map(|(name, rise)| Evidence {
            name: name.into(),
            moved: moved(&rise),
            rise,
        });
        let verdict = Verdict { kind: Kind::Hacked, label: Kind::Hacked.label(), evidence: evidence.into() };
        assert_eq!(
            verdict.to_string(),
            "hacked: what it optimises rose (+0.200 [+0.100, +0.300]), geneval fell (-0.200 [-0.300, -0.100]), hps did not \
             move (+0.050 [-0.050, +0.150])"
        );
    }
}
