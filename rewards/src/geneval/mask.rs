//! Which pixels of a picture an object covers.

use std::sync::Arc;

use grpo::{Error, Result};

/// The most pixels of a mask: a picture of 8192 x 8192.
const MAX_PIXELS: usize = 1 << 26;

/// A picture's pixels, each in or out of an object; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    width: usize,
    height: usize,
    inside: Inside,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Inside {
    /// Row by row from the top left.
    Pixels(Arc<[bool]>),
    /// Where each run ends, counted down the columns from the top left; the first, third, ... run is outside.
    Runs(Arc<[usize]>),
}

impl Mask {
    /// A mask of `width` columns; `inside` holds whole rows from the top left, at least one.
    pub fn new(width: usize, inside: Vec<bool>) -> Result<Self> {
        if width == 0 || inside.is_empty() || !inside.len().is_multiple_of(width) {
            return Err(Error::config(format!(
                "a mask of width {width} has {} pixels; give whole rows, at least one",
                inside.len()
            )));
        }
        Ok(Self { width, height: inside.len() / width, inside: Inside::Pixels(inside.into()) })
    }

    /// A mask from COCO's run lengths, not compressed: down the columns from the top left, pixels outside first.
    ///
    /// It takes the memory of its runs, not of its pixels, so a short text cannot ask for much.
    pub fn from_runs(width: usize, height: usize, counts: &[usize]) -> Result<Self> {
        let n_pixels = width.checked_mul(height).filter(|&n| 0 < n && n <= MAX_PIXELS);
        let n_pixels = n_pixels.ok_or_else(|| {
            Error::config(format!("a mask of {width} x {height} pixels; give 1 to {MAX_PIXELS} of them"))
        })?;
        let mut ends = Vec::with_capacity(counts.len());
        let mut end = 0_usize;
        for &count in counts {
            end = end.saturating_add(count);
            ends.push(end);
        }
        if end != n_pixels {
            return Err(Error::config(format!(
                "the runs of a mask cover {end} pixels of {width} x {height}; cover each of them once"
            )));
        }
        Ok(Self { width, height, inside: Inside::Runs(ends.into()) })
    }

    /// Columns and rows.
    pub fn dimensions(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// Whether the object covers this pixel; `false` outside the picture.
    pub fn contains(&self, x: usize, y: usize) -> bool {
        if x >= self.width || y >= self.height {
            return false;
        }
        match &self.inside {
            Inside::Pixels(pixels) => pixels.get(y * self.width + x).copied().unwrap_or(false),
            Inside::Runs(ends) => ends.partition_point(|&end| end <= x * self.height + y) % 2 == 1,
        }
    }

    /// The corners `[x0, y0, x1, y1]` around the pixels, the second one past the last pixel; zeros for an empty mask.
    pub fn bounds(&self) -> [f32; 4] {
        let mut found: Option<[usize; 4]> = None;
        for y in 0..self.height {
            for x in (0..self.width).filter(|&x| self.contains(x, y)) {
                let [x0, y0, x1, y1] = found.unwrap_or([x, y, x, y]);
                found = Some([x0.min(x), y0, x1.max(x), y1.max(y)]);
            }
        }
        found.map_or([0.0; 4], |[x0, y0, x1, y1]| [x0, y0, x1 + 1, y1 + 1].map(|corner| corner as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As pycocotools 2.0.11's `mask.decode(mask.frPyObjects({"size": [3, 4], "counts": [1, 3, 4, 2, 2]}, 3, 4))`.
    #[test]
    fn runs_go_down_the_columns() {
        let mask = Mask::from_runs(4, 3, &[1, 3, 4, 2, 2]).unwrap();
        let row = |y| (0..5).map(|x| if mask.contains(x, y) { '1' } else { '0' }).collect::<String>();
        assert_eq!([row(0), row(1), row(2), row(3)], ["01010", "10000", "10100", "00000"]);
        assert_eq!(mask.bounds(), [0.0, 0.0, 4.0, 3.0]);
        assert_eq!(Mask::from_runs(4, 3, &[4, 2, 6]).unwrap().bounds(), [1.0, 1.0, 2.0, 3.0]);
        assert_eq!(Mask::from_runs(4, 3, &[12]).unwrap().bounds(), [0.0; 4]);
    }

    #[test]
    fn runs_cover_the_picture_once() {
        let cases: [(usize, usize, &[usize], &str); 5] = [
            (4, 3, &[1, 3], "cover 4 pixels of 4 x 3"),
            (4, 3, &[13], "cover 13 pixels"),
            (4, 3, &[usize::MAX, 2], "cover 18446744073709551615 pixels"),
            (4, 0, &[], "give 1 to 67108864"),
            (8193, 8192, &[], "give 1 to 67108864"),
        ];
        for (width, height, counts, expected) in cases {
            let message = Mask::from_runs(width, height, counts).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }
}
