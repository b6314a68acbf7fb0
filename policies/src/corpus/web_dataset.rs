//! WebDataset archives as img2dataset writes them: `KEY.jpg`, `KEY.txt`, `KEY.json`, one sample after the other.
//!
//! A sample is a run of members whose names agree up to the first dot of the file name, folder included. Which samples
//! there are follows from the headers alone, so that reading can begin anywhere without a body being read, and finds
//! the same entries under the same numbers.

use grpo::{Error, Result};
use serde_json::{Map, Value};

use super::archive::Archive;
use super::caption;
use super::entry::{Caption, Content, Entry, Fault, Found, Reason};
use super::files::Source;
use super::sample::{Part, Sample, Span};
use super::{Columns, Corpus, Entries};

/// One archive or several.
pub(super) struct WebDataset {
    pub archives: Vec<Source>,
    pub columns: Columns,
}

impl Corpus for WebDataset {
    fn identity(&self) -> String {
        Source::identity("web_dataset", &self.archives)
    }

    fn n_entries(&self) -> Option<u64> {
        None
    }

    fn entries(&self, first: u64) -> Result<Entries<'_>> {
        Ok(Box::new(Samples { corpus: self, n_opened: 0, shard: None, n_left_out: first }))
    }
}

/// The entries of one archive after the other.
struct Samples<'a> {
    corpus: &'a WebDataset,
    n_opened: usize,
    shard: Option<Shard<'a>>,
    n_left_out: u64,
}

impl Samples<'_> {
    fn step(&mut self) -> Result<Option<Found>> {
        self.open_next()?;
        while let Some(shard) = &mut self.shard {
            match shard.next_item() {
                None => {
                    self.shard = None;
                    self.open_next()?;
                }
                Some(_) if self.n_left_out > 0 => self.n_left_out -= 1,
                Some(Item::Sample(sample)) => return Ok(Some(shard.read(sample, &self.corpus.columns))),
                Some(Item::Lost(name, fault)) => return Ok(Some(Err(fault.of(name)))),
            }
        }
        Ok(None)
    }

    /// Opens the next archive, where one is left and none is open.
    fn open_next(&mut self) -> Result<()> {
        if let (None, Some(source)) = (&self.shard, self.corpus.archives.get(self.n_opened)) {
            self.n_opened += 1;
            self.shard = Some(Shard::open(source)?);
        }
        Ok(())
    }
}

impl Iterator for Samples<'_> {
    type Item = Result<Found>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.n_opened = self.corpus.archives.len();
        }
        step.transpose()
    }
}

/// An archive with what was met behind the last sample.
struct Shard<'a> {
    name: &'a str,
    archive: Archive,
    ahead: Option<Met>,
    ended: bool,
}

/// What lies at a header; `None` at the end mark, an error where the archive is damaged.
type Met = std::result::Result<Option<Part>, String>;

/// What counts as an entry.
enum Item {
    Sample(Sample),
    /// What belongs to no sample, under this name.
    Lost(String, Fault),
}

impl<'a> Shard<'a> {
    fn open(source: &'a Source) -> Result<Self> {
        let archive = Archive::open(&source.path).map_err(|error| Error::file(&source.path, error))?;
        Ok(Self { name: &source.name, archive, ahead: None, ended: false })
    }

    fn next_item(&mut self) -> Option<Item> {
        let mut sample: Option<Sample> = None;
        while !self.ended {
            let met = self.ahead.take().unwrap_or_else(|| self.meet());
            // What begins something else waits until the sample before it is out.
            if let Some(done) = sample.take_if(|sample| !sample.goes_on_with(&met)) {
                self.ahead = Some(met);
                return Some(Item::Sample(done));
            }
            match met {
                Ok(None) => self.ended = true,
                Ok(Some(Part::Nothing)) => {}
                Ok(Some(Part::Unsafe { shown, fault })) => {
                    return Some(Item::Lost(format!("{}/{shown}", self.name), fault));
                }
                // The archive ends within this body, and what there is of its sample is lost with it.
                Ok(Some(Part::Cut { .. })) => sample = None,
                Ok(Some(Part::Of { key, member })) => sample.get_or_insert_with(|| Sample::of(key)).add(member),
                Err(message) => {
                    self.ended = true;
                    return Some(Item::Lost(self.name.to_owned(), Fault::new(Reason::DamagedEntry, message)));
                }
            }
        }
        None
    }

