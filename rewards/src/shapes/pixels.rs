//! Pixels as amounts of palette colours, and the regions that they form.

use image::{Rgb, RgbImage};

use super::Color;
use super::render::{BACKGROUND, DEFAULT_SIDE};

/// A pixel with this much colour belongs to an object.
pub(super) const FOREGROUND: f32 = 0.5;
/// A pixel with this much colour says which colour it is; edges do not.
const CORE: f32 = 0.8;

/// A pixel this near to the background, in levels, is background: less than a fifth of any colour.
const FAINT: f32 = 20.0;

/// A picture of at most about twice the default size, pixel by pixel.
pub(super) struct Field {
    pub(super) width: usize,
    pub(super) height: usize,
    /// The amount of colour over the background, from 0 to 1.
    pub(super) amounts: Vec<f32>,
    colors: Vec<Color>,
    /// Pixels of the picture for one of the field's.
    scale: usize,
}

impl Field {
    /// Reads a picture; large ones are averaged over blocks first, since shapes need no more detail.
    pub(super) fn read(image: &RgbImage) -> Self {
        let scale = (image.width().min(image.height()) / DEFAULT_SIDE).max(1) as usize;
        let (width, height) = (image.width() as usize / scale, image.height() as usize / scale);
        let rays = Color::ALL.map(Ray::towards);
        let mut field = Self { width, height, amounts: Vec::new(), colors: Vec::new(), scale };
        for row in 0..height {
            for column in 0..width {
                let (color, amount) = unmix(block_mean(image, column * scale, row * scale, scale), &rays);
                field.amounts.push(amount);
                field.colors.push(color);
            }
        }
        field
    }

    pub(super) fn len(&self) -> usize {
        self.amounts.len()
    }

    /// Every pixel that belongs to an object.
    pub(super) fn foreground(&self) -> Vec<usize> {
        (0..self.len()).filter(|&pixel| self.amounts[pixel] >= FOREGROUND).collect()
    }

    /// The share of each colour among the pixels that are fully coloured, or among all where none is.
    pub(super) fn color_shares(&self, pixels: &[usize]) -> [f32; 10] {
        let count = |least: f32| {
            let mut counts = [0.0; 10];
            for &pixel in pixels.iter().filter(|&&pixel| self.amounts[pixel] >= least) {
                counts[self.colors[pixel] as usize] += 1.0;
            }
            counts
        };
        let mut counts: [f32; 10] = count(CORE);
        if counts.iter().sum::<f32>() < 1.0 {
            counts = count(FOREGROUND);
        }
        let total: f32 = counts.iter().sum();
        counts.map(|count| count / total.max(1.0))
    }

    /// The colour that prevails around each of these pixels, so that edges take that of their object.
    pub(super) fn smoothed_colors(&self, pixels: &[usize]) -> Vec<Color> {
        let mut member = vec![false; self.len()];
        pixels.iter().for_each(|&pixel| member[pixel] = true);
        let prevailing = |&pixel: &usize| {
            let mut votes = [0.0_f32; 10];
            for near in self.neighbourhood(pixel).filter(|&near| member[near]) {
                votes[self.colors[near] as usize] += self.amounts[near].powi(4);
            }
            leading(&votes).0
        };
        pixels.iter().map(prevailing).collect()
    }

    /// The pixel and the eight around it, inside the frame.
    fn neighbourhood(&self, pixel: usize) -> impl Iterator<Item = usize> {
        let (column, row) = (pixel % self.width, pixel / self.width);
        let rows = row.saturating_sub(1)..(row + 2).min(self.height);
        let columns = column.saturating_sub(1)..(column + 2).min(self.width);
        rows.flat_map(move |row| columns.clone().map(move |column| row * self.width + column))
    }

    /// The box `[x0, y0, x1, y1]` around pixels, in pixels of the picture.
    pub(super) fn bounds(&self, pixels: &[usize]) -> [f32; 4] {
        let [x0, y0, x1, y1] = self.corners(pixels);
        [x0, y0, x1 + 1, y1 + 1].map(|corner| (corner * self.scale) as f32)
    }

