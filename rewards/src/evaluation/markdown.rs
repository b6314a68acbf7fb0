//! A report as a page to read.

use std::fmt::{self, Write};

use super::{Report, Row};

impl Report {
    /// The report in Markdown: the numbers first, then what they rest on.
    pub fn to_markdown(&self) -> String {
        let mut page = String::new();
        match self.write(&mut page) {
            // Writing to a string cannot fail.
            Ok(()) | Err(fmt::Error) => page,
        }
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        let of = |number: Option<f64>| number.map_or_else(|| "none".into(), |number| format!("{number:.4}"));
        writeln!(page, "# {}, {}\n", self.benchmark, self.mode)?;
        writeln!(page, "Overall: **{}**", of(self.overall))?;
        if self.pessimistic.is_some() {
            writeln!(page, "(with missing and failed images as wrong: {})", of(self.pessimistic))?;
        }
        self.write_rows(page)?;
        let (counts, n_missing, n_failed) = (self.images, self.missing.len(), self.failed.len());
        writeln!(page, "\n## Images\n")?;
        writeln!(page, "| expected | found | judged | missing | failed |\n|---:|---:|---:|---:|---:|")?;
        let (expected, found, scored) = (counts.expected, counts.found, counts.scored);
        writeln!(page, "| {expected} | {found} | {scored} | {n_missing} | {n_failed} |")?;
        let failed = self.failed.iter().map(|failed| format!("`{}`: {}", failed.image, one_line(&failed.reason)));
        list(page, "Failed", failed)?;
        list(page, "Missing", self.missing.iter().map(|name| format!("`{name}`")))?;
        list(page, "Notes", self.notes.iter().cloned())?;
        list(page, "Models", self.models.iter().map(|(name, hash)| format!("`{name}`: SHA-256 `{hash}`")))?;
        list(page, "Sampler", self.sampler.iter().map(|settings| format!("`{settings}`")))?;
        list(page, "Versions", self.versions.iter().map(|(name, version)| format!("{name} {version}")))
    }

    fn write_rows(&self, page: &mut String) -> fmt::Result {
        let mut groups: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !groups.contains(&row.group.as_str()) {
                groups.push(&row.group);
            }
        }
        for group in groups {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.group == group).collect();
            let (pessimistic, std) =
                (rows.iter().any(|r| r.pessimistic.is_some()), rows.iter().any(|r| r.std.is_some()));
            let cell = |shown: bool, text: &str| if shown { format!(" {text} |") } else { String::new() };
            let title = if group.is_empty() { "task" } else { group };
            let (wrong, spread) = (cell(pessimistic, "missing as wrong"), cell(std, "std"));
            writeln!(page, "\n| {title} | score |{wrong}{spread} n |")?;
            writeln!(page, "|---|---:|{}{}---:|", cell(pessimistic, "---:"), cell(std, "---:"))?;
            for row in rows {
                let number = |number: Option<f64>| number.map_or_else(String::new, |number| format!("{number:.4}"));
                let (wrong, spread) = (cell(pessimistic, &number(row.pessimistic)), cell(std, &number(row.std)));
                writeln!(page, "| {} | {:.4} |{wrong}{spread} {} |", row.name, row.score, row.n)?;
            }
        }
        Ok(())
    }
}

fn list(page: &mut String, title: &str, lines: impl Iterator<Item = String>) -> fmt::Result {
    for (row, line) in lines.enumerate() {
        if row == 0 {
            writeln!(page, "\n## {title}\n")?;
        }
        writeln!(page, "- {line}")?;
    }
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
