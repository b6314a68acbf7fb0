//! The answer: strict about counts and numbers, so that no failure ever becomes a score.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use serde_json::Value;

use crate::geneval::{Detection, Found};

/// One sample's score or detections, or why it has none.
pub(crate) type Verdict<T = f32> = Result<T, String>;

/// What an answer says of one picture.
pub(crate) trait Said: Sized + Send {
    /// The answer's key.
    const KEY: &'static str;

    /// What stands there, one value a picture.
    fn of(answer: &mut Answer) -> Option<Vec<Value>>;

    /// One of them.
    fn read(value: Value) -> Verdict<Self>;
}

impl Said for f32 {
    const KEY: &'static str = "scores";

    fn of(answer: &mut Answer) -> Option<Vec<Value>> {
        answer.scores.take()
    }

    fn read(value: Value) -> Verdict {
        finite(&value)
    }
}

impl Said for Vec<Detection> {
    const KEY: &'static str = "detections";

    fn of(answer: &mut Answer) -> Option<Vec<Value>> {
        answer.detections.take()
    }

    fn read(value: Value) -> Verdict<Self> {
        let found: Option<Vec<Found>> = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let found =
            found.ok_or("has no detections (null), and no reason in `errors`; an empty list is nothing found")?;
        found.into_iter().map(Found::check).collect()
    }
}

/// How much of another program's text a message repeats.
const EXCERPT_CHARS: usize = 200;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Answer {
    id: Option<u64>,
    scores: Option<Vec<Value>>,
    detections: Option<Vec<Value>>,
    errors: Option<Vec<Option<String>>>,
    #[serde(default)]
    model: Value,
    #[serde(default)]
    version: Value,
}

/// Reads a scorer's answers for the whole life of a reward, and remembers who gave the first.
#[derive(Debug)]
pub(crate) struct Answers {
    /// Whether each must repeat its question's number, as where lines could be mistaken for one another.
    need_id: bool,
    scorer: Mutex<Option<(Value, Value)>>,
}

impl Answers {
    pub(crate) fn by_line() -> Self {
        Self { need_id: true, scorer: Mutex::default() }
    }

    #[cfg(any(feature = "http", test))]
    pub(crate) fn by_connection() -> Self {
        Self { need_id: false, scorer: Mutex::default() }
    }

    /// The verdicts of an answer to question `id` about `n_images` pictures.
    pub(crate) fn verdicts<T: Said>(&self, answer: &[u8], id: u64, n_images: usize) -> Result<Vec<Verdict<T>>, String> {
        let mut answer: Answer = serde_json::from_slice(&quote_non_finite(answer)).map_err(|error| {
            format!("its answer is not what the protocol asks for: {error}; it starts with `{}`", excerpt(answer))
        })?;
        match answer.id {
            Some(other) if other != id => {
                return Err(format!("answered question {other} where {id} was asked; give one answer for each"));
            }
            None if self.need_id => return Err(format!("answered without an id; repeat the question's, {id}")),
            _ => {}
        }
        let counted = |what, n| match n == n_images {
            true => Ok(()),
            false => Err(format!("returned {n} {what} for {n_images} images; return one for each, in order")),
        };
        let said =
            T::of(&mut answer).ok_or_else(|| format!("answered without `{}`; give one for each image", T::KEY))?;
        if answer.scores.is_some() || answer.detections.is_some() {
            return Err(format!("answered with scores and detections; give `{}` alone", T::KEY));
        }
        counted(T::KEY, said.len())?;
        counted("errors", answer.errors.as_ref().map_or(n_images, Vec::len))?;
        self.check(answer.model, answer.version)?;
        let errors = answer.errors.unwrap_or_else(|| vec![None; n_images]);
        let verdict = |(value, error): (Value, Option<String>)| match error {
            Some(error) => Err(excerpt(error.as_bytes())),
            None => T::read(value),
        };
        Ok(said.into_iter().zip(errors).map(verdict).collect())
    }

    /// The model and its version, as the first answer named them.
    pub(crate) fn scorer(&self) -> Option<String> {
        let first = self.scorer.lock().unwrap_or_else(PoisonError::into_inner);
        first.as_ref().map(|(model, version)| format!("model {model}, version {version}"))
    }

    fn check(&self, model: Value, version: Value) -> Result<(), String> {
        for (key, value) in [("model", &model), ("version", &version)] {
            if !(value.is_null() || value.is_string() || value.is_number()) {
                return Err(format!(
                    "its `{key}` is {}; give a text or a number",
                    excerpt(value.to_string().as_bytes())
                ));
            }
        }
        let mut first = self.scorer.lock().unwrap_or_else(PoisonError::into_inner);
        match first.as_ref() {
            None => *first = Some((model, version)),
            Some((m, v)) if *m != model || *v != version => {
                return Err(format!(
                    "the scorer was model {m}, version {v}, and is now model {model}, version {version}; a score of \
                     another model is another reward: start the former again, or a new run"
                ));
            }
            Some(_) => {}
        }
        Ok(())
    }
}

