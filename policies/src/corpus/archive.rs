//! A tar archive, one header at a time: where its members lie, with nothing unpacked and no body read unasked.
//!
//! Headers and pax records are understood by the `tar` crate. The steps from one to the next are ours, since the
//! crate's iterator borrows its archive, which a corpus' reader must own; takes a file that ends at a header for a
//! whole archive; and reads a long name of any size into memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use tar::{EntryType, Header, PaxExtensions};

const BLOCK: u64 = 512;
/// A long name or a set of pax records; real ones have some hundred bytes.
const MOST_RECORD_BYTES: u64 = 64 << 10;

/// An open archive.
pub(super) struct Archive {
    stream: BufReader<File>,
    length: u64,
    /// Where the stream stands.
    at: u64,
    /// Where the next header is due.
    next: u64,
}

/// What a header says.
pub(super) struct Member {
    pub name: Vec<u8>,
    pub kind: Kind,
    /// Where the body begins.
    pub start: u64,
    /// Bytes of the body as declared, which need not be there.
    pub size: u64,
}

/// What a member is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    /// What is never read, in words.
    Other(&'static str),
}

/// What records before a header say of its member in the header's stead.
#[derive(Default)]
struct Records {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

impl Archive {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { stream: BufReader::new(file), length, at: 0, next: 0 })
    }

    /// The next member, `None` after the end mark; an error is for a person, and nothing can be read after it.
    pub(super) fn next_member(&mut self) -> Result<Option<Member>, String> {
        let mut records = Records::default();
        loop {
            let at = self.next;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|error| format!("header at byte {at}: {error}"))?;
            let kind = header.entry_type();
            match kind {
                EntryType::GNULongName => {
                    let name = self.record(size)?;
                    records.name = Some(name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec());
                }
                EntryType::XHeader => {
                    records.read(&self.record(size)?).map_err(|error| format!("pax records at byte {at}: {error}"))?
                }
                EntryType::GNULongLink | EntryType::XGlobalHeader => {}
                _ => return self.member(&header, records).map(Some),
            }
            self.pass(size)?;
        }
    }

    /// Whether the whole body of a member is there.
    pub(super) fn holds(&self, member: &Member) -> bool {
        member.start.checked_add(member.size).is_some_and(|end| end <= self.length)
    }

    /// Bytes of a body, whose size is the caller's to limit.
    pub(super) fn body(&mut self, start: u64, size: u64) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; usize::try_from(size).map_err(|error| error.to_string())?];
        self.read(start, &mut bytes).map_err(|error| format!("{size} bytes at byte {start}: {error}"))?;
        Ok(bytes)
    }

    fn member(&mut self, header: &Header, records: Records) -> Result<Member, String> {
        let name = records.name.unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match header.entry_type() {
            _ if records.sparse => Kind::Other("a sparse file"),
            // Archives from before 1988 have no type for folders.
            EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Folder,
            EntryType::Link => Kind::Other("a hard link"),
            EntryType::Symlink => Kind::Other("a symbolic link"),
            EntryType::Char => Kind::Other("a character device"),
            EntryType::Block => Kind::Other("a block device"),
            EntryType::Fifo => Kind::Other("a pipe"),
            EntryType::GNUSparse => Kind::Other("a sparse file"),
            _ => Kind::Other("of a kind that is not known"),
        };
        // Python's tarfile and GNU tar take no body after these, whatever their header says.
        let bodiless = matches!(
            header.entry_type(),
            EntryType::Directory
                | EntryType::Link
                | EntryType::Symlink
                | EntryType::Char
                | EntryType::Block
                | EntryType::Fifo
        );
        let declared = records.size.map_or_else(|| header.entry_size(), Ok).map_err(|error| error.to_string())?;
        let size = if bodiless { 0 } else { declared };
        let start = self.next;
        self.pass(size)?;
        Ok(Member { name, kind, start, size })
    }

    /// The header that is due, with its sum verified; `None` for the end mark.
    fn header(&mut self) -> Result<Option<Header>, String> {
        let at = self.next;
        let block = self.block()?;
        if block.iter().all(|byte| *byte == 0) {
            return match self.block()?.iter().all(|byte| *byte == 0) {
                true => Ok(None),
                false => Err(format!("half of an end mark at byte {at}, then something else")),
            };
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(&block);
        // The sum is over the header with blanks where the sum stands.
        let sum: u32 =
            block.iter().enumerate().map(|(i, byte)| if (148..156).contains(&i) { 32 } else { u32::from(*byte) }).sum();
        match header.cksum() {
            Ok(written) if written == sum => Ok(Some(header)),
            _ => Err(format!("no header at byte {at}, where one is due")),
        }
    }

    fn block(&mut self) -> Result<[u8; BLOCK as usize], String> {
        let (at, length) = (self.next, self.length);
        if at.checked_add(BLOCK).is_none_or(|end| end > length) {
            return Err(format!("cut short: {length} bytes, and the next header or the end mark is due at byte {at}"));
        }
        let mut block = [0; BLOCK as usize];
        self.read(at, &mut block).map_err(|error| format!("byte {at}: {error}"))?;
        self.next += BLOCK;
        Ok(block)
    }

    /// The body of a record that the next header depends on.
    fn record(&mut self, size: u64) -> Result<Vec<u8>, String> {
        let at = self.next;
        if size > MOST_RECORD_BYTES {
            return Err(format!("a name or record of {size} bytes at byte {at}; at most {MOST_RECORD_BYTES} are read"));
        }
        self.body(at, size)
    }

    /// Goes past a body; bodies fill whole blocks.
    fn pass(&mut self, size: u64) -> Result<(), String> {
        let end = size.checked_next_multiple_of(BLOCK).and_then(|size| self.next.checked_add(size));
        self.next = end.ok_or_else(|| format!("a body of {size} bytes at byte {}", self.next))?;
        Ok(())
    }

    /// Fills `bytes` from `start` on; what was read ahead is used, and going there costs no call of the system.
    fn read(&mut self, start: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.stream.seek_relative(start.wrapping_sub(self.at).cast_signed())?;
        let read = self.stream.read_exact(bytes);
        self.at = match read {
            Ok(()) => start + bytes.len() as u64,
            Err(_) => self.stream.stream_position()?,
        };
        read
    }
}

impl Records {
    fn read(&mut self, bytes: &[u8]) -> Result<(), String> {
        for record in PaxExtensions::new(bytes) {
            let record = record.map_err(|error| error.to_string())?;
            let value = record.value_bytes();
            match record.key_bytes() {
                b"path" => self.name = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                    self.size = Some(size.ok_or("a size that is no number")?);
                }
                key => self.sparse |= key.starts_with(b"GNU.sparse."),
            }
        }
        Ok(())
    }
}
