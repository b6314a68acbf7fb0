//! The rules, as functions of boxes.
//!
//! Arithmetic is that of the published program under numpy 1.23: single precision for positions, double for the
//! areas of overlaps.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::mask::Mask;
use super::metadata::{Include, Metadata, Relation, Tag};

/// The colours that are told apart, in the order of the published reasons.
pub const COLORS: [&str; 10] =
    ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"];

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
    /// The object's pixels, where the detector segments; a classifier of colours looks at these alone.
    pub mask: Option<Mask>,
}

impl Detection {
    /// An object of unknown colour.
    pub fn new(class: impl Into<String>, score: f32, bbox: [f32; 4]) -> Self {
        Self { class: class.into(), score, bbox, color: None, mask: None }
    }

    /// Sets the colour.
    #[must_use]
    pub fn with_color(mut self, color: impl Into<String>) -> Self {
        self.color = Some(color.into());
        self
    }

    /// Sets the pixels.
    #[must_use]
    pub fn with_mask(mut self, mask: Mask) -> Self {
        self.mask = Some(mask);
        self
    }
}

/// Whether the picture is right, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether every rule holds.
    pub correct: bool,
    /// The rules that failed, a line for each in the published wording; empty where the picture is right.
    pub reason: String,
}

/// Which of the published program's options the rules run with; as published by default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rules {
    /// A box that overlaps a better one of its class by this share (intersection over union) or more is dropped;
    /// off in every published number, and where it is 1.
    pub max_overlap: Option<f64>,
}

/// Applies the rules as published to what was found.
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
/// assert_eq!(judge(&metadata, &[]).reason, "expected cat>=1, found 0");
/// ```
pub fn judge(metadata: &Metadata, detections: &[Detection]) -> Verdict {
    Rules::default().judge(metadata, detections)
}

impl Rules {
    /// Applies the rules with these options.
    pub fn judge(&self, metadata: &Metadata, detections: &[Detection]) -> Verdict {
        let kept = self.keep(metadata.tag, detections);
        let of_class = |class: &str| kept.get(class).map_or(&[][..], Vec::as_slice);
        let mut faults = Vec::new();
        let mut groups: Vec<Option<&[&Detection]>> = Vec::with_capacity(metadata.include.len());
        for include in &metadata.include {
            let group = check_include(include, of_class(&include.class), &groups);
            groups.push(group.as_ref().ok().copied());
            faults.extend(group.err());
        }
        for Include { class, count, .. } in &metadata.exclude {
            let found = of_class(class).len();
            if found >= *count {
                faults.push(format!("expected {class}<{count}, found {found}"));
            }
        }
        Verdict { correct: faults.is_empty(), reason: faults.join("\n") }
    }

    /// The boxes whose colours the rules will ask for, as indices into `detections`.
    pub(super) fn needing_color(&self, metadata: &Metadata, detections: &[Detection]) -> Vec<usize> {
        let rows = self.keep_rows(metadata.tag, detections);
        let colored = metadata.include.iter().filter(|include| include.color.is_some());
        let mut needed: Vec<usize> = colored
            .filter_map(|include| rows.get(include.class.as_str())?.get(..include.count))
            .flatten()
            .copied()
            .collect();
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    fn keep<'a>(&self, tag: Tag, detections: &'a [Detection]) -> BTreeMap<&'a str, Vec<&'a Detection>> {
        let rows = self.keep_rows(tag, detections);
        rows.into_iter().map(|(class, rows)| (class, rows.into_iter().map(|row| &detections[row]).collect())).collect()
    }

    fn keep_rows<'a>(&self, tag: Tag, detections: &'a [Detection]) -> BTreeMap<&'a str, Vec<usize>> {
        let least = if tag == Tag::Counting { MIN_SCORE_COUNTING } else { MIN_SCORE };
        let mut kept: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (row, detection) in detections.iter().enumerate() {
            if detection.score > least {
                kept.entry(&detection.class).or_default().push(row);
            }
        }
        for rows in kept.values_mut() {
            // Positive floats order as their bits do. Of equal scores the later box comes first: the published
            // program sorts upwards, keeping the order of ties, and reads the result backwards.
            rows.sort_by_key(|&row| Reverse((detections[row].score.to_bits(), row)));
            rows.truncate(MAX_OBJECTS);
            if let Some(limit) = self.max_overlap.filter(|&limit| limit != 1.0) {
                suppress(rows, limit, detections);
            }
        }
        kept
    }
}

