//! What a prompt is turned into before it is tokenised: itself, or a turn of a chat.
//!
//! Chat templates are Jinja as transformers renders it: blocks are trimmed, `raise_exception`, `tojson`, loop controls
//! and the methods of Python's strings are there. Deviations: 1. `strftime_now` is not, since a prompt must not depend
//! on the day; templates that use it ask whether it is defined. 2. The `generation` tag, which marks training targets,
//! is not. 3. A template that computes without end is stopped.

use std::collections::BTreeMap;
use std::sync::Arc;

use grpo::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Instructions that rendering one prompt may take; published templates take thousands.
const MOST_INSTRUCTIONS: u64 = 10_000_000;

/// How the text that the model reads is made of a prompt.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Template {
    /// The prompt as it is, framed as the tokenizer frames a text: for base models.
    #[default]
    Plain,
    /// A chat with the prompt as the user's turn, up to where the assistant begins.
    Chat(ChatTemplate),
}

impl Template {
    /// Puts a system message before every prompt; refused for [`Template::Plain`], which has no place for it.
    pub fn with_system(self, system: impl Into<String>) -> Result<Self> {
        match self {
            Self::Chat(chat) => Ok(Self::Chat(ChatTemplate { system: Some(system.into()), ..chat })),
            Self::Plain => {
                Err(Error::config("a system message needs a chat template; give one, or put it into the prompts"))
            }
        }
    }
}

/// A chat template, compiled.
///
/// ```
/// use grpo_policies::text_lm::ChatTemplate;
/// let source = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}<assistant>";
/// let chat = ChatTemplate::new("chat_template.jinja", source, Default::default())?;
/// assert_eq!(chat.render("hello")?, "<user>hello\n<assistant>");
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    name: Arc<str>,
    source: Arc<str>,
    tokens: BTreeMap<String, String>,
    system: Option<String>,
}

impl ChatTemplate {
    /// Compiles a template of the file `name`; `tokens` are variables such as `eos_token`.
    pub fn new(name: &str, source: &str, tokens: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| fault(&error))?);
        // A file's ending would choose how values are escaped.
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(MOST_INSTRUCTIONS));
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(name.to_string(), source.to_string()).map_err(|error| fault(&error))?;
        Ok(Self { environment: Arc::new(environment), name: name.into(), source: source.into(), tokens, system: None })
    }

    /// The text of a chat with this prompt, up to where the assistant begins.
    pub fn render(&self, prompt: &str) -> Result<String> {
        let message = |(role, content): (&str, &str)| Value::from_pairs([("role", role), ("content", content)]);
        let system = self.system.iter().map(|system| ("system", system.as_str()));
        let messages: Value = system.chain([("user", prompt)]).map(message).collect();
        let tokens = self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let ours = [("messages", messages), ("add_generation_prompt", Value::from(true))];
        let template = self.environment.get_template(&self.name).map_err(|error| fault(&error))?;
        template.render(Value::from_pairs(tokens.chain(ours))).map_err(|error| fault(&error))
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }
}

fn fault(error: &minijinja::Error) -> Error {
    let (name, line) = (error.name().unwrap_or("chat template"), error.line().unwrap_or(0));
    let what = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    Error::config(format!("{name}, line {line}: {what}; mend the template, or take Template::Plain"))
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python writes it, with `indent` where it is given; nothing is escaped for HTML, as transformers has it.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter)),
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(&spaces)))
        }
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from(String::from_utf8_lossy(&json).into_owned()))
}

/// `json.dumps`' separators: a space behind each comma and colon.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new("chat_template.jinja", source, BTreeMap::from([("eos_token".into(), "</s>".into())]))
    }

    #[test]
    fn json_is_pythons_and_tokens_are_variables() {
        let rendered = chat("{{ messages | tojson }}{{ eos_token }}").unwrap().render("<a> & 'é'").unwrap();
        assert_eq!(rendered, r#"[{"role": "user", "content": "<a> & 'é'"}]</s>"#);
        let rendered = chat("{{ messages[0] | tojson(indent=2) }}").unwrap().render("a").unwrap();
        assert_eq!(rendered, "{\n  \"role\": \"user\",\n  \"content\": \"a\"\n}");
    }

    #[test]
    fn faults_of_a_template_name_the_file_and_the_line() {
        let error = chat("a\n{% for %}").err().unwrap().to_string();
        assert!(error.starts_with("chat_template.jinja, line 2: syntax error"), "{error}");
        for (source, message) in [
            (
                "\n\n{{ raise_exception('only one turn') }}",
                "chat_template.jinja, line 3: invalid operation: only one turn",
            ),
            ("\n{{ messages[0].nothing.more }}", "chat_template.jinja, line 2: undefined value"),
            ("{{ strftime_now('%d') }}", "chat_template.jinja, line 1: unknown function"),
            (
                "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}",
                "chat_template.jinja, line 1: ",
            ),
        ] {
            let error = chat(source).unwrap().render("hello").unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn a_plain_prompt_has_no_place_for_a_system_message() {
        let error = Template::Plain.with_system("be brief").unwrap_err().to_string();
        assert!(error.contains("needs a chat template"), "{error}");
    }
}
