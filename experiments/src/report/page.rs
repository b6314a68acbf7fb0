//! The report as a page and as Markdown, from one set of facts by two templates.

use grpo::{Error, Result};
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};

use super::Shown;
use crate::intervals::Interval;

const HTML: &str = include_str!("report.html");
const MARKDOWN: &str = include_str!("report.md");

/// One file that needs no other: drawings and pictures stand in it, and it has no script.
pub(super) fn html(shown: &Shown<'_>) -> Result<String> {
    rendered("report.html", HTML, shown)
}

/// A page of tables that refers to `figures/`.
pub(super) fn markdown(shown: &Shown<'_>) -> Result<String> {
    rendered("report.md", MARKDOWN, shown)
}

/// What is put into a template whose name ends in `.html` is escaped.
fn rendered(name: &str, template: &str, shown: &Shown<'_>) -> Result<String> {
    let fault = |error: minijinja::Error| Error::config(format!("{name}: {error:#}"));
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(fault)?);
    environment.add_filter("number", number);
    environment.add_filter("signed", signed);
    environment.add_filter("interval", interval);
    environment.add_filter("cell", markdown_text);
    environment.add_filter("words", |text: &str| text.replace('_', " "));
    environment.add_filter("plain", |number: f64| (number as f32).to_string());
    environment.add_filter("inline", inline);
    environment.add_template(name, template).map_err(fault)?;
    let page = environment.get_template(name).and_then(|template| template.render(Serde(shown))).map_err(fault)?;
    Ok(page.trim_end().to_string() + "\n")
}

/// Text that Markdown takes for nothing else.
fn markdown_text(text: &str) -> String {
    let escape = |letter: char| "\\`*[]<>|#".contains(letter).then_some('\\').into_iter().chain([letter]);
    text.replace(['\n', '\r'], " ").chars().flat_map(escape).collect()
}

fn number(value: Option<f64>, digits: Option<usize>) -> String {
    value.map_or("–".into(), |value| format!("{value:.*}", digits.unwrap_or(3)))
}

fn signed(value: Option<f64>, digits: Option<usize>) -> String {
    value.map_or("–".into(), |value| format!("{value:+.*}", digits.unwrap_or(3)))
}

/// A mean with its interval; marking what does not hold 0 is the template's matter.
fn interval(value: Option<Serde<Interval>>) -> String {
    value.map_or("–".into(), |Serde(of)| of.to_string())
}

/// A drawing as it stands in a page: sized by the page, and with its title for those who cannot see it.
fn inline(svg: &str, title: &str) -> Value {
    let start = svg.find("viewBox").unwrap_or(0);
    let title: String = title.chars().filter(|letter| !"<>&\"".contains(*letter)).collect();
    Value::from_safe_string(format!("<svg role=\"img\" aria-label=\"{title}\" {}", svg.get(start..).unwrap_or("")))
}
