//! The prompts of both halves, and training examples.

use std::sync::LazyLock;

use grpo::Seed;

use super::scene::{MAX_OBJECTS, scene_for, scene_of};
use super::split::{asks_held_out, attributes_held, held_color, held_pair};
use super::statement::{Captions, Phrase, Statement, captions, describe};
use super::{Class, Color, Scene, Split};
use crate::geneval::{Metadata, Relation, Tag};

/// Held-out prompts of each task; ten leave an error of 0.04 in GenEval's rise of four images a prompt, thirty one of
/// 0.025 (`experiments/LOG.md`).
const PER_TASK: usize = 30;
/// Training prompts of each task: colour attributes have over a thousand, a class alone has six.
const TRAINED_PER_TASK: usize = 60;
/// The share of examples that are free scenes, told in full, beside the six tasks.
const FREE_SHARE: f64 = 0.2;
/// How often a free scene is drawn until its caption is not held out.
const ATTEMPTS: u64 = 200;

/// A scene with what is said of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The prompt it was made for; `None` for a free scene.
    pub metadata: Option<Metadata>,
    /// What is to be seen.
    pub scene: Scene,
    /// Its captions; the short one is the prompt where there is one.
    pub captions: Captions,
    /// What the short caption says, from which false ones are made.
    pub(super) statement: Statement,
}

/// 360 prompts, sixty for each task, none asking for anything held out; always the same.
///
/// GenEval's mean weighs its tasks equally, so a list to reinforce does so too: a task of fewer prompts has them in turn.
pub fn train_prompts() -> Vec<Metadata> {
    let of_task = |(tag, statements): (Tag, &Vec<Statement>)| {
        spread(statements, TRAINED_PER_TASK).map(move |statement| statement.metadata(tag)).collect::<Vec<_>>()
    };
    Tag::ALL.into_iter().zip(&*TRAIN).flat_map(of_task).collect()
}

/// 180 prompts, thirty for each task, each asking for a held-out combination of trained parts; always the same.
///
/// A task with fewer prompts asks for all of them in turn, and each time is drawn with seeds of its own: counting has 6,
/// two objects 10 and position 20, both orders counted, colours 12. `single_object` has nothing to hold out and asks for
/// its 6 classes.
pub fn held_out_prompts() -> Vec<Metadata> {
    let of_task = |tag: Tag| {
        let held: Vec<Statement> =
            statements(tag).into_iter().filter(|statement| is_own_held_out(tag, statement)).collect();
        spread(&held, PER_TASK).map(|statement| statement.metadata(tag)).collect::<Vec<_>>()
    };
    Tag::ALL.into_iter().flat_map(of_task).collect()
}

/// An example whose caption is no held-out combination: one of the tasks, each as often as the others, or a free scene.
///
/// Its picture may hold one: the ring of "a photo of a ring" may be red, though "a photo of a red ring" is held out.
pub fn training_example(seed: Seed) -> Example {
    example(seed, Split::Train)
}

/// An example of a split; its six tasks are equally frequent, whatever their numbers of prompts.
pub fn example(seed: Seed, split: Split) -> Example {
    let seed = seed.named("example");
    let mut draws = seed.draws();
    if draws.uniform() >= FREE_SHARE {
        let task = draws.below(Tag::ALL.len());
        let known = if split == Split::All { &ALL[task] } else { &TRAIN[task] };
        let statement = &known[draws.below(known.len())];
        let metadata = statement.metadata(Tag::ALL[task]);
        if let Ok(scene) = scene_for(&metadata, seed) {
            let captions = Captions { short: metadata.prompt.clone(), long: captions(&scene, seed).long };
            return Example { metadata: Some(metadata), scene, captions, statement: statement.clone() };
        }
    }
    let allowed = |statement: &Statement| split == Split::All || !asks_held_out(statement);
    // The number of objects is drawn first, so that rejection does not make scenes smaller.
    let count = 1 + seed.named("count").draws().below(MAX_OBJECTS);
    let told = |scene: Scene, seed: Seed| {
        let (captions, statement) = describe(&scene, seed);
        Example { metadata: None, scene, captions, statement }
    };
    // Most captions are allowed; a test of 5,000 examples meets no empty scene.
    (0..ATTEMPTS)
        .map(|n| told(scene_of(count, seed.fold(n)), seed.fold(n)))
        .find(|example| allowed(&example.statement))
        .unwrap_or_else(|| told(Scene::default(), seed))
}

static ALL: LazyLock<Vec<Vec<Statement>>> = LazyLock::new(|| Tag::ALL.map(statements).into());

static TRAIN: LazyLock<Vec<Vec<Statement>>> = LazyLock::new(|| {
    let trained = |all: &Vec<Statement>| all.iter().filter(|one| !asks_held_out(one)).cloned().collect();
    ALL.iter().map(trained).collect()
});

/// `count` items, evenly from first to last, or in turn where there are fewer.
fn spread<T>(items: &[T], count: usize) -> impl Iterator<Item = &T> {
    (0..count).filter_map(move |row| {
        let index = if items.len() >= count { row * items.len() / count } else { row % items.len().max(1) };
        items.get(index)
    })
}

/// Everything that a task can ask for.
fn statements(tag: Tag) -> Vec<Statement> {
    let mut all = Vec::new();
    let mut say = |phrases: Vec<Phrase>, relation| all.push(Statement { phrases, relation });
    for a in Class::ALL {
        match tag {
            Tag::SingleObject => say(vec![Phrase::one(a, None)], None),
            Tag::Counting => {
                (2..=MAX_OBJECTS).for_each(|count| say(vec![Phrase { count, ..Phrase::one(a, None) }], None))
            }
            Tag::Colors => Color::ALL.into_iter().for_each(|color| say(vec![Phrase::one(a, Some(color))], None)),
            Tag::TwoObject | Tag::Position | Tag::ColorAttr => {}
        }
        for b in Class::ALL.into_iter().filter(|&b| b != a) {
            let pair = |color_a, color_b| vec![Phrase::one(a, color_a), Phrase::one(b, color_b)];
            match tag {
                Tag::TwoObject => say(pair(None, None), None),
                Tag::Position => Relation::ALL.into_iter().for_each(|relation| say(pair(None, None), Some(relation))),
                Tag::ColorAttr => Color::ALL
                    .into_iter()
                    .flat_map(|color_a| Color::ALL.map(|color_b| (color_a, color_b)))
                    // Two colours that are the same ask for no attribution.
                    .filter(|(color_a, color_b)| color_a != color_b)
                    .for_each(|(color_a, color_b)| say(pair(Some(color_a), Some(color_b)), None)),
                Tag::SingleObject | Tag::Counting | Tag::Colors => {}
            }
        }
    }
    all
}

/// Whether a statement asks for a combination that its own task holds out, of parts that are not held out themselves.
fn is_own_held_out(tag: Tag, statement: &Statement) -> bool {
    let parts_trained = |a: &Phrase, b: &Phrase| {
        let colored = |phrase: &Phrase| phrase.color.is_some_and(|color| held_color(phrase.class, color));
        !held_pair(a.class, b.class) && !colored(a) && !colored(b)
    };
    match (tag, statement.phrases.as_slice()) {
        (Tag::SingleObject, _) => true,
        (Tag::ColorAttr, [a, b]) => parts_trained(a, b) && attributes_held(a, b),
        _ => asks_held_out(statement),
    }
}
