//! JSON lists and JSON lines: where a picture lies and what is said of it, or SimpleAR's `code_path`, `label_path`.
//!
//! Paths are relative to the list's folder or to the root of images, or absolute, as `generate_meta.py` writes them:
//! the list is the user's own. A file is read when its entry is reached.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use grpo::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::caption;
use super::entry::{Caption, Content, Entry, Fault, Found, Reason};
use super::files::{MOST_PICTURE_BYTES, MOST_TEXT_BYTES, Source, inside, read_file, shown};
use super::{Columns, Corpus, Entries, codes};

/// A list and the folder that its paths begin at.
pub(super) struct List {
    source: Source,
    root: PathBuf,
    columns: Columns,
    /// What a `.json` says; a `.jsonl` is read again for every pass.
    rows: Option<Vec<Row>>,
}

/// An object of a list, or what is wrong with it.
type Row = std::result::Result<Sample, Fault>;

/// What an object says.
enum Sample {
    Picture { path: Box<str>, caption: Caption },
    Codes { codes: Box<str>, labels: Box<str> },
}

impl List {
    /// A `.json` list.
    pub(super) fn open(source: Source, columns: &Columns, images: Option<&Path>) -> Result<Self> {
        let file = File::open(&source.path).map_err(|error| Error::file(&source.path, error))?;
        let mut json = serde_json::Deserializer::from_reader(BufReader::new(file));
        let rows = Rows(columns).deserialize(&mut json).and_then(|rows| json.end().map(|()| rows));
        let rows = rows.map_err(|error| {
            Error::file(&source.path, format!("{error}; give a list of objects, or name a file of JSON lines .jsonl"))
        })?;
        Ok(Self { rows: Some(rows), ..Self::lines(source, columns, images) })
    }

    /// A `.jsonl` list.
    pub(super) fn lines(source: Source, columns: &Columns, images: Option<&Path>) -> Self {
        let root = images.or(source.path.parent()).unwrap_or(Path::new("")).to_owned();
        Self { source, root, columns: columns.clone(), rows: None }
    }

    /// The entry of an object, whose number counts from 1 as a line's does.
    fn entry(&self, number: u64, row: std::result::Result<&Sample, Fault>) -> Found {
        let name = format!("{}/{number}", self.source.name);
        match row.and_then(|sample| self.read(sample)) {
            Ok((content, caption)) => Ok(Entry { name, content, caption }),
            Err(fault) => Err(fault.of(name)),
        }
    }

    fn read(&self, sample: &Sample) -> std::result::Result<(Content, Caption), Fault> {
        match sample {
            Sample::Picture { path, caption } => {
                let picture = read_file(&self.place(path)?, MOST_PICTURE_BYTES);
                Ok((Content::Encoded(picture.map_err(|fault| fault.within(&shown(path.as_bytes())))?), caption.clone()))
            }
            Sample::Codes { codes, labels } => {
                let content = codes::read_codes(&self.place(codes)?);
                let caption = codes::read_labels(&self.place(labels)?);
                Ok((
                    content.map_err(|fault| fault.within(&shown(codes.as_bytes())))?,
                    caption.map_err(|fault| fault.within(&shown(labels.as_bytes())))?,
                ))
            }
        }
    }

    fn place(&self, path: &str) -> std::result::Result<PathBuf, Fault> {
        match Path::new(path).strip_prefix("/") {
            Ok(below) => inside(Path::new("/"), &below.to_string_lossy()),
            Err(_) => inside(&self.root, path),
        }
    }
}

impl Corpus for List {
    fn identity(&self) -> String {
        Source::identity("list", std::slice::from_ref(&self.source))
    }

    fn n_entries(&self) -> Option<u64> {
        self.rows.as_ref().map(|rows| rows.len() as u64)
    }

