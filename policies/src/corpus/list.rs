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
        // The list alone is read for it: what it says, and not what its pictures hold.
        let checked = crc32c_of(&self.source.path).map_or_else(|error| error.to_string(), |crc| format!("{crc:08x}"));
        format!("{}, crc32c {checked}", Source::identity("list", [&self.source]))
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

fn crc32c_of(path: &Path) -> std::io::Result<u32> {
    let (mut file, mut buffer, mut crc) = (File::open(path)?, vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crc),
            n => crc = crc32c::crc32c_append(crc, &buffer[..n]),
        }
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
    row(&caption::json(line.trim_ascii_end())?, columns)
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::entry::Reason::*;
    use super::super::tests::{Short, check as check_corpus, check_mutants};
    use super::super::{npy, open};
    use super::*;

    /// A folder with pictures, codes and labels.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("deep/er")).unwrap();
        let codes = npy::tests::file("<u2", "(1, 2)", &[1, 0, 2, 0]);
        for (name, bytes) in [
            ("a.jpg", &b"picture a"[..]),
            ("deep/er/b.png", b"picture b"),
            ("0.npy", &codes),
            ("label.npy", b"short\nlong\n"),
            ("empty.npy", b""),
            ("latin.npy", b"caf\xE9"),
        ] {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn check_with(columns: &Columns, name: &str, text: &[u8], expected: &[Short]) -> Vec<Content> {
        let folder = folder();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        check_corpus(&*open(&path, columns, None).unwrap(), expected)
    }

    /// The same objects as JSON lines and as a list.
    fn check(objects: &[&str], expected: &[Short]) {
        let (lines, list) = (objects.join("\n"), format!("[{}]", objects.join(",\n")));
        check_with(&Columns::default(), "list.jsonl", lines.as_bytes(), expected);
        let names: Vec<String> = expected
            .iter()
            .map(|short| short.as_ref().map_or_else(|e| e.0, |o| o.0).replace("jsonl", "json"))
            .collect();
        let renamed = expected.iter().zip(&names).map(|(short, name)| match short {
            Ok((_, lines)) => Ok((name.as_str(), *lines)),
            Err((_, reason, part)) => Err((name.as_str(), *reason, *part)),
        });
        check_with(&Columns::default(), "list.json", list.as_bytes(), &renamed.collect::<Vec<Short>>());
    }

    #[test]
    fn lists_as_simplears_and_others_write_them() {
        check(
            &[
                r#"{"image_path": "a.jpg", "caption": "of\na "}"#,
                r#"{"image": "deep/er/b.png", "caption": ["first", "second"], "long_caption": "longer"}"#,
                r#"{"image_path": "./a.jpg", "image": 7, "prompt": "asked for"}"#,
                r#"{"code_path": "0.npy", "label_path": "label.npy"}"#,
            ],
            &[
                Ok(("list.jsonl/1", &["of a"])),
                Ok(("list.jsonl/2", &["first", "longer"])),
                Ok(("list.jsonl/3", &["asked for"])),
                Ok(("list.jsonl/4", &["short", "long"])),
            ],
        );
        let columns = Columns { image: "file".into(), caption: "said".into(), long_caption: "told".into() };
        let text = br#"{"file": "a.jpg", "image": "none.jpg", "said": "a", "told": "b", "caption": "c"}"#;
        let contents = check_with(&columns, "list.jsonl", text, &[Ok(("list.jsonl/1", &["a", "b"]))]);
        assert_eq!(contents, [Content::Encoded(b"picture a".to_vec())]);
    }

    #[test]
    fn paths_are_absolute_or_below_the_root() {
        let (folder, list) = (folder(), tempfile::tempdir().unwrap());
        let absolute = folder.path().join("a.jpg");
        let objects = [absolute.to_str().unwrap(), "er/b.png", "a.jpg"]
            .map(|path| format!(r#"{{"image": {path:?}, "caption": "c"}}"#));
        let path = list.path().join("list.jsonl");
        fs::write(&path, objects.join("\n")).unwrap();
        let corpus = open(&path, &Columns::default(), Some(&folder.path().join("deep"))).unwrap();
        let missing = Err(("list.jsonl/3", UnreadableFile, "`a.jpg`: No such file"));
        check_corpus(&*corpus, &[Ok(("list.jsonl/1", &["c"])), Ok(("list.jsonl/2", &["c"])), missing]);
        let (size, identity) = (fs::metadata(&path).unwrap().len(), corpus.identity());
        assert!(identity.starts_with(&format!("list: list.jsonl ({size} bytes), crc32c ")), "{identity}");
        // Another list of the same length is another corpus.
        fs::write(&path, objects.join("\n").replace("\"c\"", "\"d\"")).unwrap();
        assert_ne!(corpus.identity(), identity);
    }

    #[test]
    fn objects_that_name_no_entry() {
        let check = |object: &str, reason, part| {
            let good = r#"{"image": "a.jpg", "caption": "c"}"#;
            let expected: [Short; 2] = [Err(("list.jsonl/1", reason, part)), Ok(("list.jsonl/2", &["c"]))];
            check(&[object, good], &expected);
        };
        check(r#"{"caption": "c"}"#, NoPicture, "no field `image` with the path of a picture");
        check(r#"{"image": null, "caption": "c"}"#, NoPicture, "no field `image`");
        check(r#"{"image": 7, "caption": "c"}"#, DamagedEntry, "field `image` is not the path of a file");
        check(r#"{"image": "a.jpg"}"#, NoCaption, "nothing is said");
        check(r#"{"image": "a.jpg", "caption": []}"#, NoCaption, "nothing is said");
        check(r#"{"image": "a.jpg", "caption": " "}"#, EmptyCaption, "the caption is empty");
        check(r#"{"image": "a.jpg", "caption": {}}"#, DamagedEntry, "field `caption` is neither");
        check(r#"{"image": "none.jpg", "caption": "c"}"#, UnreadableFile, "`none.jpg`: No such file");
        check(r#"{"image": "../a.jpg", "caption": "c"}"#, UnsafeName, "`../a.jpg` is not a path below");
        check(r#"{"image": "/etc/../etc/hosts", "caption": "c"}"#, UnsafeName, "without `..`");
        check(r#"{"image": "deep", "caption": "c"}"#, NotAFile, "`deep`: not a plain file");
        check(r#"{"image": "/dev/zero", "caption": "c"}"#, NotAFile, "`/dev/zero`: not a plain file");
        check(r#"{"code_path": "1.npy", "label_path": "label.npy"}"#, UnreadableFile, "`1.npy`: No such file");
        check(r#"{"code_path": "a.jpg", "label_path": "label.npy"}"#, DamagedEntry, "`a.jpg`: not a NumPy file");
        check(
            r#"{"code_path": "0.npy", "label_path": "empty.npy"}"#,
            EmptyCaption,
            "`empty.npy`: the label file is empty",
        );
        check(r#"{"code_path": "0.npy", "label_path": "latin.npy"}"#, CaptionNotUtf8, "`latin.npy`: ");
        check(r#"{"code_path": "../0.npy", "label_path": "label.npy"}"#, UnsafeName, "`../0.npy`");
        check("7", DamagedEntry, "not an object");
        check(r#"["a.jpg"]"#, DamagedEntry, "not an object");
    }

    #[test]
    fn lines_that_are_not_json_are_named() {
        let good = br#"{"image": "a.jpg", "caption": "c"}"#;
        let long = vec![b' '; 1 << 20];
        let lines = [
            &good[..],
            b"",
            b" \r",
            b"{\"image\": \"a.jpg\", \"capt",
            b"{\"image\": \"a.jpg\", \"caption\": \"\xFF\"}",
            br#"{"image": "a.jpg", "caption": "\ud800"}"#,
            &[&good[..], &long].concat(),
            good,
        ];
        let expected: [Short; 6] = [
            Ok(("list.jsonl/1", &["c"])),
            Err(("list.jsonl/4", DamagedEntry, "not JSON: EOF while parsing")),
            Err(("list.jsonl/5", CaptionNotUtf8, "save the text as UTF-8")),
            Err(("list.jsonl/6", DamagedEntry, "not JSON: ")),
            Err(("list.jsonl/7", TooLarge, "a line of more than 1048576 bytes")),
            Ok(("list.jsonl/8", &["c"])),
        ];
        check_with(&Columns::default(), "list.jsonl", &lines.join(&b'\n'), &expected);
        check_with(&Columns::default(), "list.jsonl", b"", &[]);
        check_with(&Columns::default(), "list.json", b"[]", &[]);
    }

    #[test]
    fn a_damaged_list_is_an_error() {
        let folder = folder();
        let path = folder.path().join("list.json");
        for text in [&b""[..], b"{}", b"[{}", b"[{}] more", b"[{\"a\": \"\xFF\"}]", b"{}\n{}"] {
            fs::write(&path, text).unwrap();
            let message = open(&path, &Columns::default(), None).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("list.json: ") && message.contains("give a list of objects"), "{message}");
        }
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed_to_plain_files_only() {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink(at("a.jpg"), at("good.jpg")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("device.jpg")).unwrap();
        std::os::unix::fs::symlink(at("none"), at("dangling.jpg")).unwrap();
        let objects =
            ["good", "device", "dangling"].map(|name| format!(r#"{{"image": "{name}.jpg", "caption": "c"}}"#));
        fs::write(at("list.jsonl"), objects.join("\n")).unwrap();
        let expected: [Short; 3] = [
            Ok(("list.jsonl/1", &["c"])),
            Err(("list.jsonl/2", NotAFile, "`device.jpg`: not a plain file")),
            Err(("list.jsonl/3", UnreadableFile, "`dangling.jpg`")),
        ];
        check_corpus(&*open(&at("list.jsonl"), &Columns::default(), None).unwrap(), &expected);
    }

    #[test]
    fn mutants_cause_no_panic() {
        let lines = br#"{"image_path": "a.jpg", "caption": ["one", "two"]}
{"code_path": "0.npy", "label_path": "0.txt"}
{"image": "b.jpg", "prompt": "three", "long_caption": "\u00e9"}
"#;
        check_mutants("list.jsonl", lines, |folder| folder.join("list.jsonl"));
        let list = br#"[{"image_path": "a.jpg", "caption": ["one"]}, {"code_path": "0.npy", "label_path": "0.txt"}]"#;
        check_mutants("list.json", list, |folder| folder.join("list.json"));
    }
}
