//! From the detector's map of probabilities to rotated boxes (Liao et al., 2020, section 3.4).

use super::scorer::OcrScorer;

/// Regions whose short side is shorter are noise, before and after they grow.
const MIN_SIDE: f32 = 3.0;
/// Regions that are looked at, at most; a page of print has a few hundred.
const MAX_REGIONS: usize = 1000;

/// A point, x before y.
pub(super) type Point = [f32; 2];

/// A rotated rectangle: top left, top right, bottom right, bottom left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quad(pub(super) [Point; 4]);

impl Quad {
    /// The lengths of the top and the left edge.
    pub(super) fn size(&self) -> (f32, f32) {
        let [top_left, top_right, _, bottom_left] = self.0;
        (distance(top_left, top_right), distance(top_left, bottom_left))
    }
}

/// Probabilities of text, row by row.
pub(super) struct Map<'a> {
    pub(super) values: &'a [f32],
    pub(super) width: usize,
}

/// The boxes of text in the map, in its own pixels.
pub(super) fn quads(map: &Map<'_>, scorer: &OcrScorer) -> Vec<Quad> {
    let quad = |region: Vec<[usize; 2]>| {
        let inner = min_area_quad(&hull(region))?;
        let (width, height) = inner.size();
        if width.min(height) < MIN_SIDE || map.mean_inside(&inner) < scorer.box_threshold {
            return None;
        }
        let margin = width * height * scorer.unclip_ratio / (2.0 * (width + height));
        let outer = grown(&inner, margin);
        let (width, height) = outer.size();
        (width.min(height) >= MIN_SIDE + 2.0).then_some(outer)
    };
    regions(map, scorer.pixel_threshold).into_iter().filter_map(quad).collect()
}

impl Map<'_> {
    fn height(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// The mean over the pixels inside a box, whose corners are cut to whole pixels, edges included.
    fn mean_inside(&self, quad: &Quad) -> f32 {
        let corners = quad.0.map(|corner| corner.map(f32::trunc));
        let range = |axis: usize, limit: usize| {
            let values = quad.0.map(|corner| corner[axis]);
            let low = values.into_iter().fold(f32::INFINITY, f32::min).floor().max(0.0) as usize;
            let high = values.into_iter().fold(0.0, f32::max).ceil() as usize;
            low..(high + 1).min(limit)
        };
        let columns = range(0, self.width);
        let pixels = range(1, self.height()).flat_map(|y| columns.clone().map(move |x| (x, y)));
        let inside = pixels.filter(|&(x, y)| is_inside([x as f32, y as f32], &corners));
        let (mut sum, mut n_pixels) = (0.0f64, 0u32);
        for (x, y) in inside {
            sum += f64::from(self.values[y * self.width + x]);
            n_pixels += 1;
        }
        if n_pixels == 0 { 0.0 } else { (sum / f64::from(n_pixels)) as f32 }
    }
}

/// The connected regions above the threshold, each as its pixels; a pixel also fills its right and lower neighbours.
fn regions(map: &Map<'_>, threshold: f32) -> Vec<Vec<[usize; 2]>> {
    let (width, height) = (map.width, map.height());
    let above = |x: usize, y: usize| map.values[y * width + x] > threshold;
    let filled = |at: usize| {
        let (x, y) = (at % width, at / width);
        (x.saturating_sub(1)..=x).any(|x| (y.saturating_sub(1)..=y).any(|y| above(x, y)))
    };
    let mut open: Vec<bool> = (0..width * height).map(filled).collect();
    let mut regions = Vec::new();
    for start in 0..open.len() {
        if !open[start] {
            continue;
        }
        if regions.len() == MAX_REGIONS {
            break;
        }
        open[start] = false;
        let (mut region, mut waiting) = (Vec::new(), vec![start]);
        while let Some(at) = waiting.pop() {
            let (x, y) = (at % width, at / width);
            region.push([x, y]);
            let neighbours = (y.saturating_sub(1)..=(y + 1).min(height - 1))
                .flat_map(|y| (x.saturating_sub(1)..=(x + 1).min(width - 1)).map(move |x| y * width + x));
            waiting.extend(neighbours.filter(|&at| std::mem::take(&mut open[at])));
        }
        regions.push(region);
    }
    regions
}

