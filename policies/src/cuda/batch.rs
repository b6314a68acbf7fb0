//! Rows of ids as the kernels read them: one behind another, without padding.

use candle_core::Result;

use super::gpu::{Buffer, Gpu};
use crate::ops::rope::{NO_IMAGE, Rope};

/// Queries, and keys, of a block of attention: attention.cu's QUERIES and KEYS.
const TILE: usize = 64;

/// Where an image begins, as the kernels know it: beyond every token where there is none.
pub(super) fn image_start(start: usize) -> i32 {
    if start == NO_IMAGE { i32::MAX } else { start as i32 }
}

/// What a batch is, on the card.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) n_tokens: usize,
    /// Each row's first token.
    pub(super) starts: Vec<usize>,
    pub(super) ids: Buffer,
    /// Each token's place in its row, and where that row's image begins.
    pub(super) index: Buffer,
    pub(super) image: Buffer,
    /// attention.cu's tiles.
    pub(super) tiles: Buffer,
    pub(super) n_tiles: usize,
}

impl Batch {
    pub(super) fn new(gpu: &Gpu, rows: &[&[u32]], rope: &Rope) -> Result<Self> {
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.iter().copied()).collect();
        let (mut starts, mut index, mut image, mut tiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::<i32>::new());
        for row in rows {
            let first = index.len();
            starts.push(first);
            index.extend(0..row.len() as i32);
            let begins = image_start(rope.image_start(NO_IMAGE, row, 0));
            image.extend(std::iter::repeat_n(begins, row.len()));
            for start in (0..row.len()).step_by(TILE) {
                tiles.extend([first as i32, row.len() as i32, start as i32, 0]);
            }
        }
        Ok(Self {
            n_tokens: ids.len(),
            starts,
            n_tiles: tiles.len() / 4,
            ids: gpu.upload(&ids)?,
            index: gpu.upload(&index)?,
            image: gpu.upload(&image)?,
            tiles: gpu.upload(&tiles)?,
        })
    }
}

/// For each id that occurs, in their order, the tokens that read it: ids, first place of each in the order, and the order.
pub(super) fn readers(ids: &[u32]) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|token| ids[*token as usize]);
    let (mut occurring, mut first) = (Vec::new(), Vec::new());
    for (place, token) in order.iter().enumerate() {
        let id = ids[*token as usize];
        if occurring.last() != Some(&id) {
            occurring.push(id);
            first.push(place as u32);
        }
    }
    first.push(order.len() as u32);
    (occurring, first, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_of_an_id_stand_in_their_order() {
        let (ids, first, order) = readers(&[7, 3, 7, 9, 3, 7]);
        assert_eq!((ids, first, order), (vec![3, 7, 9], vec![0, 2, 5, 6], vec![1, 4, 0, 2, 5, 3]));
        assert_eq!(readers(&[]), (vec![], vec![0], vec![]));
    }
}