/// A score that can be used. No other thing than a number becomes one: `"0.5"` and `true` are faults of the scorer.
fn finite(score: &Value) -> Verdict {
    match (score, score.as_f64()) {
        (Value::Null, _) => Err("was given no score (null), and no reason in `errors`".into()),
        (_, Some(number)) if (number as f32).is_finite() => Ok(number as f32),
        (Value::String(text), _) if NON_FINITE.contains(&text.as_str()) => {
            Err(format!("scored {text}; return a finite number, or null and a text in `errors`"))
        }
        _ => {
            Err(format!("scored {}; return a finite number of 32 bits or null", excerpt(score.to_string().as_bytes())))
        }
    }
}

/// What Python's `json` writes for numbers that JSON does not have.
const NON_FINITE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The same text with such numbers as strings, so that each fails its own sample instead of the whole answer.
fn quote_non_finite(json: &[u8]) -> Cow<'_, [u8]> {
    let mut quoted: Option<Vec<u8>> = None;
    let (mut at, mut in_string) = (0, false);
    while let Some(&byte) = json.get(at) {
        let word = NON_FINITE.iter().find(|word| !in_string && json[at..].starts_with(word.as_bytes()));
        let n_bytes = match (word, byte) {
            (Some(word), _) => word.len(),
            (None, b'\\') if in_string => 2.min(json.len() - at),
            _ => 1,
        };
        in_string ^= byte == b'"';
        if word.is_some() {
            let quoted = quoted.get_or_insert_with(|| json[..at].to_vec());
            quoted.push(b'"');
            quoted.extend_from_slice(&json[at..at + n_bytes]);
            quoted.push(b'"');
        } else if let Some(quoted) = &mut quoted {
            quoted.extend_from_slice(&json[at..at + n_bytes]);
        }
        at += n_bytes;
    }
    quoted.map_or(Cow::Borrowed(json), Cow::Owned)
}

/// The first line of another program's text, without control characters and not too long.
pub(crate) fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(8 * EXCERPT_CHARS)]);
    let line = text.trim_start().lines().next().unwrap_or_default().trim_end();
    let shown: String = line.chars().filter(|c| !c.is_control()).take(EXCERPT_CHARS).collect();
    if shown.len() < line.len() { format!("{shown}...") } else { shown }
}

#[cfg(test)]
mod tests {
    use grpo::Seed;

    use super::*;

    fn read<T: Said>(answer: &str, n_images: usize) -> Result<Vec<Verdict<T>>, String> {
        Answers::by_connection().verdicts(answer.as_bytes(), 7, n_images)
    }

    #[test]
    fn nothing_but_a_finite_number_is_a_score() {
        let answer = r#"{"scores": [0.25, null, NaN, -Infinity, Infinity, 1e39, "0.5", true, [1], -3, 0],"id":7}"#;
        let verdicts: Vec<Verdict> = read(answer, 11).unwrap();
        assert_eq!(verdicts[0], Ok(0.25));
        assert_eq!(verdicts[9..], [Ok(-3.0), Ok(0.0)]);
        let expected = ["null", "NaN", "-Infinity", "Infinity", "1e+39", "\"0.5\"", "true", "[1]"];
        for (verdict, expected) in verdicts[1..9].iter().zip(expected) {
            assert!(verdict.as_ref().unwrap_err().contains(expected), "{verdict:?}");
        }
    }

    #[test]
    fn a_text_among_the_errors_fails_its_sample_whatever_its_score() {
        let answer = r#"{"scores":[1, 2, 0],"errors":[null,"\"NaN\" is no face\nsecond line",null]}"#;
        assert_eq!(read::<f32>(answer, 3).unwrap(), [Ok(1.0), Err("\"NaN\" is no face".into()), Ok(0.0)]);
    }