    /// The first and last column and row of pixels: `[x0, y0, x1, y1]`, both ends included.
    pub(super) fn corners(&self, pixels: &[usize]) -> [usize; 4] {
        pixels.iter().fold([self.width, self.height, 0, 0], |[x0, y0, x1, y1], &pixel| {
            let (x, y) = (pixel % self.width, pixel / self.width);
            [x0.min(x), y0.min(y), x1.max(x), y1.max(y)]
        })
    }
}

/// The colour with the most votes, and its votes.
pub(super) fn leading(votes: &[f32; 10]) -> (Color, f32) {
    let votes = Color::ALL.into_iter().zip(*votes);
    votes.fold((Color::Red, 0.0), |best, next| if next.1 > best.1 { next } else { best })
}

/// Splits pixels into regions that hang together by their sides, in reading order.
pub(super) fn regions(field: &Field, pixels: &[usize]) -> Vec<Vec<usize>> {
    let mut waiting = vec![false; field.len()];
    pixels.iter().for_each(|&pixel| waiting[pixel] = true);
    let mut found = Vec::new();
    for &start in pixels {
        if !std::mem::take(&mut waiting[start]) {
            continue;
        }
        found.push(grow(field, start, &mut waiting));
    }
    found
}

/// Everything waiting that hangs together with a pixel.
fn grow(field: &Field, start: usize, waiting: &mut [bool]) -> Vec<usize> {
    let mut region = vec![start];
    let mut next = 0;
    while let Some(&pixel) = region.get(next) {
        next += 1;
        let sides = sides(field, pixel).into_iter().flatten();
        region.extend(sides.filter(|&near| std::mem::take(&mut waiting[near])));
    }
    region
}

fn sides(field: &Field, pixel: usize) -> [Option<usize>; 4] {
    let (column, row) = (pixel % field.width, pixel / field.width);
    [
        (column > 0).then(|| pixel - 1),
        (column + 1 < field.width).then(|| pixel + 1),
        (row > 0).then(|| pixel - field.width),
        (row + 1 < field.height).then(|| pixel + field.width),
    ]
}

fn block_mean(image: &RgbImage, x: usize, y: usize, scale: usize) -> [f32; 3] {
    let mut sum = [0.0; 3];
    for row in y..y + scale {
        for column in x..x + scale {
            let Rgb(levels) = image.get_pixel(column as u32, row as u32);
            sum.iter_mut().zip(levels).for_each(|(sum, &level)| *sum += f32::from(level));
        }
    }
    sum.map(|sum| sum / (scale * scale) as f32)
}

/// The way from the background to a colour.
struct Ray {
    color: Color,
    way: [f32; 3],
    length_squared: f32,
}

impl Ray {
    fn towards(color: Color) -> Self {
        let rgb = color.rgb();
        let way = [0, 1, 2].map(|channel| f32::from(rgb[channel]) - f32::from(BACKGROUND[channel]));
        Self { color, way, length_squared: way.iter().map(|part| part * part).sum() }
    }

    /// How far along the way a pixel lies, and the square of its distance from it.
    fn project(&self, offset: [f32; 3]) -> (f32, f32) {
        let dot: f32 = self.way.iter().zip(offset).map(|(way, part)| way * part).sum();
        let amount = (dot / self.length_squared).clamp(0.0, 1.0);
        let miss = self.way.iter().zip(offset).map(|(way, part)| (part - amount * way).powi(2)).sum();
        (amount, miss)
    }
}

/// The colour on whose way a pixel lies best, and how far along.
fn unmix(rgb: [f32; 3], rays: &[Ray; 10]) -> (Color, f32) {
    let offset = [0, 1, 2].map(|channel| rgb[channel] - f32::from(BACKGROUND[channel]));
    let start = (Color::Red, 0.0, f32::INFINITY);
    if offset.iter().map(|part| part * part).sum::<f32>() < FAINT * FAINT {
        return (start.0, start.1);
    }
    let (color, amount, _) = rays.iter().fold(start, |best, ray| {
        let (amount, miss) = ray.project(offset);
        if miss < best.2 { (ray.color, amount, miss) } else { best }
    });
    (color, amount)
}
