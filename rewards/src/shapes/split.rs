//! What training never says, so that the held-out prompts measure composition and not memory.
//!
//! Every class, colour, count and relation is trained. Held out are combinations of them, per task:
//!
//! | task | held out | of |
//! |---|---|---|
//! | `single_object` | nothing: a class alone is no combination | 6 classes |
//! | `colors` | 12 pairs of class and colour | 60 |
//! | `counting` | 6 pairs of class and count, one for each class | 18 |
//! | `two_object` | 5 unordered pairs of classes | 15 |
//! | `position` | one arrangement (of left, right, above, below) for each trained pair of classes | 40 |
//! | `color_attr` | a fifth of the pairs of coloured classes whose parts are trained | about 640 |
//!
//! The arithmetic below only spreads the combinations evenly.

use super::{Class, Color, Scene};
use crate::geneval::{Relation, relations};

/// Whether a scene shows a combination that is held out; training captions never say one.
///
/// A scene shows the class and colour of each object, the number of each class, each pair of classes, each
/// relation of two different classes that GenEval's rule sees, and each pair of coloured objects of different classes.
pub fn is_held_out(scene: &Scene) -> bool {
    scene.objects.iter().any(|object| held_color(object.class, object.color)) || is_composition_held_out(scene)
}

/// Whether a scene shows a held-out number of a class, or a held-out pair, relation or pair of coloured objects: what a
/// training picture never does, even unsaid.
pub fn is_composition_held_out(scene: &Scene) -> bool {
    let objects = &scene.objects;
    let counts = Class::ALL
        .into_iter()
        .any(|class| held_count(class, objects.iter().filter(|object| object.class == class).count()));
    let pairs = objects.iter().enumerate().any(|(row, a)| {
        objects[..row].iter().any(|b| {
            let attributes = held_attributes((a.class, a.color), (b.class, b.color));
            let arranged = || relations(a.bbox(), b.bbox()).into_iter().any(|r| held_relation(a.class, r, b.class));
            held_pair(a.class, b.class) || attributes || arranged()
        })
    });
    counts || pairs
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
