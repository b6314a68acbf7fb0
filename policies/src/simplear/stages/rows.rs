//! What a training row says: which line of a caption, behind which prefix, or nothing.
//!
//! SimpleAR's `T2TokenDataset._get_item` and `preprocess_t2i`, held to golden rows of the original
//! (policies/tests/golden/training_rows.py). Deviations:
//! 1. Draws fold from (epoch, row), so a row says the same whatever was read before it.
//! 2. A caption that is too long is cut at its own end; the original cuts the row's end, which is the image.

use grpo::{Error, Result, Seed};
use serde::{Deserialize, Serialize};

use super::super::SimpleAr;
use crate::corpus::strip;

/// What training rows say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RowConfig {
    /// Which line of a caption.
    pub captions: CaptionChoice,
    /// What stands before it.
    pub prefixes: Prefixes,
    /// Probability that a row loses prefix and caption, which guidance needs; 0.1 in the paper.
    pub caption_dropout: f64,
    /// Ids of prefix and caption at most, or as many as the decoder has positions for: 512 in the original, whose rows are
    /// 1,536 and 4,608 ids long.
    pub max_caption_tokens: usize,
}

impl Default for RowConfig {
    fn default() -> Self {
        Self { captions: CaptionChoice::Mixed, prefixes: Prefixes::None, caption_dropout: 0.1, max_caption_tokens: 512 }
    }
}

/// Which line of a caption a row says. A caption of one line is long as it stands and short up to its first full stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptionChoice {
    /// The first line.
    Short,
    /// The second line.
    Long,
    /// Any line with the same probability: the original's `sample_short`.
    #[default]
    Mixed,
}

/// What stands before a caption.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Prefixes {
    /// Nothing.
    #[default]
    None,
    /// One of the original's twenty ([`PUBLISHED_PREFIXES`]).
    Published,
    /// One of these.
    Each(Vec<String>),
}

/// The style prefixes that SimpleAR is trained with, each as probable as the others (`PROMPTS_GEN` of its
/// `simpar/train/preprocess.py`).
pub const PUBLISHED_PREFIXES: [&str; 20] = [
    "A detailed digital painting of ",
    "A highly realistic image of ",
    "An abstract representation of ",
    "A fantasy illustration featuring ",
    "A photorealistic depiction of ",
    "A vibrant, colorful scene of ",
    "A surreal dreamscape of ",
    "A futuristic cityscape with ",
    "An epic landscape showcasing ",
    "A minimalistic black and white sketch of ",
    "A cinematic view of ",
    "An ethereal depiction of ",
    "A hyper-realistic portrayal of ",
    "An imaginative interpretation of ",
    "A whimsical illustration of ",
    "A magical world featuring ",
    "An iconic scene from ",
    "A steampunk-inspired version of ",
    "A vintage-style artwork of ",
    "A high-tech sci-fi scene with ",
];

impl RowConfig {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.caption_dropout) {
            return Err(Error::config(format!(
                "caption_dropout is {}; give a probability, 0.1 in the paper",
                self.caption_dropout
            )));
        }
        if matches!(&self.prefixes, Prefixes::Each(texts) if texts.is_empty()) {
            return Err(Error::config("prefixes is a list of nothing; give at least one, or \"none\""));
        }
        if self.max_caption_tokens == 0 {
            return Err(Error::config("max_caption_tokens is 0; give at least 1, 512 in the original"));
        }
        Ok(())
    }

    /// What is said of an image at its place of an epoch; `None` where the condition is dropped.
    pub fn text(&self, lines: &[String], seed: Seed) -> Option<String> {
        let draw = |name: &str| seed.named(name).uniform();
        self.said(lines, RowDraws { line: draw("caption"), dropout: draw("caption_dropout"), prefix: draw("prefix") })
    }

    fn said(&self, lines: &[String], draws: RowDraws) -> Option<String> {
        if draws.dropout < self.caption_dropout {
            return None;
        }
        let choices = choices(lines);
        let chosen = match self.captions {
            CaptionChoice::Short => choices.first(),
            CaptionChoice::Long => choices.get(1),
            CaptionChoice::Mixed => nth(&choices, draws.line),
        };
        let caption = chosen.or(choices.first()).map(|line| strip(line)).unwrap_or_default();
        let prefix = match &self.prefixes {
            Prefixes::None => "",
            Prefixes::Published => nth(&PUBLISHED_PREFIXES, draws.prefix).copied().unwrap_or_default(),
            Prefixes::Each(texts) => nth(texts, draws.prefix).map(String::as_str).unwrap_or_default(),
        };
        Some(format!("{prefix}{caption}"))
    }
}