/// Drops rows that overlap an earlier one by `limit` or more.
fn suppress(rows: &mut Vec<usize>, limit: f64, detections: &[Detection]) {
    let mut kept: Vec<usize> = Vec::with_capacity(rows.len());
    for &row in rows.iter() {
        if kept.iter().all(|&better| overlap(detections[better].bbox, detections[row].bbox) < limit) {
            kept.push(row);
        }
    }
    *rows = kept;
}

/// Intersection over union of boxes whose corners are pixels, so that a box of one pixel has area 1; 0 for two empty
/// boxes.
pub fn overlap(a: [f32; 4], b: [f32; 4]) -> f64 {
    let area = |[x0, y0, x1, y1]: [f32; 4]| (f64::from(x1 - x0) + 1.0).max(0.0) * (f64::from(y1 - y0) + 1.0).max(0.0);
    let shared = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
    let joint = area(a) + area(b) - shared;
    if joint == 0.0 { 0.0 } else { shared / joint }
}

fn check_include<'a>(
    include: &Include,
    found: &'a [&'a Detection],
    groups: &[Option<&[&Detection]>],
) -> Result<&'a [&'a Detection], String> {
    let Include { class, count, .. } = include;
    let taken = found.get(..*count).ok_or_else(|| format!("expected {class}>={count}, found {}", found.len()))?;
    if let Some(color) = &include.color {
        check_color(include, color, taken)?;
    }
    let Some((relation, target)) = include.position else {
        return Ok(taken);
    };
    let Some(targets) = groups.get(target).copied().flatten() else {
        return Err(format!("no target for {class} to be {relation}"));
    };
    let pairs = taken.iter().flat_map(|object| targets.iter().map(|target| relations(object.bbox, target.bbox)));
    for actual in pairs {
        if !actual.contains(&relation) {
            let names: Vec<&str> = actual.iter().map(|relation| relation.name()).collect();
            return Err(format!("expected {class} {relation} target, found {} target", names.join(" and ")));
        }
    }
    Ok(taken)
}

fn check_color(include: &Include, color: &str, taken: &[&Detection]) -> Result<(), String> {
    let Include { class, count, .. } = include;
    let n_of = |name: &str| taken.iter().filter(|object| object.color.as_deref() == Some(name)).count();
    let right = n_of(color);
    if right >= *count {
        return Ok(());
    }
    let named: Vec<String> = COLORS
        .iter()
        .map(|name| (n_of(name), name))
        .filter(|(n, _)| *n > 0)
        .map(|(n, name)| format!("{n} {name}"))
        .collect();
    Err(format!("expected {color} {class}>={count}, found {right} {color}; and {}", named.join(", ")))
}

/// The relations in which box `a` stands to box `b`: none where they nearly coincide, two on a diagonal.
///
/// The offset of the centres is reduced on each axis by a tenth of both sizes, then compared with half the
/// distance of the centres (unreduced, as published). On a diagonal, left and right come before above and below.
pub fn relations(a: [f32; 4], b: [f32; 4]) -> Vec<Relation> {
    let offset = [0, 1].map(|axis| (a[axis] + a[axis + 2]) / 2.0 - (b[axis] + b[axis + 2]) / 2.0);
    let reduced = [0, 1].map(|axis| {
        let sizes = (a[axis + 2] - a[axis]).abs() + (b[axis + 2] - b[axis]).abs();
        (offset[axis].abs() - POSITION_SLACK * sizes).max(0.0).copysign(offset[axis])
    });
    if reduced.iter().all(|part| part.abs() < MIN_OFFSET) {
        return Vec::new();
    }
    // Squares summed in single precision, as numpy's norm of two floats; `hypot` would round the last bit otherwise.
    let distance = (offset[0] * offset[0] + offset[1] * offset[1]).sqrt();
    let [dx, dy] = reduced.map(|part| part / distance);
    let holds = [dx < -MIN_SHARE, dx > MIN_SHARE, dy < -MIN_SHARE, dy > MIN_SHARE];
    Relation::ALL.into_iter().zip(holds).filter_map(|(relation, holds)| holds.then_some(relation)).collect()
}
