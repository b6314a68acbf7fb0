//! Captions that are nearly true: one colour, class, number or place is wrong, or two have changed places.

use grpo::Draws;

use super::statement::{Phrase, Statement};
use super::{Class, Color, Scene};
use crate::geneval::Relation;

/// How many false captions an example has.
const WANTED: usize = 3;
/// How often a change is drawn; most draws give a false caption.
const ATTEMPTS: usize = 500;

/// Different statements that are false of the scene, each one change away from a true one.
pub(super) fn negatives(statement: &Statement, scene: &Scene, draws: &mut Draws) -> Vec<String> {
    let mut found: Vec<String> = Vec::with_capacity(WANTED);
    for _ in 0..ATTEMPTS {
        if found.len() == WANTED {
            break;
        }
        let Some(changed) = change(statement, draws) else {
            continue;
        };
        let text = changed.to_string();
        if !repeats(&changed) && !changed.holds(scene) && !found.contains(&text) {
            found.push(text);
        }
    }
    found
}

fn change(statement: &Statement, draws: &mut Draws) -> Option<Statement> {
    let mut changed = statement.clone();
    let row = draws.below(changed.phrases.len());
    match draws.below(6) {
        0 => changed.phrases.get_mut(row)?.class = Class::ALL[draws.below(Class::ALL.len())],
        1 => changed.phrases.get_mut(row)?.color = Some(Color::ALL[draws.below(Color::ALL.len())]),
        2 => changed.phrases.get_mut(row)?.count = 1 + draws.below(5),
        3 => changed.relation = changed.relation.map(|_| Relation::ALL[draws.below(4)]),
        4 => swap(&mut changed.phrases, |a, b| std::mem::swap(&mut a.color, &mut b.color)),
        // With a relation this turns "a left of b" into "b left of a".
        _ => swap(&mut changed.phrases, |a, b| std::mem::swap(&mut a.class, &mut b.class)),
    }
    let one_each = changed.phrases.iter().all(|phrase| phrase.count == 1);
    // A relation between several objects is nothing that captions of this world say.
    (changed.relation.is_none() || one_each).then_some(changed)
}

fn swap(phrases: &mut [Phrase], exchange: impl Fn(&mut Phrase, &mut Phrase)) {
    if let [a, b, ..] = phrases {
        exchange(a, b);
    }
}

/// "a circle and a circle" is a count that is not said as one.
fn repeats(statement: &Statement) -> bool {
    let phrases = &statement.phrases;
    let same =
        |a: &Phrase, b: &Phrase| a.class == b.class && (a.color == b.color || a.color.is_none() || b.color.is_none());
    phrases.iter().enumerate().any(|(row, a)| phrases[..row].iter().any(|b| same(a, b)))
}
