//! Which pixels of a picture an object covers.

use grpo::{Error, Result};

/// A picture's pixels, each in or out of an object; row by row from the top left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    width: usize,
    inside: Vec<bool>,
}

impl Mask {
    /// A mask of `width` columns; `inside` holds whole rows, at least one.
    pub fn new(width: usize, inside: Vec<bool>) -> Result<Self> {
        if width == 0 || inside.is_empty() || !inside.len().is_multiple_of(width) {
            return Err(Error::config(format!(
                "a mask of width {width} has {} pixels; give whole rows, at least one",
                inside.len()
            )));
        }
        Ok(Self { width, inside })
    }

    /// Columns and rows.
    pub fn dimensions(&self) -> (usize, usize) {
        (self.width, self.inside.len() / self.width)
    }

    /// Whether the object covers this pixel; `false` outside the picture.
    pub fn contains(&self, x: usize, y: usize) -> bool {
        x < self.width && self.inside.get(y * self.width + x).copied().unwrap_or(false)
    }

    /// The corners `[x0, y0, x1, y1]` around the pixels, the second one past the last pixel; zeros for an empty mask.
    pub fn bounds(&self) -> [f32; 4] {
        let rows = self.inside.chunks(self.width);
        let row_of = |(y, row): (usize, &[bool])| row.contains(&true).then_some(y);
        let ys: Vec<usize> = rows.clone().enumerate().filter_map(row_of).collect();
        let firsts = rows.clone().filter_map(|row| row.iter().position(|&inside| inside));
        let lasts = rows.filter_map(|row| row.iter().rposition(|&inside| inside));
        match (firsts.min(), ys.first(), lasts.max(), ys.last()) {
            (Some(x0), Some(&y0), Some(x1), Some(&y1)) => [x0, y0, x1 + 1, y1 + 1].map(|corner| corner as f32),
            _ => [0.0; 4],
        }
    }
}
