//! From a line to its characters.

use super::lines::Line;

/// The height in pixels that the recogniser was trained on.
pub(super) const HEIGHT: usize = 48;
/// Shorter lines are padded to this width.
const MIN_WIDTH: usize = 320;
/// A line as long as this many heights is a picture of something else.
const MAX_WIDTH: usize = 64 * HEIGHT;

/// A line as the recogniser takes it, `[3, 48, width]`, blue first, -1 to 1, zeros behind its end; and that width.
pub(super) fn input(line: &Line) -> (Vec<f32>, usize) {
    let resized = (HEIGHT * line.width).div_ceil(line.height).clamp(1, MAX_WIDTH);
    let width = (HEIGHT * line.width / line.height).clamp(MIN_WIDTH, MAX_WIDTH).max(resized);
    let scale = [line.width as f32 / resized as f32, line.height as f32 / HEIGHT as f32];
    let mut input = vec![0.0; 3 * HEIGHT * width];
    for y in 0..HEIGHT {
        for x in 0..resized {
            let color = bilinear(line, [x, y], scale);
            for (channel, value) in color.into_iter().rev().enumerate() {
                input[(channel * HEIGHT + y) * width + x] = value / 127.5 - 1.0;
            }
        }
    }
    (input, width)
}

/// The colour of a pixel of a resized line, from the four pixels around its centre.
fn bilinear(line: &Line, at: [usize; 2], scale: [f32; 2]) -> [f32; 3] {
    let tap = |at: usize, scale: f32, limit: usize| {
        let position = ((at as f32 + 0.5) * scale - 0.5).clamp(0.0, (limit - 1) as f32);
        let first = position as usize;
        (first, (first + 1).min(limit - 1), position - first as f32)
    };
    let (left, right, across) = tap(at[0], scale[0], line.width);
    let (top, bottom, down) = tap(at[1], scale[1], line.height);
    [0, 1, 2].map(|channel| {
        let value = |x: usize, y: usize| line.pixels[(y * line.width + x) * 3 + channel];
        let upper = value(left, top) + across * (value(right, top) - value(left, top));
        let lower = value(left, bottom) + across * (value(right, bottom) - value(left, bottom));
        upper + down * (lower - upper)
    })
}

/// The likeliest class of each step, repeats joined and blanks left out; and the mean probability of what is left.
pub(super) fn decoded(probabilities: &[f32], characters: &[String]) -> (String, f32) {
    let n_classes = characters.len() + 1;
    let (mut text, mut kept, mut previous) = (String::new(), Vec::new(), 0);
    for step in probabilities.chunks_exact(n_classes) {
        let (class, probability) =
            step.iter().enumerate().fold(
                (0, f32::MIN),
                |best, (class, &probability)| {
                    if probability > best.1 { (class, probability) } else { best }
                },
            );
        if class != previous && class > 0 {
            text.push_str(&characters[class - 1]);
            kept.push(probability);
        }
        previous = class;
    }
    let mean = if kept.is_empty() { 0.0 } else { kept.iter().sum::<f32>() / kept.len() as f32 };
    (text, mean)
}

/// How much of `wanted` is in what was read, 0 to 1, as Flow-GRPO counts it: 1 less the edit distance as a share of its
/// length, and 1 where it stands anywhere in it; case and white space are ignored, and what else was read costs no more than all of it.
pub(super) fn agreement(read: &str, wanted: &str) -> Option<f32> {
    let plain = |text: &str| text.to_lowercase().chars().filter(|c| !c.is_whitespace()).collect::<Vec<char>>();
    let (read, wanted) = (plain(read), plain(wanted));
    if wanted.is_empty() {
        return None;
    }
    if read.windows(wanted.len()).any(|part| part == wanted) {
        return Some(1.0);
    }
    let distance = edit_distance(&read, &wanted).min(wanted.len());
    Some(1.0 - distance as f32 / wanted.len() as f32)
}

/// Insertions, deletions and replacements from one text to the other (Levenshtein, 1966).
fn edit_distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (at, from) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[b.len()]
}
