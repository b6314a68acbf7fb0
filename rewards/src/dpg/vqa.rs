//! Who answers: a model, or a file of answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;
use serde::Deserialize;

/// One picture cut from a file.
#[derive(Clone, Debug)]
pub struct Crop<'a> {
    /// The file from the folder of images.
    pub file: &'a str,
    /// Which of the file's pictures: top left, top right, bottom left, bottom right.
    pub index: usize,
    /// The picture.
    pub picture: RgbImage,
}

/// Answers questions about pictures. Required: `answer`.
///
/// ```
/// use grpo::BoxError;
/// use grpo_rewards::dpg::{Crop, Vqa};
///
/// /// Answers by how bright the picture is.
/// struct Optimist;
///
/// impl Vqa for Optimist {
///     fn answer(&self, crop: &Crop<'_>, _question: &str) -> Result<String, BoxError> {
///         let bright = crop.picture.pixels().next().is_some_and(|pixel| pixel.0[0] > 127);
///         Ok(if bright { "yes" } else { "no" }.into())
///     }
/// }
/// ```
pub trait Vqa: Send + Sync {
    /// The answer in the model's words; only "yes", so written, counts.
    fn answer(&self, crop: &Crop<'_>, question: &str) -> Result<String, BoxError>;

    /// The answers to all questions about a picture, in their order. Override where a model is faster on a batch.
    fn answers(&self, crop: &Crop<'_>, questions: &[&str]) -> Result<Vec<String>, BoxError> {
        questions.iter().map(|question| self.answer(crop, question)).collect()
    }
}

/// Any reward as a model that answers: it is asked with the question as its prompt, and a score above a half is "yes".
///
/// So a model behind HTTP, in a program of one's own or in an ONNX folder answers as it would score.
#[derive(Clone, Debug)]
pub struct ScoredAnswers<R>(pub R);

impl<R: Reward<RgbImage>> Vqa for ScoredAnswers<R> {
    fn answer(&self, crop: &Crop<'_>, question: &str) -> Result<String, BoxError> {
        Ok(self.answers(crop, &[question])?.pop().unwrap_or_default())
    }

    fn answers(&self, crop: &Crop<'_>, questions: &[&str]) -> Result<Vec<String>, BoxError> {
        let prompts: Vec<Prompt> = questions.iter().map(|question| Prompt::new(*question)).collect();
        let batch: Vec<(&Prompt, &RgbImage)> = prompts.iter().map(|prompt| (prompt, &crop.picture)).collect();
        let scores = self.0.score_batch(&batch)?;
        if scores.len() != batch.len() {
            return Err(format!("{} scores for {} questions", scores.len(), batch.len()).into());
        }
        let answer = |(score, question): (&f32, &&str)| match score.is_finite() {
            true => Ok(if *score > 0.5 { "yes" } else { "no" }.to_string()),
            false => Err(format!("scored {score} on question `{question}`").into()),
        };
        scores.iter().zip(questions).map(answer).collect()
    }
}

/// Answers of a model that runs elsewhere, read from JSON lines.
///
/// ```
/// use grpo_rewards::dpg::RecordedAnswers;
///
/// let line = r#"{"image": "partiprompts97.jpg", "crop": 0, "question": "Is there a bench?", "answer": "yes"}"#;
/// assert_eq!(RecordedAnswers::parse(line)?.len(), 1);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct RecordedAnswers {
    source: PathBuf,
    answers: BTreeMap<(String, usize), BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    image: String,
    crop: usize,
    question: String,
    answer: String,
}

impl RecordedAnswers {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
        Self::parse_from(path, &text)
    }

    /// Reads and checks lines.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_from(Path::new("answers"), text)
    }

    fn parse_from(source: &Path, text: &str) -> Result<Self> {
        let mut answers: BTreeMap<(String, usize), BTreeMap<String, String>> = BTreeMap::new();
        for (row, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = |message: String| Error::file(source, format!("line {}: {message}", row + 1));
            let Line { image, crop, question, answer } =
                serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
            let of_crop = answers.entry((image, crop)).or_default();
            if of_crop.insert(question.clone(), answer.clone()).is_some_and(|other| other != answer) {
                return Err(bad(format!("`{question}` has another answer already; keep one")));
            }
        }
        Ok(Self { source: source.into(), answers })
    }

    /// How many pictures have answers.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether none has.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }
}

impl Vqa for RecordedAnswers {
    fn answer(&self, crop: &Crop<'_>, question: &str) -> Result<String, BoxError> {
        let of_crop = self.answers.get(&(crop.file.to_owned(), crop.index));
        let answer = of_crop.and_then(|answers| answers.get(question));
        Ok(answer.cloned().ok_or_else(|| {
            let (image, index) = (crop.file, crop.index);
            let what = format!("no answer for image `{image}`, crop {index}, question `{question}`");
            Error::file(&self.source, format!("{what}; record one"))
        })?)
    }
}
