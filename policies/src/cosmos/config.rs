//! The shape of a tokenizer, in the words of NVIDIA's own configuration.

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

/// Widths, depths and codebook of a [`Cosmos`](super::Cosmos); `config.json` beside the weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosmosConfig {
    /// Channels that the entries of `channels_mult` multiply.
    pub channels: usize,
    /// Width of each resolution level, finest first.
    pub channels_mult: Vec<usize>,
    /// Residual blocks per encoder level; the decoder has one more.
    pub num_res_blocks: usize,
    /// Side of the Haar patches, a power of two.
    pub patch_size: usize,
    /// Channels between the encoder and the quantizer's projection.
    pub z_channels: usize,
    /// Channels that are quantized: the number of `levels`.
    pub embedding_dim: usize,
    /// Values per quantized channel; their product is the codebook.
    pub levels: Vec<u32>,
    /// Image pixels per code along each side.
    pub spatial_compression: usize,
    /// Video frames per code. For images it only decides at which levels a folded temporal convolution stands.
    pub temporal_compression: usize,
}

/// What one resampling step between two levels changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resampling {
    pub(super) space: bool,
    pub(super) time: bool,
}

impl CosmosConfig {
    /// Cosmos-1.0-Tokenizer-DV8x16x16: 64,000 codes, one per 16 x 16 pixels.
    pub fn dv8x16x16() -> Self {
        Self {
            channels: 128,
            channels_mult: vec![2, 4, 4],
            num_res_blocks: 2,
            patch_size: 4,
            z_channels: 16,
            embedding_dim: 6,
            levels: vec![8, 8, 8, 5, 5, 5],
            spatial_compression: 16,
            temporal_compression: 8,
        }
    }

    /// The miniature for the shapes world: 64 x 64 pixels become 8 x 8 codes, in Haar patches of a code's size, so that
    /// every convolution stands at the codes' resolution; with patches of 4 and a second level it learned more slowly.
    pub fn shapes() -> Self {
        Self {
            channels: 64,
            channels_mult: vec![1],
            num_res_blocks: 1,
            patch_size: 8,
            z_channels: 16,
            embedding_dim: 4,
            levels: vec![8, 8, 5, 5],
            spatial_compression: 8,
            temporal_compression: 8,
        }
    }

    /// How many different codes there are.
    pub fn n_codes(&self) -> usize {
        self.levels.iter().map(|&level| level as usize).product()
    }

    /// Refuses a configuration that describes no network, or one beyond any sensible size.
    pub fn validate(&self) -> Result<()> {
        let limits = [
            ("channels", self.channels, 4096),
            ("num_res_blocks", self.num_res_blocks, 16),
            ("patch_size", self.patch_size, 16),
            ("z_channels", self.z_channels, 4096),
            ("embedding_dim", self.embedding_dim, 16),
            ("spatial_compression", self.spatial_compression, 1024),
            ("temporal_compression", self.temporal_compression, 1024),
            ("channels_mult's length", self.channels_mult.len(), 8),
        ];
        for (name, value, limit) in limits {
            if value == 0 || value > limit {
                return Err(Error::config(format!("cosmos: {name} is {value}; give 1 to {limit}")));
            }
        }
        if let Some(mult) = self.channels_mult.iter().find(|mult| !(1..=64).contains(*mult)) {
            return Err(Error::config(format!("cosmos: channels_mult holds {mult}; give 1 to 64")));
        }
        self.validate_levels()?;
        self.validate_resampling()
    }

    fn validate_levels(&self) -> Result<()> {
        if self.levels.len() != self.embedding_dim {
            return Err(Error::config(format!(
                "cosmos: embedding_dim is {} but there are {} levels; give one level per dimension",
                self.embedding_dim,
                self.levels.len()
            )));
        }
        if let Some(level) = self.levels.iter().find(|level| !(2..=1024).contains(*level)) {
            return Err(Error::config(format!("cosmos: levels holds {level}; give 2 to 1024")));
        }
        let n_codes = self.levels.iter().try_fold(1u32, |product, &level| product.checked_mul(level));
        match n_codes {
            Some(_) => Ok(()),
            None => Err(Error::config(format!(
                "cosmos: levels {:?} make more codes than 32 bits can number; take fewer or smaller levels",
                self.levels
            ))),
        }
    }

