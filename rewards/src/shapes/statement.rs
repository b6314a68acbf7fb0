//! What can be said of a scene: captions, and whether they are true.

use grpo::{Draws, Seed};

use super::scene::Object;
use super::{Class, Color, Scene};
use crate::geneval::{Include, Metadata, Relation, Tag};

/// Two true captions of one scene.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captions {
    /// As GenEval's prompts are: "a photo of two red circles".
    pub short: String,
    /// Every object with its colour and place.
    pub long: String,
}

/// Every word that captions and prompts are made of; they are separated by single spaces.
pub fn vocabulary() -> Vec<&'static str> {
    let mut words =
        vec!["a", "an", "photo", "image", "picture", "drawing", "of", "and", "in", "on", "the", "background"];
    words.extend(["gray", "one", "two", "three", "four", "five"]);
    words.extend(["left", "right", "above", "below", "top", "bottom", "center"]);
    words.extend(Class::ALL.map(Class::name));
    words.extend(Class::ALL.map(Class::plural));
    words.extend(Color::ALL.map(Color::name));
    words
}

/// Describes a scene; the seed chooses among what is true.
pub fn captions(scene: &Scene, seed: Seed) -> Captions {
    describe(scene, seed).0
}

/// The captions with the content of the short one.
pub(super) fn describe(scene: &Scene, seed: Seed) -> (Captions, Statement) {
    let mut draws = seed.named("captions").draws();
    let statement = Statement::about(scene, &mut draws);
    (Captions { short: statement.to_string(), long: long(scene, &mut draws) }, statement)
}

/// So many objects of a class, perhaps of a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Phrase {
    pub(super) count: usize,
    pub(super) color: Option<Color>,
    pub(super) class: Class,
}

impl Phrase {
    pub(super) fn one(class: Class, color: Option<Color>) -> Self {
        Self { count: 1, color, class }
    }

    fn matches(&self, object: &Object) -> bool {
        self.class == object.class && self.color.is_none_or(|color| color == object.color)
    }

    fn words(&self) -> String {
        let noun = if self.count == 1 { self.class.name() } else { self.class.plural() };
        let first = self.color.map_or(noun, Color::name);
        let count = match self.count {
            // Of all colours and classes only "orange" begins with a vowel.
            1 if first.starts_with('o') => "an",
            1 => "a",
            2 => "two",
            3 => "three",
            4 => "four",
            _ => "five",
        };
        match self.color {
            Some(color) => format!("{count} {color} {noun}"),
            None => format!("{count} {noun}"),
        }
    }
}

/// The content of a short caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Statement {
    pub(super) phrases: Vec<Phrase>,
    /// Where the first phrase's object stands from the second's.
    pub(super) relation: Option<Relation>,
}

impl Statement {
    /// A true statement that names every object.
    pub(super) fn about(scene: &Scene, draws: &mut Draws) -> Self {
        let colored = draws.uniform() < 0.6;
        let mut phrases: Vec<Phrase> = Vec::new();
        for object in &scene.objects {
            let wanted = Phrase::one(object.class, colored.then_some(object.color));
            match phrases.iter_mut().find(|known| known.class == wanted.class && known.color == wanted.color) {
                Some(known) => known.count += 1,
                None => phrases.push(wanted),
            }
        }
        let related = match scene.objects.as_slice() {
            [a, b] if a.class != b.class && draws.uniform() < 0.5 => a.clear_relation(b),
            _ => None,
        };
        Self { phrases, relation: related }
    }

    /// The statement as a prompt of a task.
    pub(super) fn metadata(&self, tag: Tag) -> Metadata {
        let include = |phrase: &Phrase| {
            let color = phrase.color.map(|color| color.name().to_owned());
            Include { color, ..Include::new(phrase.class.name(), phrase.count) }
        };
        let mut includes: Vec<Include> = self.phrases.iter().map(include).collect();
        if let (Some(relation), [first, second, ..]) = (self.relation, includes.as_mut_slice()) {
            // GenEval lists the anchor first and gives the position to the object that follows.
            std::mem::swap(first, second);
            second.position = Some((relation, 0));
        }
        let exclude = match tag {
            Tag::Counting => includes.iter().map(|one| Include::new(&one.class, one.count + 1)).collect(),
            _ => Vec::new(),
        };
        Metadata { tag, include: includes, exclude, prompt: self.to_string() }
    }

    /// Whether it is true of a scene: "two" means exactly two, "a" means at least one.
    pub(super) fn holds(&self, scene: &Scene) -> bool {
        let counted = |phrase: &Phrase| {
            let found = scene.objects.iter().filter(|object| phrase.matches(object)).count();
            if phrase.count == 1 { found >= 1 } else { found == phrase.count }
        };
        self.phrases.iter().all(counted) && self.relation.is_none_or(|relation| self.related(relation, scene))
    }

    fn related(&self, relation: Relation, scene: &Scene) -> bool {
        let [first, second, ..] = self.phrases.as_slice() else {
            return false;
        };
        let of = |phrase: &Phrase| scene.objects.iter().filter(|object| phrase.matches(object)).collect::<Vec<_>>();
        let seconds = of(second);
        of(first)
            .into_iter()
            .any(|a| seconds.iter().any(|b| crate::geneval::relations(a.bbox(), b.bbox()).contains(&relation)))
    }
}

impl std::fmt::Display for Statement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a photo of ")?;
        for (row, phrase) in self.phrases.iter().enumerate() {
            match (row, self.relation) {
                (0, _) => {}
                (1, Some(relation)) => write!(f, " {relation} ")?,
                _ => f.write_str(" and ")?,
            }
            f.write_str(&phrase.words())?;
        }
        Ok(())
    }
}

fn long(scene: &Scene, draws: &mut Draws) -> String {
    let opening = ["a photo of", "an image of", "a picture of", "a drawing of"][draws.below(4)];
    let order = draws.permutation(scene.objects.len());
    let told: Vec<String> = order
        .into_iter()
        .map(|row| {
            let object = &scene.objects[row];
            format!("{} {}", Phrase::one(object.class, Some(object.color)).words(), area(object.x, object.y))
        })
        .collect();
    let ground = if draws.uniform() < 0.25 { " on a gray background" } else { "" };
    format!("{opening} {}{ground}", told.join(" and "))
}

/// The ninth of the frame where a centre lies.
fn area(x: f32, y: f32) -> &'static str {
    let third = |place: f32| usize::from(place > 0.37) + usize::from(place > 0.63);
    const AREAS: [[&str; 3]; 3] = [
        ["in the top left", "in the top", "in the top right"],
        ["on the left", "in the center", "on the right"],
        ["in the bottom left", "in the bottom", "in the bottom right"],
    ];
    AREAS[third(y)][third(x)]
}