    fn entries(&self, first: u64) -> Result<Entries<'_>> {
        if let Some(rows) = &self.rows {
            let numbered = (1..).zip(rows).skip(usize::try_from(first).unwrap_or(usize::MAX));
            return Ok(Box::new(
                numbered.map(|(number, row)| Ok(self.entry(number, row.as_ref().map_err(Fault::clone)))),
            ));
        }
        let file = File::open(&self.source.path).map_err(|error| Error::file(&self.source.path, error))?;
        let lines = Lines { stream: BufReader::new(file), number: 0, n_left_out: first };
        Ok(Box::new(lines.map(move |line| {
            let Line { number, text } = line.map_err(|error| Error::file(&self.source.path, error))?;
            let row = text.and_then(|text| row_of_line(&text, &self.columns));
            Ok(self.entry(number, row.as_ref().map_err(Fault::clone)))
        })))
    }
}

/// The rows of a list, of which one object at a time is held as JSON.
struct Rows<'a>(&'a Columns);

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = Vec<Row>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> std::result::Result<Vec<Row>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = Vec<Row>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Vec<Row>, A::Error> {
        let mut rows = Vec::new();
        while let Some(value) = list.next_element()? {
            rows.push(row(&value, self.0));
        }
        Ok(rows)
    }
}

fn row_of_line(line: &[u8], columns: &Columns) -> Row {
    let value = serde_json::from_str(caption::utf8(line)?);
    row(&value.map_err(|error| Fault::new(Reason::DamagedEntry, format!("not JSON: {error}")))?, columns)
}

fn row(value: &Value, columns: &Columns) -> Row {
    let Value::Object(object) = value else {
        return Err(Fault::new(Reason::DamagedEntry, "not an object with the paths and captions of an image"));
    };
    if let (Some(codes), Some(labels)) = (path(object, &["code_path"])?, path(object, &["label_path"])?) {
        return Ok(Sample::Codes { codes, labels });
    }
    // A name that the user chose is meant before those that lists commonly have.
    let chosen = Columns::default().image != columns.image;
    let names = [columns.image.as_str(), "image_path", "image"];
    let nothing = || Fault::new(Reason::NoPicture, format!("no field `{}` with the path of a picture", columns.image));
    let path = path(object, if chosen { &names } else { &names[1..] })?.ok_or_else(nothing)?;
    let short = match caption::field(object, &columns.caption)? {
        None => caption::field(object, "prompt")?,
        caption => caption,
    };
    Ok(Sample::Picture { path, caption: caption::of_picture(short, caption::field(object, &columns.long_caption)?)? })
}

/// The first of these fields that is there.
fn path(object: &Map<String, Value>, names: &[&str]) -> std::result::Result<Option<Box<str>>, Fault> {
    let found = names.iter().find_map(|name| Some((name, object.get(*name).filter(|value| !value.is_null())?)));
    match found {
        None => Ok(None),
        Some((_, Value::String(path))) => Ok(Some(path.as_str().into())),
        Some((name, _)) => Err(Fault::new(Reason::DamagedEntry, format!("field `{name}` is not the path of a file"))),
    }
}

/// The lines of a file that say something, none of them held beyond the limit.
struct Lines {
    stream: BufReader<File>,
    number: u64,
    n_left_out: u64,
}

/// A line with its number from 1.
struct Line {
    number: u64,
    text: std::result::Result<Vec<u8>, Fault>,
}

impl Lines {
    /// The next line, blank or not.
    fn line(&mut self) -> std::io::Result<Option<Line>> {
        let mut text = Vec::new();
        let n_read = self.stream.by_ref().take(MOST_TEXT_BYTES + 1).read_until(b'\n', &mut text)?;
        if n_read == 0 {
            return Ok(None);
        }
        self.number += 1;
        let whole = n_read as u64 <= MOST_TEXT_BYTES || text.ends_with(b"\n");
        if !whole {
            self.stream.skip_until(b'\n')?;
        }
        let too_long = || Fault::new(Reason::TooLarge, format!("a line of more than {MOST_TEXT_BYTES} bytes"));
        Ok(Some(Line { number: self.number, text: if whole { Ok(text) } else { Err(too_long()) } }))
    }
}

impl Iterator for Lines {
    type Item = std::io::Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let line = self.line().transpose()?;
            let blank =
                line.as_ref().is_ok_and(|line| line.text.as_ref().is_ok_and(|text| text.trim_ascii().is_empty()));
            match line {
                Ok(_) if blank => {}
                Ok(_) if self.n_left_out > 0 => self.n_left_out -= 1,
                line => return Some(line),
            }
        }
    }
}
