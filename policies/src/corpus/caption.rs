//! Captions from bytes, JSON fields and label files, never guessed at.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::entry::{Caption, Fault, Reason};

/// The text of bytes that must be UTF-8.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str, Fault> {
    let fault = |error| Fault::new(Reason::CaptionNotUtf8, format!("{error}; save the text as UTF-8"));
    std::str::from_utf8(bytes).map_err(fault)
}

/// JSON as Python writes it: its `NaN` and infinities, which img2dataset leaves for what a table lacks and which are no
/// JSON, are null.
pub(super) fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    let text = utf8(bytes)?;
    let again = |error: serde_json::Error| {
        let fault = |_| Fault::new(Reason::DamagedEntry, format!("not JSON: {error}"));
        serde_json::from_str(&without_nan(text)).map_err(fault)
    };
    serde_json::from_str(text).or_else(again)
}

fn without_nan(text: &str) -> String {
    let (mut rest, mut kept, mut in_string) = (text, String::with_capacity(text.len()), false);
    while let Some(letter) = rest.chars().next() {
        let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| !in_string && rest.starts_with(word));
        let length = match (word, letter, in_string) {
            (Some(word), ..) => {
                kept.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
            // What an escape stands for ends no string.
            (None, '\\', true) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => letter.len_utf8(),
        };
        in_string ^= letter == '"';
        kept.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    kept
}

/// A text, or a list of texts of which the first is taken, as SimpleAR's `t2i_data.py` does.
pub(super) fn field<'v>(object: &'v Map<String, Value>, name: &str) -> Result<Option<&'v str>, Fault> {
    let value = match object.get(name) {
        Some(Value::Array(several)) => several.first(),
        other => other,
    };
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => {
            Err(Fault::new(Reason::DamagedEntry, format!("field `{name}` is neither a text nor a list of texts")))
        }
    }
}

/// The caption of a picture: one line, and a second where there is a long caption.
///
/// Newlines become spaces, as in SimpleAR's `extract_token.py`; its label files have one line a caption.
pub(super) fn of_picture(short: Option<&str>, long: Option<&str>) -> Result<Caption, Fault> {
    let short = one_line(short.ok_or_else(|| Fault::new(Reason::NoCaption, "nothing is said of the picture"))?);
    if short.is_empty() {
        return Err(Fault::new(Reason::EmptyCaption, "the caption is empty"));
    }
    let long = long.map(one_line).filter(|long| !long.is_empty());
    Ok(Caption { lines: [Some(short), long].into_iter().flatten().collect() })
}

/// The lines of a label file, each trimmed; the empty ones are kept, as a line's number is its meaning.
pub(super) fn of_labels(bytes: &[u8]) -> Result<Caption, Fault> {
    // Python's universal newlines: a carriage return by itself ends a line too.
    let text = utf8(bytes)?.replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<String> = text.lines().map(|line| strip(line).to_owned()).collect();
    match lines.iter().all(String::is_empty) {
        true => Err(Fault::new(Reason::EmptyCaption, "the label file is empty")),
        false => Ok(Caption { lines }),
    }
}

/// Without white space at its ends, as Python's `str.strip` sees it: the four information separators are white space too.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// The lines of a label file, or why there are none.
#[cfg(test)]
pub(crate) fn label_lines(bytes: &[u8]) -> Result<Vec<String>, Reason> {
    of_labels(bytes).map(|caption| caption.lines).map_err(|fault| fault.reason)
}

fn one_line(text: &str) -> String {
    strip(text).replace("\r\n", " ").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pictures_caption_is_one_line_and_a_long_one() {
        let check = |short, long, expected: Result<&[&str], Reason>| {
            let got = of_picture(short, long).map(|caption| caption.lines).map_err(|fault| fault.reason);
            assert_eq!(got, expected.map(|lines| lines.iter().map(|line| (*line).to_owned()).collect()));
        };
        check(Some(" a\nb\r\nc \n"), None, Ok(&["a b c"]));
        check(Some("a"), Some("\tlong\nline "), Ok(&["a", "long line"]));
        check(Some("a"), Some(" \n"), Ok(&["a"]));
        check(Some(" \n"), Some("long"), Err(Reason::EmptyCaption));
        check(None, Some("long"), Err(Reason::NoCaption));
    }

    #[test]
    fn pythons_numbers_that_are_none_are_null() {
        let check = |text: &str, expected: Result<Value, Reason>| {
            assert_eq!(json::<Value>(text.as_bytes()).map_err(|fault| fault.reason), expected, "{text}");
        };
        check(r#"{"a": NaN, "b": [-Infinity, Infinity]}"#, Ok(json!({"a": null, "b": [null, null]})));
        check(r#"{"NaN": "is \"NaN\" é", "b": NaN}"#, Ok(json!({"NaN": "is \"NaN\" é", "b": null})));
        check(r#"{"a": NaN"#, Err(Reason::DamagedEntry));
        check(r#"{"a": "NaN\"#, Err(Reason::DamagedEntry));
        check(r#"{"a": NoN}"#, Err(Reason::DamagedEntry));
    }

    #[test]
    fn label_files_keep_every_line() {
        let check = |bytes: &[u8], expected: Result<&[&str], Reason>| {
            let got = of_labels(bytes).map(|caption| caption.lines).map_err(|fault| fault.reason);
            assert_eq!(got, expected.map(|lines| lines.iter().map(|line| (*line).to_owned()).collect()));
        };
        check(b"short", Ok(&["short"]));
        check(b" short \r\nlong\n", Ok(&["short", "long"]));
        check(b"short\rlong\x1f", Ok(&["short", "long"]));
        check(b"\nlong\nmore", Ok(&["", "long", "more"]));
        check(b"", Err(Reason::EmptyCaption));
        check(b" \n\t\n", Err(Reason::EmptyCaption));
        check(b"caf\xE9", Err(Reason::CaptionNotUtf8));
    }

    #[test]
    fn a_field_is_a_text_or_the_first_of_a_list() {
        let check = |value: Value, expected: Result<Option<&str>, Reason>| {
            let object = Map::from_iter([("caption".to_owned(), value)]);
            assert_eq!(field(&object, "caption").map_err(|fault| fault.reason), expected);
            assert_eq!(field(&object, "absent"), Ok(None));
        };
        check(json!("a"), Ok(Some("a")));
        check(json!(["a", "b"]), Ok(Some("a")));
        check(json!([]), Ok(None));
        check(json!(null), Ok(None));
        check(json!(7), Err(Reason::DamagedEntry));
        check(json!([["a"]]), Err(Reason::DamagedEntry));
    }
}
