//! A reward that knows nothing: the negative control of an ablation.

use grpo::{BoxError, Prompt, Reward, Seed};
use image::RgbImage;

/// A number in `[0, 1)` that depends on the pixels and the prompt and says nothing of either: a uniform draw seeded with both.
///
/// The same picture for the same prompt has the same score, as [`grpo::testing::check_reward`] asks of every reward, and the
/// smallest change of a picture gives another. A policy can only learn pictures of it by heart; whatever else an arm
/// trained on it gains or loses is chance, or drift.
///
/// ```
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::Random;
/// use image::RgbImage;
///
/// let (prompt, black) = (Prompt::new("night"), RgbImage::new(8, 8));
/// assert_eq!(Random.score(&prompt, &black)?, Random.score(&prompt, &black)?);
/// # Ok::<(), grpo::BoxError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Reward<RgbImage> for Random {
    fn name(&self) -> &str {
        "random"
    }

    fn score(&self, prompt: &Prompt, sample: &RgbImage) -> Result<f32, BoxError> {
        let (width, height) = sample.dimensions();
        let of_prompt = Seed::new(0).named(&prompt.text).fold(u64::from(width)).fold(u64::from(height));
        let of_picture = sample
            .as_raw()
            .chunks(8)
            .fold(of_prompt, |seed, bytes| seed.fold(bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))));
        // The nearest f32 of a number just below 1 is 1; 24 bits are all that an f32 has.
        Ok((of_picture.draws().bits() >> 40) as f32 / (1_u32 << 24) as f32)
    }
}
