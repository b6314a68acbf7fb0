//! Rotary position embedding in the rotate-half form (Su et al., 2021, arXiv 2104.09864, eq. 34).
//!
//! Angles are computed in f64 and kept in f32: in bf16 only 769 of the first 4,096 positions would differ.
//!
//! In two dimensions, as in Qwen2-VL (arXiv 2409.12191, section 2.1) with two axes: text turns by its index in the row;
//! the token of an image that begins at index `s` turns by `s +` its line in one half of the frequencies and by `s +` its
//! column in the other. The halves alternate, so both axes have long and short waves, and text behaves as in one
//! dimension, to the bit.

use candle_core::{D, Device, Result, Tensor, bail};

/// Cosines and sines of every position and frequency, `[positions, head_dim / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    /// Where images stand in two dimensions; `None` where all is one line.
    plane: Option<Plane>,
}

/// How images lie in rows whose positions are two-dimensional.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plane {
    /// Tokens in a line of the image.
    pub(crate) columns: usize,
    /// The id behind which an image begins.
    pub(crate) after_id: u32,
}

/// Where a token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its index in the row.
    pub(crate) index: usize,
    /// The index of its row's first image token; [`NO_IMAGE`] where there is none.
    pub(crate) image_start: usize,
}

/// The start of an image that a row does not have.
pub(crate) const NO_IMAGE: usize = usize::MAX;

impl Place {
    /// Places of a row's first `n` tokens.
    pub(crate) fn of_row(image_start: usize, n: usize) -> impl Iterator<Item = Self> {
        (0..n).map(move |index| Self { index, image_start })
    }
}

impl Rope {
    /// Tables for `positions` positions of heads of `head_dim` numbers.
    pub(crate) fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let angle = |index: usize| {
            let (position, frequency) = (index / half, index % half);
            position as f64 * theta.powf(-2.0 * frequency as f64 / head_dim as f64)
        };
        Self {
            cos: (0..positions * half).map(|index| angle(index).cos() as f32).collect(),
            sin: (0..positions * half).map(|index| angle(index).sin() as f32).collect(),
            half,
            plane: None,
        }
    }

    /// The same with images in two dimensions, or in none of their own.
    pub(crate) fn with_plane(self, plane: Option<Plane>) -> Self {
        Self { plane, ..self }
    }

    /// Cosines and sines, `[positions, head_dim / 2]` each.
    #[cfg(feature = "cuda")]
    pub(crate) fn numbers(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Where images stand in two dimensions.
    pub(crate) fn plane(&self) -> Option<Plane> {
        self.plane
    }

    /// Where a row's image begins, given where it does in what was read before `ids`, which stand from `first` on.
    pub(crate) fn image_start(&self, before: usize, ids: &[u32], first: usize) -> usize {
        match self.plane {
            Some(plane) if before == NO_IMAGE => {
                ids.iter().position(|id| *id == plane.after_id).map_or(NO_IMAGE, |at| first + at + 1)
            }
            _ => before,
        }
    }

    /// Positions along the two axes.
    #[inline(always)]
    fn axes(&self, place: Place) -> (usize, usize) {
        match self.plane {
            Some(plane) if place.index >= place.image_start => {
                let token = place.index - place.image_start;
                (place.image_start + token / plane.columns, place.image_start + token % plane.columns)
            }
            _ => (place.index, place.index),
        }
    }

    /// How many positions the tables hold.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Rotates one head in place.
    #[inline(always)]
    pub(crate) fn rotate(&self, head: &mut [f32], place: Place) {
        self.turn(head, place, 1.0);
    }

    /// Undoes [`Rope::rotate`]; a rotation's transpose is its inverse, so this is also its backward pass.
    #[inline(always)]
    pub(crate) fn rotate_back(&self, head: &mut [f32], place: Place) {
        self.turn(head, place, -1.0);
    }

    #[inline(always)]
    fn turn(&self, head: &mut [f32], place: Place, sign: f32) {
        let (line, column) = self.axes(place);
        if line == column {
            let table = line * self.half..(line + 1) * self.half;
            turn(head, &self.cos[table.clone()], &self.sin[table], sign);
        } else {
            self.turn_in_plane(head, (line, column), sign);
        }
    }

    #[inline(always)]
    fn turn_in_plane(&self, head: &mut [f32], axes: (usize, usize), sign: f32) {
        let (low, high) = head.split_at_mut(self.half);
        for (frequency, (low, high)) in low.iter_mut().zip(high).enumerate() {
            let at = self.table_index(axes, frequency);
            let (x, y, cos, sin) = (*low, *high, self.cos[at], sign * self.sin[at]);
            *low = x * cos - y * sin;
            *high = y * cos + x * sin;
        }
    }

    /// Where the tables hold a frequency's angle: even ones turn by the line, odd ones by the column.
    #[inline(always)]
    fn table_index(&self, (line, column): (usize, usize), frequency: usize) -> usize {
        let position = if frequency.is_multiple_of(2) { line } else { column };
        position * self.half + frequency
    }

    /// Cosines and sines of a token, `[head_dim / 2]` each.
    fn angles(&self, place: Place) -> (Vec<f32>, Vec<f32>) {
        let axes = self.axes(place);
        let of = |table: &[f32]| (0..self.half).map(|frequency| table[self.table_index(axes, frequency)]).collect();
        (of(&self.cos), of(&self.sin))
    }

    /// Rotates `x`, `[.., head_dim]`, by cosines and sines that broadcast to `[.., head_dim / 2]`.
    pub(crate) fn composite_with(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
        let low = x.narrow(D::Minus1, 0, self.half)?.contiguous()?;
        let high = x.narrow(D::Minus1, self.half, self.half)?.contiguous()?;
        let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[turned_low, turned_high], D::Minus1)
    }

    /// Cosines and sines of tokens as tensors, `[n, head_dim / 2]` each.
    pub(crate) fn tables(&self, places: impl IntoIterator<Item = Place>, device: &Device) -> Result<(Tensor, Tensor)> {
        let (mut cos, mut sin, mut n) = (Vec::new(), Vec::new(), 0);
        for place in places {
            if place.index >= self.positions() {
                bail!("position {} asked of rotary tables that hold {}", place.index, self.positions());
            }
            let angles = self.angles(place);
            cos.extend(angles.0);
            sin.extend(angles.1);
            n += 1;
        }
        Ok((Tensor::from_vec(cos, (n, self.half), device)?, Tensor::from_vec(sin, (n, self.half), device)?))
    }
}

