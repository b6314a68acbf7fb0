//! Files of prompts: a text a line, or a JSON object a line with the prompt and its columns.

use std::path::Path;

use grpo::Prompt;
use serde_json::{Map, Value};

use crate::failure::{Failure, Outcome};

/// The prompts of a file, in its order; other keys of an object are the prompt's columns, as in GenEval's metadata. A list of
/// captioned images is one of prompts too: its "caption" is the prompt where there is no other.
pub fn read(path: &Path) -> Outcome<Vec<Prompt>> {
    let fault = |message: String| Failure::user(format!("{}: {message}", path.display()));
    let file =
        std::fs::read_to_string(path).map_err(|error| fault(format!("{error}; give a text file, a prompt a line")))?;
    let lines = file.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
    let prompts: Outcome<Vec<Prompt>> = lines
        .map(|(line, text)| prompt_of(text).map_err(|message| fault(format!("line {}: {message}", line + 1))))
        .collect();
    match prompts?.as_slice() {
        [] => Err(fault("the file holds no prompt; write one a line".into())),
        prompts => Ok(prompts.to_vec()),
    }
}

fn prompt_of(line: &str) -> Result<Prompt, String> {
    if !line.trim_start().starts_with('{') {
        return Ok(Prompt::new(line.trim()));
    }
    let mut columns: Map<String, Value> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let Some(Value::String(text)) = columns.remove("prompt").or_else(|| columns.remove("caption")) else {
        return Err("the object has no text under \"prompt\" or \"caption\"; add it".into());
    };
    Ok(columns.into_iter().fold(Prompt::new(text), |prompt, (name, value)| prompt.with(name, value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_texts_or_objects_with_columns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        let read_text = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path).map_err(|error| error.to_string())
        };
        let prompts = read_text("a cat\n\n {\"prompt\": \"a sign\", \"text\": \"open\"} \n").unwrap();
        assert_eq!(prompts, [Prompt::new("a cat"), Prompt::new("a sign").with("text", "open")]);
        let captioned = read_text("{\"image_path\": \"1.png\", \"caption\": \"a cat\"}").unwrap();
        assert_eq!(captioned, [Prompt::new("a cat").with("image_path", "1.png")]);
        assert!(read_text("\n").unwrap_err().ends_with("the file holds no prompt; write one a line"));
        assert!(read_text("a\n{\"text\": 1}").unwrap_err().contains("line 2: the object has no text under"));
        assert!(read_text("{\"prompt\"").unwrap_err().contains("line 1: EOF"));
    }
}
