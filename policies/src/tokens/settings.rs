//! How a corpus becomes rows: sizes, filters, what is tolerated.

use grpo::picture::Transparency;
use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::corpus::{Columns, Reason};

/// How a corpus is read and cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Rows of pixels that the centre crop leaves.
    pub height: u32,
    /// Columns of pixels that the centre crop leaves.
    pub width: u32,
    /// What becomes of pixels that are not opaque; the original drops transparency, which shows whatever colour lay below.
    #[serde(default)]
    pub transparency: Transparency,
    /// Names of fields.
    #[serde(default)]
    pub columns: Columns,
    /// Which entries are left out.
    #[serde(default)]
    pub filter: Filter,
    /// The largest share of entries that may be unreadable, damaged or without a caption before the reading stops.
    #[serde(default = "max_bad_share")]
    pub max_bad_share: f64,
    /// Images in a file.
    #[serde(default = "rows_per_shard")]
    pub rows_per_shard: usize,
}

fn max_bad_share() -> f64 {
    0.001
}

fn rows_per_shard() -> usize {
    8192
}

/// Which entries are left out; none where absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// The fewest pixels of the short side as it is stored; 1024 in SimpleAR's fine-tuning.
    pub min_short_edge: u32,
    /// The largest ratio of long side to short.
    pub max_aspect: f64,
    /// The fewest words of the longest line of a caption.
    pub min_words: usize,
    /// The most words of the longest line of a caption.
    pub max_words: usize,
    /// Keeps the first of the entries whose pictures are the same bytes, whatever is said of the others; a set of
    /// 16-byte hashes is in memory while tokens are made.
    pub drop_duplicates: bool,
}

impl Default for Filter {
    fn default() -> Self {
        Self { min_short_edge: 0, max_aspect: 1e9, min_words: 1, max_words: 1 << 20, drop_duplicates: true }
    }
}

impl Settings {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let counts =
            [("height", self.height as usize), ("width", self.width as usize), ("rows_per_shard", self.rows_per_shard)];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("{name} is 0; give at least 1")));
        }
        if !(0.0..=1.0).contains(&self.max_bad_share) {
            return Err(Error::config(format!("max_bad_share is {}; give a share from 0 to 1", self.max_bad_share)));
        }
        if self.filter.max_aspect.is_nan() || self.filter.max_aspect < 1.0 {
            return Err(Error::config(format!(
                "filter.max_aspect is {}; it is long side over short, so give 1 or more",
                self.filter.max_aspect
            )));
        }
        Ok(())
    }

    /// The settings that decide what the shards hold.
    pub(super) fn decisive(&self) -> Result<String> {
        let decisive = Self { max_bad_share: max_bad_share(), ..self.clone() };
        toml::to_string(&decisive).map_err(|error| Error::config(error.to_string()))
    }
}

/// What a filter says, and not that an entry is bad.
const FILTERED: [Reason; 4] = [Reason::ShortEdge, Reason::Aspect, Reason::CaptionWords, Reason::Duplicate];

/// Whether this reason, by its name, says that something is wrong with an entry.
pub(super) fn is_bad(reason: &str) -> bool {
    FILTERED.iter().all(|filtered| filtered.name() != reason)
}

impl Filter {
    /// Why a caption is left out, if it is.
    pub(super) fn caption(&self, lines: &[String]) -> Option<(Reason, String)> {
        let n = lines.iter().map(|line| line.split_whitespace().count()).max().unwrap_or(0);
        let (least, most) = (self.min_words, self.max_words);
        (n < least || n > most)
            .then(|| (Reason::CaptionWords, format!("{n} words; the filter keeps {least} to {most}")))
    }

    /// Why a picture of this size is left out, if it is.
    pub(super) fn size(&self, width: u32, height: u32) -> Option<(Reason, String)> {
        let (short, long) = (width.min(height), width.max(height));
        if short < self.min_short_edge {
            let message = format!("{width}x{height} pixels; the filter asks for {} or more", self.min_short_edge);
            return Some((Reason::ShortEdge, message));
        }
        let aspect = f64::from(long) / f64::from(short.max(1));
        (aspect > self.max_aspect).then(|| {
            let message =
                format!("{width}x{height} pixels are 1:{aspect:.2}; the filter keeps up to 1:{}", self.max_aspect);
            (Reason::Aspect, message)
        })
    }
}
