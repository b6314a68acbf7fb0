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
        let json = json.as_deref().map(object).transpose().map_err(|fault| fault.within(".json"))?.unwrap_or_default();
        let short = text.map_or_else(|| caption::field(&json, &columns.caption), |text| Ok(Some(text)))?;
        let caption = caption::of_picture(short, caption::field(&json, &columns.long_caption)?)?;
        Ok((Content::Encoded(self.body(picture)?), caption))
    }

    fn body(&mut self, (start, size): Span) -> std::result::Result<Vec<u8>, Fault> {
        self.archive.body(start, size).map_err(|message| Fault::new(Reason::DamagedEntry, message))
    }
}

fn object(bytes: &[u8]) -> std::result::Result<Map<String, Value>, Fault> {
    serde_json::from_str(caption::utf8(bytes)?).map_err(|error| Fault::new(Reason::DamagedEntry, error.to_string()))
}
