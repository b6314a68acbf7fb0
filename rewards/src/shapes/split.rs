//! What training never asks for, so that the held-out prompts measure composition and not memory.
//!
//! Every class, colour, count and relation is trained. Held out are combinations of objects, colours and relations, each
//! as the whole of what a caption says:
//!
//! | task | held out | of |
//! |---|---|---|
//! | `single_object` | nothing: a class alone is no combination | 6 classes |
//! | `colors` | 12 pairs of class and colour | 60 |
//! | `counting` | 6 pairs of class and count, one for each class | 18 |
//! | `two_object` | 5 unordered pairs of classes | 15 |
//! | `position` | one arrangement (of left, right, above, below) for each of the other pairs of classes | 60 |
//! | `color_attr` | a fifth of the pairs of coloured classes | 1,350 |
//!
//! A held-out combination may be part of a larger one: "a photo of a red ring" is never said, "a photo of a red ring and
//! a blue star" is. Where "red ring" was in no sentence at all, a decoder of a million parameters learned from the other
//! rings that red is not among their colours, and a reward on training prompts drove it further
//! (`experiments/LOG.md`): that measures how well absences are learned.
//!
//! The arithmetic below only spreads the combinations evenly.

use super::statement::{Phrase, Statement};
use super::{Class, Color};
use crate::geneval::Relation;

/// Whether a statement asks for a held-out combination and nothing more.
pub(super) fn asks_held_out(statement: &Statement) -> bool {
    match (statement.phrases.as_slice(), statement.relation) {
        ([one], _) => held_count(one.class, one.count) || one.color.is_some_and(|color| held_color(one.class, color)),
        ([a, b], relation) if a.count == 1 && b.count == 1 => match (relation, a.color.zip(b.color)) {
            (Some(relation), None) => held_relation(a.class, relation, b.class),
            (None, None) => held_pair(a.class, b.class),
            (None, Some(_)) => attributes_held(a, b),
            // Colours and a relation are more than any task asks for.
            (Some(_), Some(_)) => false,
        },
        _ => false,
    }
}

pub(super) fn attributes_held(a: &Phrase, b: &Phrase) -> bool {
    a.color.zip(b.color).is_some_and(|(color_a, color_b)| held_attributes((a.class, color_a), (b.class, color_b)))
}

/// Two colours for each class, five apart: each colour is held out of one or two classes.
pub(super) fn held_color(class: Class, color: Color) -> bool {
    color as usize % 5 == class as usize % 5
}

/// One count for each class; one of a class is never held out.
fn held_count(class: Class, count: usize) -> bool {
    count == 2 + class as usize % 3
}

/// Five of the fifteen pairs; each class is in one or two of them.
pub(super) fn held_pair(a: Class, b: Class) -> bool {
    use Class::{Circle, Cross, Ring, Square, Star, Triangle};
    let pair = (a.min(b), a.max(b));
    matches!(pair, (Circle, Square) | (Triangle, Star) | (Cross, Ring) | (Square, Cross) | (Star, Ring))
}

/// One of the four arrangements of each pair that `two_object` does not hold out.
pub(super) fn held_relation(a: Class, relation: Relation, b: Class) -> bool {
    let (low, high, relation) = if a < b { (a, b, relation) } else { (b, a, relation.opposite()) };
    a != b && !held_pair(a, b) && relation as usize == (low as usize + 2 * high as usize) % 4
}

/// A fifth of the pairs of coloured objects of different classes.
fn held_attributes(a: (Class, Color), b: (Class, Color)) -> bool {
    let number = |(class, color): (Class, Color)| 3 * class as usize + color as usize;
    a.0 != b.0 && (number(a) + number(b)).is_multiple_of(5)
}