/// The random numbers of a row, each in `[0, 1)`.
#[derive(Clone, Copy)]
struct RowDraws {
    line: f64,
    dropout: f64,
    prefix: f64,
}

/// The choice that a number in `[0, 1)` falls on.
fn nth<T>(choices: &[T], uniform: f64) -> Option<&T> {
    choices.get((uniform * choices.len() as f64) as usize)
}

/// The lines that one is chosen of: those of the caption, or of a single one its first sentence and the whole.
fn choices(lines: &[String]) -> Vec<&str> {
    match lines {
        [line] => {
            let line = strip(line);
            let sentence = line.find('.').and_then(|stop| line.get(..=stop)).unwrap_or(line);
            vec![sentence, line]
        }
        lines => lines.iter().map(String::as_str).collect(),
    }
}

/// A row of ids, trained or validated on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainingRow {
    /// `<|t2i|>`, prefix and caption, `<|soi|>`, the image's tokens.
    pub ids: Vec<u32>,
    /// Where the image's tokens begin.
    pub image_at: usize,
}

impl SimpleAr {
    /// The row of a text, or of none where the condition is dropped, and an image's codes.
    pub fn training_row(&self, text: Option<&str>, codes: &[u16], max_caption_tokens: usize) -> Result<TrainingRow> {
        self.text.training_row(text, codes, max_caption_tokens)
    }
}

