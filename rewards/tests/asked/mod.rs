//! What a program or a server is asked about in tests, and what must come of its failures.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helpers may fail the test")]

use grpo::{Prompt, Reward};
use image::{Rgb, RgbImage};

pub const N_ROWS: usize = 6;

/// Prompts and pictures whose first red is `10 * row`.
pub fn rows(n_rows: usize) -> Vec<(Prompt, RgbImage)> {
    let picture = |row| RgbImage::from_fn(9, 5, |x, y| Rgb([if x + y == 0 { 10 * row } else { 200 }, y as u8, 3]));
    (0..n_rows as u8).map(|row| (Prompt::new(format!("prompt {row}")).with("row", row), picture(row))).collect()
}

pub fn batch(rows: &[(Prompt, RgbImage)]) -> Vec<(&Prompt, &RgbImage)> {
    rows.iter().map(|(prompt, image)| (prompt, image)).collect()
}

/// Exactly `failed` rows fail with `message`; every other score is `expected` of its row to the last bit.
pub fn check_failures(reward: &impl Reward<RgbImage>, expected: fn(usize) -> f32, failed: &[usize], message: &str) {
    let rows = rows(N_ROWS);
    let each = reward.score_each(&batch(&rows));
    assert_eq!(each.len(), N_ROWS);
    for (row, verdict) in each.iter().enumerate() {
        match (failed.contains(&row), verdict) {
            (true, Err(error)) => assert!(error.to_string().contains(message), "row {row}: {error} lacks {message}"),
            (false, Ok(score)) => assert_eq!(*score, expected(row), "row {row}"),
            (_, verdict) => panic!("row {row}, where {failed:?} should fail with {message}: {verdict:?}"),
        }
    }
    let error = reward.score_batch(&batch(&rows)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("row {}: ", failed[0])), "{error}");
    assert!(error.contains(message), "{error} lacks {message}");
}
