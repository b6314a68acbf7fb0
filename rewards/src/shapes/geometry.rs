//! The outlines, once: what is drawn, what is looked for and what a box is all come from here.
//!
//! Outlines live in the square from -1 to 1 on both axes, y downwards, and touch it on at least one axis.

use std::f32::consts::PI;

use super::Class;

/// The hole's share of a ring's radius.
const HOLE: f32 = 0.52;
/// Half of a square's side: a full one looks much larger than the circle of the same radius.
const HALF_SIDE: f32 = 0.9;
/// Half the width of a cross's arms.
const HALF_ARM: f32 = 0.34;
/// The inner radius of a star; sharper points would vanish at 13 pixels.
const NOTCH: f32 = 0.45;

/// The edge of a class.
#[derive(Clone, Debug)]
pub(super) enum Outline {
    /// A disc of radius 1 around a hole of this radius.
    Round(f32),
    /// A closed polygon.
    Polygon(Vec<[f32; 2]>),
}

impl Outline {
    pub(super) fn of(class: Class) -> Self {
        match class {
            Class::Circle => Self::Round(0.0),
            Class::Ring => Self::Round(HOLE),
            Class::Square => {
                let s = HALF_SIDE;
                Self::Polygon(vec![[-s, -s], [s, -s], [s, s], [-s, s]])
            }
            Class::Triangle => Self::Polygon(vec![[0.0, -0.95], [1.0, 0.85], [-1.0, 0.85]]),
            Class::Star => Self::Polygon((0..10).map(star_corner).collect()),
            Class::Cross => {
                let a = HALF_ARM;
                let arm = [[-a, -1.0], [a, -1.0], [a, -a]];
                // Each arm is the one before, turned by a quarter.
                let turn = |[x, y]: [f32; 2], quarters| (0..quarters).fold([x, y], |[x, y], _| [-y, x]);
                Self::Polygon((0..4).flat_map(|quarters| arm.map(|corner| turn(corner, quarters))).collect())
            }
        }
    }

    /// The distance to the edge, negative inside.
    pub(super) fn distance(&self, x: f32, y: f32) -> f32 {
        match self {
            Self::Round(hole) => {
                let radius = x.hypot(y);
                // A circle's hole has radius 0 and must not make its centre an edge.
                if *hole > 0.0 { (radius - 1.0).max(hole - radius) } else { radius - 1.0 }
            }
            Self::Polygon(corners) => polygon_distance(corners, x, y),
        }
    }

    /// The box `[x0, y0, x1, y1]`.
    pub(super) fn bounds(&self) -> [f32; 4] {
        match self {
            Self::Round(_) => [-1.0, -1.0, 1.0, 1.0],
            Self::Polygon(corners) => corners
                .iter()
                .fold([1.0, 1.0, -1.0, -1.0], |[x0, y0, x1, y1], &[x, y]| [x0.min(x), y0.min(y), x1.max(x), y1.max(y)]),
        }
    }
}

fn star_corner(corner: usize) -> [f32; 2] {
    let angle = corner as f32 * PI / 5.0;
    let radius = if corner.is_multiple_of(2) { 1.0 } else { NOTCH };
    [radius * angle.sin(), -radius * angle.cos()]
}

/// Least distance to the edges; the sign by counting the edges that a ray to the right crosses.
fn polygon_distance(corners: &[[f32; 2]], x: f32, y: f32) -> f32 {
    let mut least = f32::INFINITY;
    let mut inside = false;
    for (row, &[ax, ay]) in corners.iter().enumerate() {
        let [bx, by] = corners[(row + 1) % corners.len()];
        let (ex, ey, px, py) = (bx - ax, by - ay, x - ax, y - ay);
        let along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
        least = least.min((px - along * ex).hypot(py - along * ey));
        if (ay > y) != (by > y) && px < ex * py / ey {
            inside = !inside;
        }
    }
    if inside { -least } else { least }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_plane_geometry() {
        let check = |class, x, y, expected: f32| {
            let got = Outline::of(class).distance(x, y);
            assert!((got - expected).abs() < 1e-5, "{class} at ({x}, {y}): {got}, not {expected}");
        };
        check(Class::Circle, 0.0, 0.0, -1.0);
        check(Class::Circle, 3.0, 4.0, 4.0);
        check(Class::Ring, 0.0, 0.0, HOLE);
        check(Class::Ring, 0.76, 0.0, -0.24);
        check(Class::Square, 0.5, 0.0, -0.4);
        check(Class::Square, 1.2, 1.3, 0.5);
        check(Class::Cross, 0.0, 0.0, -HALF_ARM * 2.0_f32.sqrt());
        check(Class::Cross, 0.0, -0.9, -0.1);
        check(Class::Cross, 0.9, 0.44, 0.1);
        check(Class::Triangle, 0.0, 0.8, -0.05);
        check(Class::Star, 0.0, -1.25, 0.25);
    }

    #[test]
    fn outlines_touch_the_unit_square_and_stay_inside() {
        for class in Class::ALL {
            let bounds = Outline::of(class).bounds();
            assert!(bounds.iter().all(|side| side.abs() <= 1.0 + 1e-6), "{class}: {bounds:?}");
            assert!(bounds.iter().any(|side| side.abs() >= HALF_SIDE), "{class}: {bounds:?}");
        }
    }
}
