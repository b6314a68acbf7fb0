//! The table of questions, `dpg_bench.csv`.

use std::collections::BTreeMap;
use std::path::Path;

use grpo::{Error, Result};
use serde::Deserialize;

/// Which way of counting; see the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As the published program, faults included.
    Official,
    /// Without its faults.
    Fixed,
}

impl Mode {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Official => "official",
            Self::Fixed => "fixed",
        }
    }
}

/// One question about a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Its number among the item's.
    pub id: u32,
    /// What is asked.
    pub text: String,
    /// The statement that it asks about, such as `attribute - color (apple, red)`.
    pub tuple: String,
    /// The numbers of the questions without which it makes no sense.
    pub parents: Vec<u32>,
}

impl Question {
    /// The category in the finer table: the statement up to its bracket.
    pub fn category(&self) -> &str {
        self.tuple.split('(').next().unwrap_or_default().trim()
    }
}

/// The questions of one prompt, in the order in which they are asked.
pub type Item = Vec<Question>;

/// The questions of all prompts, by the prompts' ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Questions {
    items: BTreeMap<String, Item>,
}

/// The columns that are read; others are ignored.
#[derive(Deserialize)]
struct Line {
    item_id: String,
    proposition_id: String,
    dependency: String,
    tuple: String,
    question_natural_language: String,
}

impl Questions {
    /// Reads a table with the columns `item_id`, `proposition_id`, `dependency`, `tuple` and
    /// `question_natural_language`.
    pub fn read(path: &Path, mode: Mode) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
        Self::parse(&text, mode).map_err(|error| Error::file(path, error))
    }

    /// Reads a table from text.
    ///
    /// Rows of an item follow each other. As in the published program, an item that comes up again later replaces the
    /// earlier one, and a number that comes up again replaces the question at its place. [`Mode::Fixed`] refuses
    /// both, and a parent that is not there.
    pub fn parse(text: &str, mode: Mode) -> Result<Self> {
        let mut items: BTreeMap<String, Item> = BTreeMap::new();
        let mut previous = None;
        for (row, line) in csv::Reader::from_reader(text.as_bytes()).deserialize().enumerate() {
            let bad = |message: String| Error::config(format!("data row {row}: {message}"));
            let line: Line = line.map_err(|error| bad(error.to_string()))?;
            if row == 0 && mode == Mode::Official {
                continue;
            }
            let (id, question) = line.check().map_err(bad)?;
            let goes_on = previous.as_deref() == Some(id.as_str());
            let item = items.entry(id.clone()).or_default();
            let twin = item.iter().position(|other| other.id == question.id).filter(|_| goes_on);
            if mode == Mode::Fixed && (twin.is_some() || (!goes_on && !item.is_empty())) {
                return Err(bad(format!(
                    "question {} of item `{id}` is there twice or apart from its item",
                    question.id
                )));
            }
            match twin {
                Some(place) => item[place] = question,
                None if goes_on => item.push(question),
                None => *item = vec![question],
            }
            previous = Some(id);
        }
        let questions = Self { items };
        if mode == Mode::Fixed {
            questions.check_parents()?;
        }
        match questions.items.is_empty() {
            true => Err(Error::config("the table holds no question; give the published dpg_bench.csv or one like it")),
            false => Ok(questions),
        }
    }

    /// The questions of one prompt.
    pub fn item(&self, id: &str) -> Option<&Item> {
        self.items.get(id)
    }

    /// The prompts' ids.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.items.keys().map(String::as_str)
    }

    fn check_parents(&self) -> Result<()> {
        for (id, item) in &self.items {
            let known = |parent: &u32| item.iter().any(|question| question.id == *parent);
            let orphan = item.iter().find_map(|q| Some((q.id, q.parents.iter().find(|&parent| !known(parent))?)));
            if let Some((question, parent)) = orphan {
                return Err(Error::config(format!(
                    "question {question} of item `{id}` depends on question {parent}, which is not there"
                )));
            }
        }
        Ok(())
    }
}

impl Line {
    fn check(self) -> Result<(String, Question), String> {
        let number = |text: &str| {
            let parsed = text.trim().parse::<u32>();
            parsed.map_err(|_| format!("`{text}` is no number; give proposition_id and dependency as whole numbers"))
        };
        let id = number(&self.proposition_id)?;
        let parents: Vec<u32> = self.dependency.split(',').map(number).collect::<Result<_, _>>()?;
        // 0 stands for no parent.
        let parents = parents.into_iter().filter(|&parent| parent != 0).collect();
        Ok((self.item_id, Question { id, text: self.question_natural_language, tuple: self.tuple, parents }))
    }
}