/// The convex hull, by Andrew's monotone chain, in order around it.
fn hull(mut points: Vec<[usize; 2]>) -> Vec<Point> {
    points.sort_unstable();
    points.dedup();
    let points: Vec<Point> = points.into_iter().map(|point| point.map(|value| value as f32)).collect();
    let half = |points: &mut dyn Iterator<Item = &Point>| {
        let mut chain: Vec<Point> = Vec::new();
        for &point in points {
            while let [.., before, last] = chain[..]
                && turn(before, last, point) <= 0.0
            {
                chain.pop();
            }
            chain.push(point);
        }
        chain.pop();
        chain
    };
    let (lower, upper) = (half(&mut points.iter()), half(&mut points.iter().rev()));
    if points.len() < 2 { points } else { [lower, upper].concat() }
}

/// The rectangle of least area around a hull: one of its edges lies on one of the hull's.
fn min_area_quad(hull: &[Point]) -> Option<Quad> {
    let mut best: Option<(f32, Quad)> = None;
    for (at, &from) in hull.iter().enumerate() {
        let to = hull[(at + 1) % hull.len()];
        let length = distance(from, to);
        if length == 0.0 {
            continue;
        }
        let along = [(to[0] - from[0]) / length, (to[1] - from[1]) / length];
        let across = [-along[1], along[0]];
        let reach = |axis: Point| {
            let on_axis = hull.iter().map(|point| dot(*point, axis));
            on_axis.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
        };
        let ((left, right), (top, bottom)) = (reach(along), reach(across));
        let area = (right - left) * (bottom - top);
        if best.as_ref().is_none_or(|(least, _)| area < *least) {
            let corner = |x: f32, y: f32| [x * along[0] + y * across[0], x * along[1] + y * across[1]];
            let corners = [corner(left, top), corner(right, top), corner(right, bottom), corner(left, bottom)];
            best = Some((area, Quad(clockwise(corners))));
        }
    }
    best.map(|(_, quad)| quad)
}

/// From the top left on: of the two leftmost corners the upper one comes first, of the others the upper one second.
pub(super) fn clockwise(mut corners: [Point; 4]) -> [Point; 4] {
    corners.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [a, b, c, d] = corners;
    let by_height = |first: Point, second: Point| if second[1] < first[1] { (second, first) } else { (first, second) };
    let ((top_left, bottom_left), (top_right, bottom_right)) = (by_height(a, b), by_height(c, d));
    [top_left, top_right, bottom_right, bottom_left]
}

/// A box with a margin on each side.
fn grown(quad: &Quad, margin: f32) -> Quad {
    let [top_left, top_right, _, bottom_left] = quad.0;
    let (width, height) = quad.size();
    let unit = |from: Point, to: Point, length: f32| [(to[0] - from[0]) / length, (to[1] - from[1]) / length];
    let (right, down) = (unit(top_left, top_right, width), unit(top_left, bottom_left, height));
    let signs = [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]];
    let mut corners = quad.0;
    for (corner, [across, along]) in corners.iter_mut().zip(signs) {
        for axis in 0..2 {
            corner[axis] += margin * (across * right[axis] + along * down[axis]);
        }
    }
    Quad(corners)
}

fn is_inside(point: Point, corners: &[Point; 4]) -> bool {
    // Corners cut to whole pixels may turn by a hair, so an edge counts as inside.
    (0..4).all(|at| turn(corners[at], corners[(at + 1) % 4], point) >= -0.5)
}

fn turn(from: Point, over: Point, to: Point) -> f32 {
    (over[0] - from[0]) * (to[1] - from[1]) - (over[1] - from[1]) * (to[0] - from[0])
}

fn dot(a: Point, b: Point) -> f32 {
    a[0] * b[0] + a[1] * b[1]
}

pub(super) fn distance(a: Point, b: Point) -> f32 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}
