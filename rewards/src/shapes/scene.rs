//! What there is to see: objects with class, colour and place.

use grpo::{Draws, Error, Result, Seed};
use serde::{Deserialize, Serialize};

use super::geometry::Outline;
use super::{Class, Color};
use crate::geneval::{Detection, Include, Metadata, Relation, relations};

/// The least space between boxes, and between a box and the frame: 4 of 64 pixels.
const MARGIN: f32 = 4.0 / 64.0;
/// The most objects that fit with their margins.
pub(super) const MAX_OBJECTS: usize = 4;
/// The least distance along the axis of a relation, and the most across it as a share of that.
const CLEAR_OFFSET: f32 = 0.34;
const CLEAR_SLANT: f32 = 0.5;
/// Half an object's extent, and the lattice that the centres lie on: 8 of 64 pixels.
/// An object so fills 2 x 2 cells of the visual codes exactly. At free places and sizes each edge is cut by the cells in
/// a way of its own, which a decoder of a million parameters has to learn by heart (`experiments/LOG.md`).
const RADIUS: f32 = 8.0 / 64.0;
const LATTICE: f32 = 8.0 / 64.0;
/// How often a placement is tried.
const ATTEMPTS: usize = 300;

/// Objects on a grey ground, in unit coordinates: x to the right, y downwards, both from 0 to 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scene {
    /// What there is, the first drawn first.
    pub objects: Vec<Object>,
}

/// One shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// Its shape.
    pub class: Class,
    /// Its colour.
    pub color: Color,
    /// Its centre, from the left.
    pub x: f32,
    /// Its centre, from the top.
    pub y: f32,
    /// Half its extent.
    pub radius: f32,
}

impl Object {
    /// The box `[x0, y0, x1, y1]` in unit coordinates.
    pub fn bbox(&self) -> [f32; 4] {
        let [x0, y0, x1, y1] = Outline::of(self.class).bounds().map(|side| side * self.radius);
        [self.x + x0, self.y + y0, self.x + x1, self.y + y1]
    }

    /// The relation to another object that nobody would dispute, if there is one.
    pub(super) fn clear_relation(&self, other: &Self) -> Option<Relation> {
        let (dx, dy) = (self.x - other.x, self.y - other.y);
        let (along, across) = if dx.abs() > dy.abs() { (dx, dy) } else { (dy, dx) };
        let clear = along.abs() >= CLEAR_OFFSET && across.abs() <= CLEAR_SLANT * along.abs();
        let found = relations(self.bbox(), other.bbox());
        (clear && found.len() == 1).then(|| found[0])
    }
}

impl Scene {
    /// What a perfect detector finds, in unit coordinates.
    pub fn detections(&self) -> Vec<Detection> {
        let detection =
            |object: &Object| Detection::new(object.class.name(), 1.0, object.bbox()).with_color(object.color.name());
        self.objects.iter().map(detection).collect()
    }
}

/// A random scene that is right for the metadata and holds nothing else.
///
/// Colours that are not asked for are random, places too unless a relation asks for one, which then is clear
/// to the eye. The error names a class or colour that is not of this world, or a number that does not fit.
pub fn scene_for(metadata: &Metadata, seed: Seed) -> Result<Scene> {
    let (kinds, bond) = parse(metadata)?;
    let mut draws = seed.named("scene").draws();
    let mut painted = Vec::with_capacity(kinds.len());
    for (class, color) in kinds {
        painted.push((class, color.unwrap_or_else(|| random_color(&mut draws))));
    }
    Ok(place(&painted, bond, &mut draws))
}

/// One to four objects of random classes and colours at random places.
pub fn random_scene(seed: Seed) -> Scene {
    scene_of(1 + seed.named("count").draws().below(MAX_OBJECTS), seed)
}

pub(super) fn scene_of(count: usize, seed: Seed) -> Scene {
    let mut draws = seed.named("random scene").draws();
    let kinds: Vec<(Class, Color)> =
        (0..count).map(|_| (Class::ALL[draws.below(Class::ALL.len())], random_color(&mut draws))).collect();
    place(&kinds, None, &mut draws)
}

fn random_color(draws: &mut Draws) -> Color {
    Color::ALL[draws.below(Color::ALL.len())]
}

/// A relation that the object of the second index has to that of the first.
type Bond = (usize, usize, Relation);