    fn validate_resampling(&self) -> Result<()> {
        for (name, value) in [
            ("patch_size", self.patch_size),
            ("spatial_compression", self.spatial_compression),
            ("temporal_compression", self.temporal_compression),
        ] {
            if !value.is_power_of_two() || value < self.patch_size || value < 2 {
                return Err(Error::config(format!(
                    "cosmos: {name} is {value}; give a power of two of at least 2 and patch_size ({})",
                    self.patch_size
                )));
            }
        }
        let wanted = self.halvings(self.spatial_compression);
        let spatial = |steps: &[Resampling]| steps.iter().filter(|step| step.space).count();
        let (downs, ups) = (spatial(&self.downs()), spatial(&self.ups()));
        if downs != wanted || ups != wanted {
            return Err(Error::config(format!(
                "cosmos: spatial_compression {} needs {wanted} halvings after the patches, but the encoder has {downs} \
                 and the decoder {ups}; match channels_mult's length and temporal_compression",
                self.spatial_compression
            )));
        }
        Ok(())
    }

    /// Width of every level, finest first.
    pub(super) fn widths(&self) -> Vec<usize> {
        self.channels_mult.iter().map(|mult| self.channels * mult).collect()
    }

    /// Channels of an image after the Haar patches, at one frame: the three colours times the patch's pixels.
    pub(super) fn patch_channels(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// The encoder's steps between levels, finest first.
    pub(super) fn downs(&self) -> Vec<Resampling> {
        let (space, time) = (self.halvings(self.spatial_compression), self.halvings(self.temporal_compression));
        (0..self.channels_mult.len().saturating_sub(1))
            .map(|step| Resampling { space: step < space, time: step < time })
            .collect()
    }

    /// The decoder's steps between levels, coarsest first: the time steps come one later than the encoder's mirror.
    pub(super) fn ups(&self) -> Vec<Resampling> {
        let (space, time) = (self.halvings(self.spatial_compression), self.halvings(self.temporal_compression));
        (0..self.channels_mult.len().saturating_sub(1))
            .map(|step| {
                let in_time = 0 < step && step <= time;
                Resampling { space: in_time || (step < space && space > time), time: in_time }
            })
            .collect()
    }

    /// How often the network halves a side after the patches already have.
    fn halvings(&self, compression: usize) -> usize {
        (compression / self.patch_size).max(1).ilog2() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_levels() -> CosmosConfig {
        CosmosConfig { channels_mult: vec![1, 2], patch_size: 4, temporal_compression: 4, ..CosmosConfig::shapes() }
    }

    #[test]
    fn published_sizes_are_valid() {
        for config in [CosmosConfig::dv8x16x16(), CosmosConfig::shapes(), two_levels()] {
            config.validate().unwrap();
        }
        assert_eq!(CosmosConfig::dv8x16x16().n_codes(), 64_000);
    }

    #[test]
    fn the_large_one_resamples_as_published() {
        let config = CosmosConfig::dv8x16x16();
        let [both, space] = [true, false].map(|time| Resampling { space: true, time });
        assert_eq!(config.downs(), [both, space]);
        assert_eq!(config.ups(), [space, both]);
    }

    #[test]
    fn nonsense_is_named() {
        let check = |change: fn(&mut CosmosConfig), expected: &str| {
            let mut config = two_levels();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(|c| c.channels = 0, "channels is 0; give 1 to 4096");
        check(|c| c.levels = vec![8, 5], "embedding_dim is 4 but there are 2 levels");
        check(|c| c.levels[0] = 1, "levels holds 1; give 2 to 1024");
        check(|c| c.levels = vec![1024; 4], "more codes than 32 bits");
        check(|c| c.patch_size = 3, "patch_size is 3; give a power of two");
        check(|c| c.spatial_compression = 16, "needs 2 halvings after the patches, but the encoder has 1");
        // NVIDIA's rule for the decoder drops the spatial step here, so no such network exists.
        check(|c| c.temporal_compression = 8, "the encoder has 1 and the decoder 0");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let mut json = serde_json::to_value(CosmosConfig::shapes()).unwrap();
        json["legacy_mode"] = true.into();
        let message = serde_json::from_value::<CosmosConfig>(json).unwrap_err().to_string();
        assert!(message.contains("unknown field `legacy_mode`"), "{message}");
    }
}
