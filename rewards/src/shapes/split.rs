//! What training never says, so that the held-out prompts measure composition and not memory.
//!
//! Every class, colour, count and relation is trained. Held out are combinations of them, per task:
//!
//! | task | held out | of | elsewhere |
//! |---|---|---|---|
//! | `single_object` | nothing: a class alone is no combination | 6 classes | |
//! | `colors` | 12 pairs of class and colour | 60 | said within `color_attr` |
//! | `counting` | 6 pairs of class and count, one for each class | 18 | never |
//! | `two_object` | 5 unordered pairs of classes | 15 | said within `position` and `color_attr` |
//! | `position` | one arrangement (of left, right, above, below) for each of the other pairs of classes | 60 | never |
//! | `color_attr` | a fifth of the pairs of coloured classes | about 1,300 | never |
//!
//! "Never" is never said and, in a scene of one of the tasks, never shown unsaid either ([`is_composition_held_out`]).
//! The pairs of the other two may be parts of a larger combination: where a yellow triangle was never said at all, a
//! decoder of a million parameters learned from every coloured triangle that yellow is not among its colours
//! (`experiments/LOG.md`), and no reward on training prompts can teach it otherwise.
//!
//! The arithmetic below only spreads the combinations evenly.

use super::{Class, Color, Object, Scene};
use crate::geneval::{Relation, relations};

/// Whether a scene shows a combination that some task holds out; free training scenes never do.
///
/// A scene shows the class and colour of each object, the number of each class, each pair of classes, each
/// relation of two different classes that GenEval's rule sees, and each pair of coloured objects of different classes.
pub fn is_held_out(scene: &Scene) -> bool {
    let objects = &scene.objects;
    objects.iter().any(|object| held_color(object.class, object.color))
        || pairs(objects).any(|(a, b)| held_pair(a.class, b.class))
        || is_composition_held_out(scene)
}

/// Whether a scene shows a held-out number of a class, relation or pair of coloured objects: what no training picture
/// does, said or unsaid.
pub fn is_composition_held_out(scene: &Scene) -> bool {
    let objects = &scene.objects;
    let counts = Class::ALL
        .into_iter()
        .any(|class| held_count(class, objects.iter().filter(|object| object.class == class).count()));
    let composed = |(a, b): (&Object, &Object)| {
        let arranged = || relations(a.bbox(), b.bbox()).into_iter().any(|r| held_relation(a.class, r, b.class));
        held_attributes((a.class, a.color), (b.class, b.color)) || arranged()
    };
    counts || pairs(objects).any(composed)
}

fn pairs(objects: &[Object]) -> impl Iterator<Item = (&Object, &Object)> {
    objects.iter().enumerate().flat_map(|(row, a)| objects[..row].iter().map(move |b| (a, b)))
}

/// Two colours for each class, five apart: each colour is held out of one or two classes.
pub(super) fn held_color(class: Class, color: Color) -> bool {
    color as usize % 5 == class as usize % 5
}

/// One count for each class; one of a class is never held out.
pub(super) fn held_count(class: Class, count: usize) -> bool {
    count == 2 + class as usize % 3
}

/// Five of the fifteen pairs; each class is in one or two of them.
pub(super) fn held_pair(a: Class, b: Class) -> bool {
    use Class::{Circle, Cross, Ring, Square, Star, Triangle};
    let pair = (a.min(b), a.max(b));
    matches!(pair, (Circle, Square) | (Triangle, Star) | (Cross, Ring) | (Square, Cross) | (Star, Ring))
}

/// One of the four arrangements of each trained pair.
pub(super) fn held_relation(a: Class, relation: Relation, b: Class) -> bool {
    let (low, high, relation) = if a < b { (a, b, relation) } else { (b, a, relation.opposite()) };
    a != b && !held_pair(a, b) && relation as usize == (low as usize + 2 * high as usize) % 4
}

/// A fifth of the pairs of coloured objects of different classes.
pub(super) fn held_attributes(a: (Class, Color), b: (Class, Color)) -> bool {
    let number = |(class, color): (Class, Color)| 3 * class as usize + color as usize;
    a.0 != b.0 && (number(a) + number(b)).is_multiple_of(5)
}