type Kind = (Class, Option<Color>);

fn parse(metadata: &Metadata) -> Result<(Vec<Kind>, Option<Bond>)> {
    let fault = |what: String| Error::config(format!("prompt `{}`: {what}", metadata.prompt));
    let mut kinds = Vec::new();
    let mut first = Vec::new();
    let mut bond = None;
    for Include { class, count, color, position } in &metadata.include {
        let known = Class::from_name(class)
            .ok_or_else(|| fault(format!("`{class}` is no shape; take one of {:?}", Class::ALL.map(Class::name))))?;
        let paint = color.as_deref().map(|name| {
            let known = Color::from_name(name);
            known.ok_or_else(|| fault(format!("`{name}` is no colour; take one of {:?}", Color::ALL.map(Color::name))))
        });
        if *count == 0 || kinds.len().saturating_add(*count) > MAX_OBJECTS {
            return Err(fault(format!("{count} {class} asked for; a scene holds 1 to {MAX_OBJECTS} objects in all")));
        }
        if let Some((relation, target)) = *position {
            let alone = *count == 1 && bond.is_none() && metadata.include.get(target).is_some_and(|one| one.count == 1);
            let anchor = first.get(target).copied().filter(|_| alone).ok_or_else(|| {
                fault(format!("{count} {class} {relation} entry {target}; relate one object to one earlier one, once"))
            })?;
            bond = Some((anchor, kinds.len(), relation));
        }
        first.push(kinds.len());
        kinds.extend(std::iter::repeat_n((known, paint.transpose()?), *count));
    }
    Ok((kinds, bond))
}

/// Puts objects where they fit: places are drawn until the margins hold.
///
/// A clear placement is nearly always found at once; the last resort is a fixed grid (or a fixed pair) that always fits.
fn place(kinds: &[(Class, Color)], bond: Option<Bond>, draws: &mut Draws) -> Scene {
    for _ in 0..ATTEMPTS {
        if let Some(objects) = try_place(kinds, draws).filter(|objects| fits(objects, bond)) {
            return Scene { objects };
        }
    }
    let far =
        if bond.is_some_and(|(.., relation)| matches!(relation, Relation::RightOf | Relation::Below)) { 1 } else { 0 };
    let upright = bond.is_some_and(|(.., relation)| matches!(relation, Relation::Above | Relation::Below));
    let spot = |row: usize| match bond {
        Some((_, mover, _)) => {
            let along = if (row == mover) == (far == 1) { 0.75 } else { 0.25 };
            if upright { (0.5, along) } else { (along, 0.5) }
        }
        None => (0.25 + 0.5 * (row % 2) as f32, 0.25 + 0.5 * (row / 2 % 2) as f32),
    };
    let object = |(row, &(class, color)): (usize, &(Class, Color))| {
        let (x, y) = spot(row);
        Object { class, color, x, y, radius: RADIUS }
    };
    Scene { objects: kinds.iter().enumerate().map(object).collect() }
}

fn try_place(kinds: &[(Class, Color)], draws: &mut Draws) -> Option<Vec<Object>> {
    let mut objects: Vec<Object> = Vec::with_capacity(kinds.len());
    for &(class, color) in kinds {
        let object = (0..20).find_map(|_| {
            let object = Object { class, color, x: lattice_point(draws), y: lattice_point(draws), radius: RADIUS };
            objects.iter().all(|other| apart(&object, other)).then_some(object)
        });
        objects.push(object?);
    }
    Some(objects)
}

/// A place on the lattice that keeps the margin from either side of the frame.
fn lattice_point(draws: &mut Draws) -> f32 {
    let reach = RADIUS + MARGIN;
    let first = (reach / LATTICE).ceil() as usize;
    let last = ((1.0 - reach) / LATTICE).floor() as usize;
    (first + draws.below(last + 1 - first)) as f32 * LATTICE
}

fn apart(a: &Object, b: &Object) -> bool {
    let (a, b) = (a.bbox(), b.bbox());
    (0..2).any(|axis| a[axis] - b[axis + 2] >= MARGIN || b[axis] - a[axis + 2] >= MARGIN)
}

fn fits(objects: &[Object], bond: Option<Bond>) -> bool {
    bond.is_none_or(|(anchor, mover, relation)| objects[mover].clear_relation(&objects[anchor]) == Some(relation))
}