impl super::super::TextTokenizer {
    /// As [`SimpleAr::training_row`].
    pub(super) fn training_row(&self, text: Option<&str>, codes: &[u16], max_tokens: usize) -> Result<TrainingRow> {
        let mut ids = match text {
            Some(text) => self.prompt(text)?,
            None => self.null_prompt(),
        };
        if ids.len() > max_tokens.saturating_add(2) {
            ids.truncate(max_tokens + 1);
            ids.push(self.image_start());
        }
        let image_at = ids.len();
        ids.extend(codes.iter().map(|code| self.n_ids() + u32::from(*code)));
        Ok(TrainingRow { ids, image_at })
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::corpus::{Reason, label_lines};
    use crate::simplear::TextTokenizer;

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_string()).collect()
    }

    #[derive(Deserialize)]
    struct Golden {
        n_text_ids: u32,
        prefixes: Vec<String>,
        rows: Vec<Row>,
        batches: Vec<Batch>,
        ignored: i64,
    }

    #[derive(Deserialize)]
    struct Row {
        label_text: String,
        codes: Vec<u16>,
        sample_short: bool,
        p_drop_cond: f64,
        choice: Option<Choice>,
        uniform: f64,
        dropped: bool,
        prefix: Option<usize>,
        #[serde(default)]
        input_ids: Vec<u32>,
        #[serde(default)]
        labels: Vec<i64>,
        error: Option<String>,
    }

    #[derive(Deserialize)]
    struct Choice {
        among: Vec<String>,
        index: usize,
    }

    #[derive(Deserialize)]
    struct Batch {
        rows: Vec<usize>,
        model_max_length: usize,
        input_ids: Vec<Vec<u32>>,
        labels: Vec<Vec<i64>>,
    }

    fn golden() -> (Golden, TextTokenizer) {
        let golden: Golden = serde_json::from_str(include_str!("../../../tests/golden/training_rows.json")).unwrap();
        let text =
            TextTokenizer::from_json(include_str!("../../../tests/golden/training_rows/tokenizer.json")).unwrap();
        assert_eq!((text.n_ids(), &golden.prefixes[..]), (golden.n_text_ids, &lines(&PUBLISHED_PREFIXES)[..]));
        (golden, text)
    }

    /// The number in `[0, 1)` in the middle of a choice.
    fn middle(index: usize, n: usize) -> f64 {
        (index as f64 + 0.5) / n as f64
    }

    /// The row of the original's recorded draws, or why its label is left out here.
    fn row_of(row: &Row, text: &TextTokenizer) -> Result<TrainingRow, Reason> {
        let lines = label_lines(row.label_text.as_bytes())?;
        let config = RowConfig {
            captions: if row.sample_short { CaptionChoice::Mixed } else { CaptionChoice::Long },
            prefixes: Prefixes::Published,
            caption_dropout: row.p_drop_cond,
            ..RowConfig::default()
        };
        let n_choices = choices(&lines).len();
        if let Some(choice) = &row.choice {
            assert_eq!(choice.among.len(), n_choices, "{:?}", row.label_text);
        }
        let line = row.choice.as_ref().map_or(0.0, |choice| middle(choice.index, n_choices));
        let prefix = row.prefix.map_or(0.0, |prefix| middle(prefix, 20));
        let said = config.said(&lines, RowDraws { line, dropout: row.uniform, prefix });
        assert_eq!(said.is_none(), row.dropped, "{:?}", row.label_text);
        Ok(text.training_row(said.as_deref(), &row.codes, config.max_caption_tokens).unwrap())
    }

    #[test]
    fn rows_are_the_originals() {
        let (golden, text) = golden();
        let (mut n_equal, mut n_refused) = (0, 0);
        for row in &golden.rows {
            match row_of(row, &text) {
                // The original trains on a label that says nothing; here it is left out and counted.
                Err(reason) => {
                    assert_eq!((reason, row.label_text.trim()), (Reason::EmptyCaption, ""));
                    n_refused += 1;
                }
                // It breaks at a caption that says `<|vtokens|>` and trains on another entry in its place.
                Ok(ours) if row.error.is_some() => assert_eq!(ours.ids[ours.image_at..].len(), row.codes.len()),
                Ok(ours) => {
                    assert_eq!(ours.ids, row.input_ids, "{:?}", row.label_text);
                    // Nothing is masked: the loss is over every id behind the first.
                    let labels: Vec<i64> = ours.ids.iter().map(|id| i64::from(*id)).collect();
                    assert_eq!(labels, row.labels);
                    n_equal += 1;
                }
            }
        }
        assert!(n_equal >= 180 && n_refused > 0, "{n_equal} rows equal, {n_refused} left out");
        let n_dropped = golden.rows.iter().filter(|row| row.dropped).count();
        assert!(n_dropped > 40, "{n_dropped}");
    }

    /// What the original masks in a batch is its padding, and what it cuts off is the image: here there is neither.
    #[test]
    fn batches_are_padded_beyond_what_is_trained() {
        let (golden, text) = golden();
        for batch in &golden.batches {
            let rows = batch.rows.iter().map(|row| row_of(&golden.rows[*row], &text)).enumerate();
            for (at, ours) in rows.filter_map(|(at, row)| Some((at, row.ok()?))) {
                let kept = ours.ids.len().min(batch.model_max_length);
                assert_eq!(batch.input_ids[at][..kept], ours.ids[..kept]);
                assert!(batch.labels[at][kept..].iter().all(|label| *label == golden.ignored));
                assert!(batch.labels[at][..kept].iter().all(|label| *label != golden.ignored));
            }
        }
        let long = "cat ".repeat(700);
        let row = text.training_row(Some(&long), &[1, 2, 3], 512).unwrap();
        assert_eq!((row.image_at, row.ids.len()), (514, 517));
        assert_eq!(row.ids[513], text.image_start());
    }

    #[test]
    fn a_single_line_is_short_up_to_its_first_full_stop() {
        let check = |given: &[&str], short: &str, long: &str| {
            let of = |captions: CaptionChoice| {
                let config = RowConfig { captions, caption_dropout: 0.0, ..RowConfig::default() };
                config.text(&lines(given), Seed::new(0)).unwrap()
            };
            assert_eq!((of(CaptionChoice::Short).as_str(), of(CaptionChoice::Long).as_str()), (short, long));
        };
        check(&["A cat. It sleeps."], "A cat.", "A cat. It sleeps.");
        check(&["  3.5 cats "], "3.", "3.5 cats");
        check(&["a cat"], "a cat", "a cat");
        check(&["short ", " long. longer."], "short", "long. longer.");
        check(&[], "", "");
    }

    #[test]
    fn draws_have_the_probabilities_that_are_asked_for() {
        let config = RowConfig { prefixes: Prefixes::Published, caption_dropout: 0.25, ..RowConfig::default() };
        let said: Vec<Option<String>> =
            (0..8000).map(|n| config.text(&lines(&["one", "two", "three"]), Seed::new(7).fold(n))).collect();
        let share = |test: &dyn Fn(&str) -> bool| {
            said.iter().flatten().filter(|text| test(text)).count() as f64 / said.iter().flatten().count() as f64
        };
        let dropped = said.iter().filter(|text| text.is_none()).count() as f64 / 8000.0;
        assert!((dropped - 0.25).abs() < 0.02, "{dropped}");
        for line in ["one", "two", "three"] {
            assert!((share(&|text| text.ends_with(line)) - 1.0 / 3.0).abs() < 0.025, "{line}");
        }
        for prefix in PUBLISHED_PREFIXES {
            assert!((share(&|text| text.starts_with(prefix)) - 0.05).abs() < 0.015, "{prefix}");
        }
        assert_eq!(said[5], config.text(&lines(&["one", "two", "three"]), Seed::new(7).fold(5)));
    }
}