    fn meet(&mut self) -> Met {
        let member = self.archive.next_member()?;
        Ok(member.map(|member| Part::of(&member, self.archive.holds(&member))))
    }

    fn read(&mut self, sample: Sample, columns: &Columns) -> Found {
        let name = format!("{}/{}", self.name, sample.key);
        match self.content(sample, columns) {
            Ok((content, caption)) => Ok(Entry { name, content, caption }),
            Err(fault) => Err(fault.of(name)),
        }
    }

    fn content(&mut self, sample: Sample, columns: &Columns) -> std::result::Result<(Content, Caption), Fault> {
        if let Some(fault) = sample.fault {
            return Err(fault);
        }
        let nothing = || Fault::new(Reason::NoPicture, "no .jpg, .jpeg, .png or .webp");
        let picture = sample.picture.ok_or_else(nothing)?;
        let text = sample.text.map(|span| self.body(span)).transpose()?;
        let text = text.as_deref().map(caption::utf8).transpose().map_err(|fault| fault.within(".txt"))?;
        let json = sample.json.map(|span| self.body(span)).transpose()?;
        let json = json
            .as_deref()
            .map(caption::json::<Map<String, Value>>)
            .transpose()
            .map_err(|fault| fault.within(".json"))?
            .unwrap_or_default();
        let short = text.map_or_else(|| caption::field(&json, &columns.caption), |text| Ok(Some(text)))?;
        let caption = caption::of_picture(short, caption::field(&json, &columns.long_caption)?)?;
        Ok((Content::Encoded(self.body(picture)?), caption))
    }

    fn body(&mut self, (start, size): Span) -> std::result::Result<Vec<u8>, Fault> {
        self.archive.body(start, size).map_err(|message| Fault::new(Reason::DamagedEntry, message))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Cursor;

    use tar::{Builder, EntryType, Header};

    use super::super::entry::Reason::*;
    use super::super::open;
    use super::super::tests::{Short, check as check_corpus, check_mutants};
    use super::*;

    /// A member whatever its name, with a size that need not be that of its body.
    fn record(name: &[u8], kind: EntryType, size: u64, body: &[u8]) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_mode(0o644);
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        let padding = vec![0; body.len().next_multiple_of(512) - body.len()];
        [header.as_bytes(), body, &padding].concat()
    }

    fn file(name: &str, body: &[u8]) -> Vec<u8> {
        record(name.as_bytes(), EntryType::Regular, body.len() as u64, body)
    }

    fn special(name: &str, kind: EntryType) -> Vec<u8> {
        record(name.as_bytes(), kind, 0, &[])
    }

    fn sample(key: &str) -> Vec<u8> {
        [file(&format!("{key}.jpg"), b"picture"), file(&format!("{key}.txt"), b"caption")].concat()
    }

    const END: [u8; 1024] = [0; 1024];

    /// Reads archives `0.tar`, `1.tar`, … in a folder.
    fn check_all(archives: &[Vec<u8>], expected: &[Short]) -> Vec<Content> {
        let folder = tempfile::tempdir().unwrap();
        for (number, bytes) in archives.iter().enumerate() {
            fs::write(folder.path().join(format!("{number}.tar")), bytes).unwrap();
        }
        check_corpus(&*open(folder.path(), &Columns::default(), None).unwrap(), expected)
    }

    fn check(members: &[Vec<u8>], expected: &[Short]) -> Vec<Content> {
        check_all(&[[members.concat(), END.to_vec()].concat()], expected)
    }

    const GOOD: &[&str] = &["caption"];

