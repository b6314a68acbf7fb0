//! The rules, as functions of boxes.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::metadata::{Include, Metadata, Relation, Tag};

/// Boxes up to this score are noise.
const MIN_SCORE: f32 = 0.3;
/// Counting is exact, so a box must be certain.
const MIN_SCORE_COUNTING: f32 = 0.9;
/// The best boxes of a class that are looked at.
const MAX_OBJECTS: usize = 16;
/// The share of both sizes by which an offset is reduced.
const POSITION_SLACK: f32 = 0.1;
/// Offsets below this are none.
const MIN_OFFSET: f32 = 1e-3;
/// The share of the distance that an axis must carry.
const MIN_SHARE: f32 = 0.5;

/// One object that a detector found.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Detection {
    /// The class's name.
    pub class: String,
    /// The certainty, in `[0, 1]`.
    pub score: f32,
    /// The corners `[x0, y0, x1, y1]`; the rules do not depend on the unit.
    pub bbox: [f32; 4],
    /// The colour's name, where it is known.
    pub color: Option<String>,
}

impl Detection {
    /// An object of unknown colour.
    pub fn new(class: impl Into<String>, score: f32, bbox: [f32; 4]) -> Self {
        Self { class: class.into(), score, bbox, color: None }
    }

    /// Sets the colour.
    #[must_use]
    pub fn with_color(mut self, color: impl Into<String>) -> Self {
        self.color = Some(color.into());
        self
    }
}

/// Whether the picture is right, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether every rule holds.
    pub correct: bool,
    /// The rules that failed, separated by "; "; empty where the picture is right.
    pub reason: String,
}

/// Applies the rules to what was found.
///
/// ```
/// use grpo_rewards::geneval::{judge, Detection, Include, Metadata, Tag};
///
/// let metadata = Metadata {
///     tag: Tag::SingleObject,
///     include: vec![Include::new("cat", 1)],
///     exclude: vec![],
///     prompt: "a photo of a cat".into(),
/// };
/// assert!(judge(&metadata, &[Detection::new("cat", 0.8, [0.0, 0.0, 9.0, 9.0])]).correct);
/// assert_eq!(judge(&metadata, &[]).reason, "expected at least 1 cat, found 0");
/// ```
pub fn judge(metadata: &Metadata, detections: &[Detection]) -> Verdict {
    let kept = keep(metadata.tag, detections);
    let of_class = |class: &str| kept.get(class).map_or(&[][..], Vec::as_slice);
    let mut faults = Vec::new();
    let mut groups: Vec<Option<&[&Detection]>> = Vec::with_capacity(metadata.include.len());
    for include in &metadata.include {
        let group = check_include(include, of_class(&include.class), &groups);
        groups.push(group.as_ref().ok().copied());
        faults.extend(group.err());
    }
    for exclude in &metadata.exclude {
        let found = of_class(&exclude.class).len();
        if found >= exclude.count {
            faults.push(format!("expected fewer than {} {}, found {found}", exclude.count, exclude.class));
        }
    }
    Verdict { correct: faults.is_empty(), reason: faults.join("; ") }
}

/// The boxes whose colours the rules will ask for, as indices into `detections`.
pub(super) fn needing_color(metadata: &Metadata, detections: &[Detection]) -> Vec<usize> {
    let rows = keep_rows(metadata.tag, detections);
    let colored = metadata.include.iter().filter(|include| include.color.is_some());
    let mut needed: Vec<usize> = colored
        .filter_map(|include| rows.get(include.class.as_str()).map(|rows| &rows[..include.count.min(rows.len())]))
        .flatten()
        .copied()
        .collect();
    needed.sort_unstable();
    needed.dedup();
    needed
}

fn keep(tag: Tag, detections: &[Detection]) -> BTreeMap<&str, Vec<&Detection>> {
    let rows = keep_rows(tag, detections);
    rows.into_iter().map(|(class, rows)| (class, rows.into_iter().map(|row| &detections[row]).collect())).collect()
}

fn keep_rows(tag: Tag, detections: &[Detection]) -> BTreeMap<&str, Vec<usize>> {
    let least = if tag == Tag::Counting { MIN_SCORE_COUNTING } else { MIN_SCORE };
    let mut kept: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (row, detection) in detections.iter().enumerate() {
        if detection.score > least {
            kept.entry(&detection.class).or_default().push(row);
        }
    }
    for rows in kept.values_mut() {
        // Positive floats order as their bits do, which makes them a key for the stable sort.
        rows.sort_by_key(|&row| Reverse(detections[row].score.to_bits()));
        rows.truncate(MAX_OBJECTS);
    }
    kept
}

fn check_include<'a>(
    include: &Include,
    found: &'a [&'a Detection],
    groups: &[Option<&[&Detection]>],
) -> Result<&'a [&'a Detection], String> {
    let Include { class, count, .. } = include;
    let taken =
        found.get(..*count).ok_or_else(|| format!("expected at least {count} {class}, found {}", found.len()))?;
    if let Some(color) = &include.color {
        let colored = taken.iter().filter(|object| object.color.as_ref() == Some(color)).count();
        if colored < *count {
            let colors: Vec<&str> = taken.iter().map(|object| object.color.as_deref().unwrap_or("unknown")).collect();
            return Err(format!("expected {count} {color} {class}, found {}", colors.join(" and ")));
        }
    }
    let Some((relation, target)) = include.position else {
        return Ok(taken);
    };
    let Some(targets) = groups.get(target).copied().flatten() else {
        return Err(format!("no target for {class} to be {relation}"));
    };
    for object in taken {
        for target in targets {
            let actual = relations(object.bbox, target.bbox);
            if !actual.contains(&relation) {
                let names: Vec<&str> = actual.iter().map(|relation| relation.name()).collect();
                return Err(format!("expected {class} {relation} {}, found [{}]", target.class, names.join(", ")));
            }
        }
    }
    Ok(taken)
}

/// The relations in which box `a` stands to box `b`: none where they nearly coincide, two on a diagonal.
///
/// The offset of the centres is reduced on each axis by a tenth of both sizes, then compared with half the
/// distance of the centres (unreduced, as published).
pub fn relations(a: [f32; 4], b: [f32; 4]) -> Vec<Relation> {
    let offset = [0, 1].map(|axis| (a[axis] + a[axis + 2]) / 2.0 - (b[axis] + b[axis + 2]) / 2.0);
    let reduced = [0, 1].map(|axis| {
        let sizes = (a[axis + 2] - a[axis]).abs() + (b[axis + 2] - b[axis]).abs();
        (offset[axis].abs() - POSITION_SLACK * sizes).max(0.0).copysign(offset[axis])
    });
    if reduced.iter().all(|part| part.abs() < MIN_OFFSET) {
        return Vec::new();
    }
    let distance = offset[0].hypot(offset[1]);
    let [dx, dy] = reduced.map(|part| part / distance);
    let holds = [dx < -MIN_SHARE, dx > MIN_SHARE, dy < -MIN_SHARE, dy > MIN_SHARE];
    Relation::ALL.into_iter().zip(holds).filter_map(|(relation, holds)| holds.then_some(relation)).collect()
}