#[inline(always)]
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (x, y, sin) = (*low, *high, sign * sin);
        *low = x * cos - y * sin;
        *high = y * cos + x * sin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{distance, normals};

    fn places(n: usize, image_start: usize) -> Vec<Place> {
        Place::of_row(image_start, n).collect()
    }

    #[test]
    fn slices_and_composite_agree_and_back_is_the_inverse() {
        for (rope, image_start) in [
            (Rope::new(8, 1e4, 12), NO_IMAGE),
            (Rope::new(8, 1e4, 12).with_plane(Some(Plane { columns: 3, after_id: 7 })), 4),
        ] {
            let values = normals(1, 12 * 8);
            let mut turned = values.clone();
            for (place, head) in places(12, image_start).into_iter().zip(turned.chunks_mut(8)) {
                rope.rotate(head, place);
            }
            let x = Tensor::from_vec(values.clone(), (12, 8), &Device::Cpu).unwrap();
            let got = Tensor::from_vec(turned.clone(), (12, 8), &Device::Cpu).unwrap();
            let (cos, sin) = rope.tables(places(12, image_start), &Device::Cpu).unwrap();
            assert!(distance(&got, &rope.composite_with(&x, &cos, &sin).unwrap()) < 1e-6);
            for (place, head) in places(12, image_start).into_iter().zip(turned.chunks_mut(8)) {
                rope.rotate_back(head, place);
            }
            assert!(turned.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-6));
            assert_eq!(turned[..8], values[..8], "position 0 is not turned");
        }
    }

    /// Text in front of an image turns as in one dimension; of the image, even frequencies turn by the line and odd ones
    /// by the column, both counted from where the image begins.
    #[test]
    fn an_image_stands_in_two_dimensions() {
        let rope = Rope::new(8, 1e4, 40).with_plane(Some(Plane { columns: 3, after_id: 7 }));
        let ids = [1, 5, 7, 9, 9, 9, 9, 9];
        let start = rope.image_start(NO_IMAGE, &ids, 0);
        assert_eq!(start, 3);
        assert_eq!(rope.image_start(NO_IMAGE, &ids[3..], 3), NO_IMAGE);
        assert_eq!(rope.image_start(3, &[7], 8), 3);
        for (index, line, column) in [(0, 0, 0), (2, 2, 2), (3, 3, 3), (5, 3, 5), (6, 4, 3), (7, 4, 4)] {
            let (cos, sin) = rope.angles(Place { index, image_start: start });
            for (frequency, position) in [line, column, line, column].into_iter().enumerate() {
                let angle = f64::from(position) * 1e4f64.powf(-2.0 * frequency as f64 / 8.0);
                assert!((f64::from(cos[frequency]) - angle.cos()).abs() < 1e-6, "index {index}, {frequency}");
                assert!((f64::from(sin[frequency]) - angle.sin()).abs() < 1e-6, "index {index}, {frequency}");
            }
        }
    }

    #[test]
    fn more_positions_than_the_tables_hold_is_an_error() {
        assert!(Rope::new(4, 1e4, 2).tables(places(3, NO_IMAGE), &Device::Cpu).is_err());
    }
}