    #[test]
    fn detections_are_checked_as_recorded_ones_are() {
        let cat = r#"{"class":"cat","score":0.5,"bbox":[0,0,2,3],"color":"red"}"#;
        let nan = r#"{"class":"cat","score":NaN,"bbox":[0,0,2,3]}"#;
        let answer = format!(
            r#"{{"detections":[[{cat},{cat}],[],null,[{nan}],[{cat}]],"errors":[null,null,null,null,"late"]}}"#
        );
        let verdicts: Vec<Verdict<Vec<Detection>>> = read(&answer, 5).unwrap();
        let expected = Detection::new("cat", 0.5, [0.0, 0.0, 2.0, 3.0]).with_color("red");
        assert_eq!(verdicts[..2], [Ok(vec![expected.clone(), expected]), Ok(Vec::new())]);
        for (verdict, expected) in verdicts[2..].iter().zip(["no detections (null)", "\"NaN\"", "late"]) {
            assert!(verdict.as_ref().unwrap_err().contains(expected), "{verdict:?} lacks {expected}");
        }
    }

    #[test]
    fn counts_ids_and_keys_must_be_right() {
        let cases = [
            (r#"{"scores":[1,2,3]}"#, "returned 3 scores for 4 images"),
            (r#"{"scores":[1,2,3,4,5]}"#, "returned 5 scores for 4 images"),
            (r#"{"scores":[1,2,3,4],"errors":[null]}"#, "returned 1 errors for 4 images"),
            (r#"{"scores":[1,2,3,4],"erors":[null]}"#, "unknown field `erors`"),
            (r#"{"detections":[[],[],[],[]]}"#, "answered without `scores`"),
            (r#"{"scores":[1,2,3,4],"detections":[[],[],[],[]]}"#, "answered with scores and detections"),
            (r#"{"scores":[1,2,3,4],"id":6}"#, "answered question 6 where 7 was asked"),
            (r#"{"scores":[1,2,3,4],"model":{}}"#, "its `model` is {}; give a text or a number"),
            (r#"{"scores":{"0":1}}"#, "invalid type: map, expected a sequence"),
            ("<html>\nno", "it starts with `<html>`"),
            ("", "EOF while parsing"),
        ];
        for (answer, expected) in cases {
            let message = read::<f32>(answer, 4).unwrap_err();
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
        let message = Answers::by_line().verdicts::<f32>(br#"{"scores":[1]}"#, 7, 1).unwrap_err();
        assert_eq!(message, "answered without an id; repeat the question's, 7");
        assert!(Answers::by_line().verdicts::<f32>(br#"{"scores":[1],"id":7}"#, 7, 1).is_ok());
    }

    #[test]
    fn another_model_is_another_reward() {
        let answers = Answers::by_connection();
        let ask = |answer: &str| answers.verdicts::<f32>(answer.as_bytes(), 0, 0);
        assert!(ask(r#"{"scores":[],"model":"hps","version":2}"#).is_ok());
        assert!(ask(r#"{"scores":[],"version":2,"model":"hps"}"#).is_ok());
        let message = ask(r#"{"scores":[],"model":"hps","version":"2.1"}"#).unwrap_err();
        assert!(message.contains(r#"was model "hps", version 2, and is now model "hps", version "2.1""#), "{message}");
        assert!(ask(r#"{"scores":[]}"#).is_err(), "saying nothing is a change as well");
        assert!(ask(r#"{"scores":[],"model":"hps","version":2}"#).is_ok(), "the first one stays welcome");
    }

    /// Cut, flipped and doubled answers: an error or as many verdicts as there are images, never a panic.
    #[test]
    fn malformed_answers_are_errors() {
        let whole =
            br#"{"id":7,"scores":[0.25,null,NaN,-1e-3],"errors":[null,"a \u00e9 \\\" b",null,null],"model":"m"}"#;
        let mut n_read = 0;
        for seed in 0..20_000 {
            let mut draws = Seed::new(seed).draws();
            let mut bytes = whole.to_vec();
            for _ in 0..=draws.below(3) {
                let at = draws.below(bytes.len());
                match draws.below(4) {
                    0 => bytes.truncate(at.max(1)),
                    1 => bytes[at] ^= 1 << draws.below(8),
                    2 => bytes[at] = b"\"\\[]{},:N-"[draws.below(10)],
                    _ => bytes.extend_from_slice(&whole[at.min(whole.len())..]),
                }
            }
            if let Ok(verdicts) = Answers::by_connection().verdicts::<f32>(&bytes, 7, 4) {
                n_read += 1;
                assert_eq!(verdicts.len(), 4);
                assert!(verdicts.iter().flatten().all(|score| score.is_finite()));
            }
        }
        assert!(n_read > 100, "{n_read} mutants were still answers");
    }

    #[test]
    fn an_excerpt_is_one_short_line() {
        assert_eq!(excerpt(b"\n first \x1b[31mline\r\nsecond"), "first [31mline...");
        assert_eq!(excerpt("é".repeat(300).as_bytes()).chars().count(), 203);
        assert_eq!(excerpt(b""), "");
    }
}
