//! A tensor as a pickle describes it: a storage, where to begin in it, and a stride for each dimension.

use super::Checked;
use crate::safetensors_file::half_to_f32;

/// The type of a storage's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bf16,
    F16,
    F32,
    F64,
    /// An integer, never read.
    Integer,
}

impl Kind {
    /// By the class that torch names, such as `FloatStorage`.
    pub(super) fn of_class(name: &str) -> Option<Self> {
        match name {
            "BFloat16Storage" => Some(Self::Bf16),
            "HalfStorage" => Some(Self::F16),
            "FloatStorage" => Some(Self::F32),
            "DoubleStorage" => Some(Self::F64),
            "LongStorage" | "IntStorage" | "ShortStorage" | "CharStorage" | "ByteStorage" | "BoolStorage" => {
                Some(Self::Integer)
            }
            _ => None,
        }
    }

    pub(super) fn is_float(self) -> bool {
        self != Self::Integer
    }

    /// Bytes of a number.
    fn width(self) -> usize {
        match self {
            Self::Integer => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// Little-endian numbers, rounded to f32.
    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        match self {
            Self::Integer => Vec::new(),
            Self::Bf16 => halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect(),
            Self::F16 => halves().map(half_to_f32).collect(),
            Self::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Self::F64 => bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect(),
        }
    }
}

/// The numbers of an entry of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    pub(super) kind: Kind,
    /// The entry's name below `data/`.
    pub(super) key: &'a str,
    pub(super) n_numbers: u64,
}

/// Some numbers of a storage, in an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<u64>,
}

impl View<'_> {
    /// How many numbers there are, if the storage has them all.
    pub(super) fn check(&self) -> Checked<u64> {
        let count = self.shape.iter().try_fold(1u64, |count, &size| count.checked_mul(size as u64));
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |last, (&size, &stride)| {
            last.checked_add((size as u64).saturating_sub(1).checked_mul(stride)?)
        });
        match (count, last) {
            (Some(0), _) => Ok(0),
            (Some(count), Some(last)) if last < self.storage.n_numbers => Ok(count),
            _ => Err(format!(
                "of shape {:?}, strides {:?} and offset {} lies beyond its storage of {} numbers; save the file again",
                self.shape, self.strides, self.offset, self.storage.n_numbers
            )),
        }
    }

    /// The numbers in the order of the shape, of a checked view and its storage's bytes.
    pub(super) fn values(&self, bytes: &[u8]) -> Checked<Vec<f32>> {
        let width = self.storage.kind.width();
        if self.storage.n_numbers.checked_mul(width as u64) != Some(bytes.len() as u64) {
            return Err(format!(
                "has a storage of {} numbers of {width} bytes, but `data/{}` has {} bytes; copy the file again",
                self.storage.n_numbers,
                self.storage.key,
                bytes.len()
            ));
        }
        let count = self.check()? as usize;
        let offset = self.offset as usize;
        if count == 0 || self.is_dense() {
            let numbers = bytes.get(offset * width..(offset + count) * width).unwrap_or_default();
            return Ok(self.storage.kind.decode(numbers));
        }
        let mut ordered = Vec::with_capacity(count * width);
        let (mut place, mut at) = (vec![0; self.shape.len()], offset);
        // The stride of a dimension of one is never taken and may be anything.
        let steps = self.shape.iter().zip(&self.strides);
        let steps: Vec<usize> = steps.map(|(&size, &stride)| if size == 1 { 0 } else { stride as usize }).collect();
        for _ in 0..count {
            ordered.extend_from_slice(&bytes[at * width..(at + 1) * width]);
            at = self.step(&mut place, &steps, at);
        }
        Ok(self.storage.kind.decode(&ordered))
    }

    /// Goes on to the next place, last dimension first; gives where it is.
    fn step(&self, place: &mut [usize], steps: &[usize], mut at: usize) -> usize {
        for ((place, step), size) in place.iter_mut().zip(steps).zip(&self.shape).rev() {
            *place += 1;
            at += step;
            if *place < *size {
                break;
            }
            at -= step * *place;
            *place = 0;
        }
        at
    }

    /// Whether the numbers lie one after the other in the order of the shape.
    fn is_dense(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let dense = size == 1 || stride == expected;
            expected *= size as u64;
            dense
        })
    }
}