    #[test]
    fn samples_are_runs_of_a_key() {
        let json = br#"{"caption": "from json", "long_caption": "a long\none", "width": 7}"#;
        let contents = check(
            &[
                special("./", EntryType::Directory),
                special("a/", EntryType::Directory),
                file("00.jpg", b"one"),
                file("00.txt", b" short\none "),
                file("00.json", json),
                file("00.cls", b"7"),
                file("a/00.txt", b"other folder"),
                file("README", b""),
                file("a/._00.jpg", b"hidden"),
                file("a/00.png", b"two"),
                file("./01.json", br#"{"caption": ["first", "second"]}"#),
                file("./01.webp", b"three"),
                file("02.seg.jpg", b"not a picture of its own"),
                file("02.jpeg", b"four"),
                file("02.txt", b"last"),
            ],
            &[
                Ok(("0.tar/00", &["short one", "a long one"])),
                Ok(("0.tar/a/00", &["other folder"])),
                Ok(("0.tar/01", &["first"])),
                Ok(("0.tar/02", &["last"])),
            ],
        );
        let encoded: Vec<Content> =
            ["one", "two", "three", "four"].map(|bytes| Content::Encoded(bytes.as_bytes().to_vec())).into();
        assert_eq!(contents, encoded);
    }

    #[test]
    fn archives_follow_one_another_by_name() {
        let archive = |key| [sample(key), END.to_vec()].concat();
        let expected: [Short; 3] = [Ok(("0.tar/b", GOOD)), Ok(("1.tar/a", GOOD)), Ok(("2.tar/a", GOOD))];
        check_all(&[archive("b"), archive("a"), archive("a")], &expected);
        check_all(&[END.to_vec()], &[]);
    }

    #[test]
    fn samples_without_their_parts() {
        let check = |members: &[Vec<u8>], reason, part| check(members, &[Err(("0.tar/k", reason, part))]);
        let picture = || file("k.jpg", b"picture");
        check(&[file("k.txt", b"text")], NoPicture, "no .jpg, .jpeg, .png or .webp");
        check(&[picture()], NoCaption, "nothing is said of the picture");
        check(&[picture(), file("k.json", b"{}")], NoCaption, "nothing is said");
        check(&[picture(), file("k.json", br#"{"caption": null}"#)], NoCaption, "nothing is said");
        check(&[picture(), file("k.txt", b" \n")], EmptyCaption, "the caption is empty");
        check(&[picture(), file("k.txt", b"caf\xE9")], CaptionNotUtf8, ".txt: ");
        check(&[picture(), file("k.json", b"{\"caption\": \"caf\xE9\"}")], CaptionNotUtf8, ".json: ");
        check(&[picture(), file("k.json", b"[7]")], DamagedEntry, ".json: ");
        check(&[picture(), file("k.json", br#"{"caption": 7}"#)], DamagedEntry, "field `caption` is neither");
        check(&[picture(), file("k.jpg", b"other"), file("k.txt", b"a")], DamagedEntry, "sample k has two pictures");
        check(&[picture(), file("k.png", b"other"), file("k.txt", b"a")], DamagedEntry, "sample k has two pictures");
        check(&[picture(), file("k.txt", b"a"), file("k.txt", b"a")], DamagedEntry, "sample k has two files .txt");
    }

    #[test]
    fn names_that_leave_the_corpus() {
        for (name, shown) in [
            ("../k.jpg", "0.tar/`../k.jpg`"),
            ("a/../k.jpg", "0.tar/`a/../k.jpg`"),
            ("/k.jpg", "0.tar/`/k.jpg`"),
            (".//k.jpg", "0.tar/`.//k.jpg`"),
            ("C:\\k.jpg", "0.tar/`C:\\\\k.jpg`"),
            ("a b.jpg", "0.tar/`a b.jpg`"),
            ("k\n.jpg", "0.tar/`k\\n.jpg`"),
            ("é.jpg", "0.tar/`é.jpg`"),
        ] {
            let expected: [Short; 3] =
                [Ok(("0.tar/0", GOOD)), Err((shown, UnsafeName, "a name has letters, digits")), Ok(("0.tar/1", GOOD))];
            check(&[sample("0"), file(name, b"picture"), sample("1")], &expected);
        }
        check(&[record(b"\xFF.jpg", EntryType::Regular, 0, b"")], &[Err(("0.tar/`\u{FFFD}.jpg`", UnsafeName, ""))]);
    }

    #[test]
    fn links_and_devices_are_never_read() {
        for (kind, what) in [
            (EntryType::Symlink, "`k.txt` is a symbolic link; only plain files are read"),
            (EntryType::Link, "`k.txt` is a hard link"),
            (EntryType::Char, "`k.txt` is a character device"),
            (EntryType::Block, "`k.txt` is a block device"),
            (EntryType::Fifo, "`k.txt` is a pipe"),
            (EntryType::GNUSparse, "`k.txt` is a sparse file"),
            (EntryType::new(b'Q'), "`k.txt` is of a kind that is not known"),
        ] {
            let expected: [Short; 2] = [Err(("0.tar/k", NotAFile, what)), Ok(("0.tar/l", GOOD))];
            check(&[file("k.jpg", b"picture"), special("k.txt", kind), sample("l")], &expected);
            // A link has no body, whatever its header says.
            let huge = record(b"k.txt", kind, 0o777_7777_7777, b"");
            if !matches!(kind, EntryType::GNUSparse | EntryType::__Nonexhaustive(_)) && kind != EntryType::new(b'Q') {
                check(&[file("k.jpg", b"picture"), huge, sample("l")], &expected);
            }
        }
        let device = special("null", EntryType::Char);
        check(&[device], &[Err(("0.tar/null", NotAFile, "`null` is a character device"))]);
    }

    #[test]
    fn sizes_are_limited_before_memory_is_taken() {
        let huge = |name: &[u8], size| record(name, EntryType::Regular, size, b"");
        let text = vec![b'a'; (1 << 20) + 1];
        check(
            &[file("k.jpg", b"picture"), file("k.txt", &text), sample("l")],
            &[Err(("0.tar/k", TooLarge, ".txt: 1048577 bytes; at most 1048576 are read")), Ok(("0.tar/l", GOOD))],
        );
        check(
            &[file("k.jpg", b"picture"), file("k.txt", &text[1..])],
            &[Ok(("0.tar/k", &[std::str::from_utf8(&text[1..]).unwrap()]))],
        );
        // The archive does not hold what the header declares.
        check(
            &[sample("j"), huge(b"k.jpg", 1 << 40)],
            &[
                Ok(("0.tar/j", GOOD)),
                Err(("0.tar/k", TooLarge, ".jpg: 1099511627776 bytes; at most 67108864 are read")),
                Err(("0.tar", DamagedEntry, "cut short: 3584 bytes")),
            ],
        );
        let damaged = |part| [Ok(("0.tar/j", GOOD)), Err(("0.tar", DamagedEntry, part))];
        check(&[sample("j"), huge(b"k.jpg", u64::MAX)], &damaged("a body of 18446744073709551615 bytes at byte 2560"));
        check(&[sample("j"), huge(b"k.jpg", u64::MAX - 1000)], &damaged("a body of"));
        check(
            &[sample("j"), huge(b"k.jpg", 5000)],
            &damaged("cut short: 3584 bytes, and the next header or the end mark"),
        );
    }

    #[test]
    fn long_names_are_read_up_to_a_limit() {
        let long = format!("{}/{}", "folder".repeat(40), "0".repeat(120));
        let mut builder = Builder::new(Vec::new());
        for (extension, body) in [("jpg", "picture"), ("txt", "caption")] {
            let mut header = Header::new_gnu();
            header.set_size(body.len() as u64);
            builder.append_data(&mut header, format!("{long}.{extension}"), Cursor::new(body)).unwrap();
        }
        let name = format!("0.tar/{long}");
        check_all(&[builder.into_inner().unwrap()], &[Ok((&name, GOOD))]);

        let pax = |records: &str| record(b"pax", EntryType::XHeader, records.len() as u64, records.as_bytes());
        let renamed = pax("16 path=a/k.jpg\n10 size=7\n");
        check(&[renamed, file("x", b"picture"), file("a/k.txt", b"caption")], &[Ok(("0.tar/a/k", GOOD))]);
        for (records, expected) in [
            ("17 path=../k.jpg\n", Err(("0.tar/`../k.jpg`", UnsafeName, ""))),
            ("22 GNU.sparse.major=1\n", Err(("0.tar/k", NotAFile, "`k.jpg` is a sparse file"))),
            ("10 size=-\n", Err(("0.tar", DamagedEntry, "pax records at byte 2048: a size that is no number"))),
            ("nonsense", Err(("0.tar", DamagedEntry, "pax records at byte 2048: malformed pax extension"))),
        ] {
            check(&[sample("j"), pax(records), file("k.jpg", b"picture")], &[Ok(("0.tar/j", GOOD)), expected]);
        }
        let name = vec![b'a'; 70_000];
        let huge = record(b"././@LongLink", EntryType::GNULongName, name.len() as u64, &name);
        let damaged = Err(("0.tar", DamagedEntry, "a name or record of 70000 bytes at byte 2560; at most 65536"));
        check(&[sample("j"), huge, file("k.jpg", b"")], &[Ok(("0.tar/j", GOOD)), damaged]);
        let longest = [vec![b'a'; 1025], b".jpg\0".to_vec()].concat();
        let long = record(b"././@LongLink", EntryType::GNULongName, longest.len() as u64, &longest);
        let shown = format!("0.tar/`{}…`", "a".repeat(120));
        check(&[long, file("k.jpg", b"")], &[Err((&shown, UnsafeName, "at most 1024 of them"))]);
    }

    #[test]
    fn damage_ends_an_archive_and_not_the_corpus() {
        let whole = [sample("a"), sample("b"), END.to_vec()].concat();
        let check = |bytes: Vec<u8>, keys: &[&str], part| {
            let names: Vec<String> = keys.iter().map(|key| format!("0.tar/{key}")).collect();
            let mut expected: Vec<Short> = names.iter().map(|name| Ok((name.as_str(), GOOD))).collect();
            expected.extend([Err(("0.tar", DamagedEntry, part)), Ok(("1.tar/a", GOOD)), Ok(("1.tar/b", GOOD))]);
            check_all(&[bytes, whole.clone()], &expected);
        };
        let cut = |length| whole[..length].to_vec();
        check(cut(0), &[], "cut short: 0 bytes, and the next header or the end mark is due at byte 0");
        check(cut(2048), &["a"], "cut short: 2048 bytes, and the next header or the end mark is due at byte 2048");
        check(cut(2300), &["a"], "cut short: 2300 bytes");
        check(cut(4096), &["a", "b"], "due at byte 4096");
        check(cut(4608), &["a", "b"], "due at byte 4608");
        // Within the body of b.txt, and within the padding behind it.
        check(cut(3584 + 3), &["a"], "cut short: 3587 bytes");
        check(cut(3584 + 7), &["a", "b"], "cut short: 3591 bytes");
        let flipped = |place: usize| {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            bytes
        };
        check(flipped(0), &[], "no header at byte 0, where one is due");
        check(flipped(2048 + 130), &["a"], "no header at byte 2048");
        check(flipped(4096), &["a", "b"], "no header at byte 4096");
        check(flipped(4608), &["a", "b"], "half of an end mark at byte 4096");
        check(b"<html>not an archive</html>".repeat(50), &[], "no header at byte 0");
    }

    #[test]
    fn mutants_cause_no_panic() {
        let json = file("b.json", br#"{"caption": "text", "long_caption": "longer"}"#);
        let pax = record(b"pax", EntryType::XHeader, 16, b"16 path=a/k.jpg\n");
        let bytes = [sample("a"), json, file("b.png", b"picture"), pax, sample("c"), END.to_vec()].concat();
        check_mutants("0.tar", &bytes, |folder| folder.join("0.tar"));
    }
}
