//! Which outline fits a region best.

use super::Class;
use super::geometry::Outline;
use super::pixels::{FOREGROUND, Field};

/// How many times steeper than the pixels' own the edges are compared: blur then matters less, place still does.
const STEEPNESS: f32 = 2.0;
/// Pixels around a region that are compared too.
const FRAME: usize = 2;
/// Classes whose fit is refined; the moments alone rule out the others.
const CANDIDATES: usize = 3;
/// The steps of the refinement, in pixels.
const STEPS: [f32; 2] = [0.5, 0.25];
/// Knots along a side of the tables of distances, and the edge of the square that they cover. Between knots
/// the distance is interpolated, to within 0.05 pixels at the sizes of this world.
const KNOTS: usize = 129;
const REACH: f32 = 1.5;

/// A region's soft mask.
pub(super) struct Patch {
    width: usize,
    mask: Vec<f32>,
}

impl Patch {
    /// Cuts out a region with the faint pixels around it; what belongs to other regions is left out.
    pub(super) fn around(field: &Field, pixels: &[usize]) -> Self {
        let [x0, y0, x1, y1] = field.corners(pixels);
        let mut member = vec![false; field.len()];
        pixels.iter().for_each(|&pixel| member[pixel] = true);
        let width = x1 + 1 + 2 * FRAME - x0;
        let height = y1 + 1 + 2 * FRAME - y0;
        let value = |cell: usize| {
            let (x, y) = ((x0 + cell % width).checked_sub(FRAME)?, (y0 + cell / width).checked_sub(FRAME)?);
            let pixel = (x < field.width && y < field.height).then(|| y * field.width + x)?;
            let amount = field.amounts[pixel];
            (member[pixel] || amount < FOREGROUND).then(|| steep(amount - 0.5))
        };
        Self { width, mask: (0..width * height).map(|cell| value(cell).unwrap_or(0.0)).collect() }
    }

    /// Area and centre of gravity.
    fn moments(&self) -> (f32, f32, f32) {
        let (mut area, mut x, mut y) = (0.0, 0.0, 0.0);
        for (cell, &value) in self.mask.iter().enumerate() {
            area += value;
            x += value * ((cell % self.width) as f32 + 0.5);
            y += value * ((cell / self.width) as f32 + 0.5);
        }
        let area = f32::max(area, 1.0);
        (area, x / area, y / area)
    }

    /// Intersection over union with an outline at a place and size.
    fn overlap(&self, distances: &Distances, [x, y, radius]: [f32; 3]) -> f32 {
        let (mut both, mut either) = (0.0, 0.0);
        let share = 1.0 / radius;
        for (row, values) in self.mask.chunks_exact(self.width).enumerate() {
            let v = (row as f32 + 0.5 - y) * share;
            for (column, &value) in values.iter().enumerate() {
                let covered = steep(-radius * distances.at((column as f32 + 0.5 - x) * share, v));
                both += value.min(covered);
                either += value.max(covered);
            }
        }
        if either > 0.0 { both / either } else { 0.0 }
    }
}

fn steep(depth: f32) -> f32 {
    (0.5 + STEEPNESS * depth).clamp(0.0, 1.0)
}

/// The class that fits a patch best.
pub(super) struct Fit {
    pub(super) class: Class,
    /// Intersection over union with the outline.
    pub(super) overlap: f32,
    /// By how much the second class fits worse.
    pub(super) lead: f32,
}

/// The outlines with their moments.
#[derive(Clone, Debug)]
pub(super) struct Templates(Vec<Template>);

#[derive(Clone, Debug)]
struct Template {
    class: Class,
    distances: Distances,
    area: f32,
    /// The centre of gravity is on the axis of symmetry, this far down.
    drop: f32,
}

/// An outline's distances as a table: every fit reads them thousands of times.
#[derive(Clone, Debug)]
struct Distances(Vec<f32>);

impl Distances {
    fn of(outline: &Outline) -> Self {
        let cells = 0..KNOTS * KNOTS;
        Self(cells.map(|cell| outline.distance(Self::place(cell % KNOTS), Self::place(cell / KNOTS))).collect())
    }

    fn place(knot: usize) -> f32 {
        REACH * (2.0 * knot as f32 / (KNOTS - 1) as f32 - 1.0)
    }

    /// The distance at a place; beyond the table, that of its border, which is far enough outside.
    fn at(&self, x: f32, y: f32) -> f32 {
        let knot = |place: f32| {
            let along = ((place / REACH + 1.0) * 0.5 * (KNOTS - 1) as f32).clamp(0.0, (KNOTS - 1) as f32 - 0.001);
            (along as usize, along.fract())
        };
        let ((column, right), (row, down)) = (knot(x), knot(y));
        let first = row * KNOTS + column;
        let mix = |a: f32, b: f32, share: f32| a + share * (b - a);
        let along = |start: usize| mix(self.0[start], self.0[start + 1], right);
        mix(along(first), along(first + KNOTS), down)
    }
}

impl Template {
    fn of(class: Class) -> Self {
        let distances = Distances::of(&Outline::of(class));
        let inside = || (0..KNOTS * KNOTS).filter(|&cell| distances.0[cell] < 0.0);
        let (count, cell) = (inside().count() as f32, (2.0 * REACH / (KNOTS - 1) as f32).powi(2));
        let drop = inside().map(|cell| Distances::place(cell / KNOTS)).sum::<f32>() / count;
        Self { class, area: count * cell, drop, distances }
    }

    /// Where the moments put it.
    fn guess(&self, (area, x, y): (f32, f32, f32)) -> [f32; 3] {
        let radius = (area / self.area).sqrt();
        [x, y - self.drop * radius, radius]
    }

    /// The best overlap near a first guess: place and size move while that helps.
    fn refine(&self, patch: &Patch, mut best: [f32; 3]) -> f32 {
        let mut overlap = patch.overlap(&self.distances, best);
        let moves = STEPS.into_iter().flat_map(|step| (0..3).flat_map(move |axis| [(axis, -step), (axis, step)]));
        for (axis, step) in moves {
            let mut moved = best;
            moved[axis] = f32::max(moved[axis] + step, 0.5);
            let found = patch.overlap(&self.distances, moved);
            if found > overlap {
                (best, overlap) = (moved, found);
            }
        }
        overlap
    }
}

impl Templates {
    pub(super) fn new() -> Self {
        Self(Class::ALL.map(Template::of).into())
    }

    pub(super) fn fit(&self, patch: &Patch) -> Fit {
        let moments = patch.moments();
        let mut ranked: Vec<(f32, &Template, [f32; 3])> = self
            .0
            .iter()
            .map(|template| {
                let guess = template.guess(moments);
                (patch.overlap(&template.distances, guess), template, guess)
            })
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (overlap, template, guess) in ranked.iter_mut().take(CANDIDATES) {
            *overlap = template.refine(patch, *guess);
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        let lead = ranked[0].0 - ranked[1].0;
        Fit { class: ranked[0].1.class, overlap: ranked[0].0, lead }
    }
}
