//! Parquet files as data sets of Hugging Face have them: a column of pictures, a column of captions.
//!
//! The image is a binary column, a text column of paths, or the group `{bytes, path}` of the `datasets` library, whose
//! path counts where its bytes are null. Rows are read one at a time, and of a row group no more than a page of each
//! of these columns is in memory. After damage the other rows of the row group are skipped and named, so that an
//! entry's number follows from the file's footer alone.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use grpo::{Error, Result};
use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::caption;
use super::entry::{Caption, Content, Entry, Fault, Found, Reason};
use super::files::{MOST_PICTURE_BYTES, MOST_TEXT_BYTES, Source, inside, read_file, shown, too_large};
use super::{Columns, Corpus, Entries};

/// One file or several.
pub(super) struct Tables {
    tables: Vec<Table>,
    columns: Columns,
    images: Option<PathBuf>,
}

/// A file and the number of rows in each of its row groups.
struct Table {
    source: Source,
    groups: Vec<u64>,
}

impl Tables {
    pub(super) fn open(sources: Vec<Source>, columns: &Columns, images: Option<&Path>) -> Result<Self> {
        let table = |source: Source| {
            let (file, _) = open(&source, columns)?;
            let rows = |group: &parquet::file::metadata::RowGroupMetaData| u64::try_from(group.num_rows());
            let groups = file.metadata().row_groups().iter().map(rows).collect::<std::result::Result<_, _>>();
            let groups = groups.map_err(|_| Error::file(&source.path, "a row group of less than no rows"))?;
            Ok(Table { source, groups })
        };
        let tables = sources.into_iter().map(table).collect::<Result<_>>()?;
        Ok(Self { tables, columns: columns.clone(), images: images.map(Path::to_owned) })
    }

    fn entry(&self, table: &Table, row: u64, cells: std::result::Result<Cells, String>) -> Found {
        let name = format!("{}/{row}", table.source.name);
        let cells = cells.map_err(|message| Fault::new(Reason::DamagedEntry, message));
        match cells.and_then(|cells| self.content(table, &cells)) {
            Ok((content, caption)) => Ok(Entry { name, content, caption }),
            Err(fault) => Err(fault.of(name)),
        }
    }

    fn content(&self, table: &Table, cells: &Cells) -> std::result::Result<(Content, Caption), Fault> {
        let text = |cell: &Option<ByteArray>, name: &str| {
            let bytes = cell.as_ref().map(|cell| within(cell.data(), MOST_TEXT_BYTES)).transpose()?;
            let text = bytes.map(caption::utf8).transpose().map(|text| text.map(str::to_owned));
            text.map_err(|fault: Fault| fault.within(name))
        };
        let short = text(&cells.caption, &self.columns.caption)?;
        let long = text(&cells.long_caption, &self.columns.long_caption)?;
        let picture = match (&cells.bytes, &cells.path) {
            (Some(bytes), _) => within(bytes.data(), MOST_PICTURE_BYTES)?.to_vec(),
            (None, Some(path)) => self.file(table, path.data())?,
            (None, None) => return Err(Fault::new(Reason::NoPicture, format!("`{}` is null", self.columns.image))),
        };
        Ok((Content::Encoded(picture), caption::of_picture(short.as_deref(), long.as_deref())?))
    }

    /// A picture beside the file; an absolute path would be another machine's.
    fn file(&self, table: &Table, path: &[u8]) -> std::result::Result<Vec<u8>, Fault> {
        let shown = shown(path);
        let unsafe_name = || Fault::new(Reason::UnsafeName, format!("{shown} is not UTF-8"));
        let root = self.images.as_deref().or(table.source.path.parent()).unwrap_or(Path::new(""));
        let path = inside(root, std::str::from_utf8(path).map_err(|_| unsafe_name())?)?;
        read_file(&path, MOST_PICTURE_BYTES).map_err(|fault| fault.within(&shown))
    }
}

fn within(bytes: &[u8], limit: u64) -> std::result::Result<&[u8], Fault> {
    match bytes.len() as u64 > limit {
        true => Err(too_large(bytes.len() as u64, limit)),
        false => Ok(bytes),
    }
}

impl Corpus for Tables {
    fn identity(&self) -> String {
        Source::identity("parquet", self.tables.iter().map(|table| &table.source))
    }

    fn n_entries(&self) -> Option<u64> {
        self.tables.iter().flat_map(|table| &table.groups).try_fold(0, |sum: u64, n_rows| sum.checked_add(*n_rows))
    }

    fn entries(&self, first: u64) -> Result<Entries<'_>> {
        Ok(Box::new(Rows { corpus: self, tables: self.tables.iter(), table: None, n_left_out: first }))
    }
}

/// The rows of one file after the other.
struct Rows<'a> {
    corpus: &'a Tables,
    tables: std::slice::Iter<'a, Table>,
    table: Option<OpenTable<'a>>,
    n_left_out: u64,
}

impl Rows<'_> {
    fn step(&mut self) -> Result<Option<Found>> {
        loop {
            if self.table.is_none() {
                self.table =
                    self.tables.next().map(|table| OpenTable::open(table, &self.corpus.columns)).transpose()?;
            }
            let Some(table) = &mut self.table else { return Ok(None) };
            match table.next_row(&mut self.n_left_out) {
                Some((row, cells)) => return Ok(Some(self.corpus.entry(table.table, row, cells))),
                None => self.table = None,
            }
        }
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<Found>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.tables = [].iter();
        }
        step.transpose()
    }
}

/// A file with the place that reading has come to.
struct OpenTable<'a> {
    table: &'a Table,
    file: SerializedFileReader<File>,
    leaves: Leaves<usize>,
    /// The row group that is read or comes next, and the row in it.
    group: usize,
    row: u64,
    /// Rows of the groups before.
    n_before: u64,
    /// Readers of the group, or what has happened to it.
    columns: Option<std::result::Result<Leaves<ColumnReaderImpl<ByteArrayType>>, String>>,
}

/// A row's values, without the nulls.
type Cells = Leaves<ByteArray>;

impl<'a> OpenTable<'a> {
    fn open(table: &'a Table, columns: &Columns) -> Result<Self> {
        let (file, leaves) = open(&table.source, columns)?;
        Ok(Self { table, file, leaves, group: 0, row: 0, n_before: 0, columns: None })
    }

    /// The row after those to leave out, with its number in the file.
    fn next_row(&mut self, n_left_out: &mut u64) -> Option<(u64, std::result::Result<Cells, String>)> {
        while let Some(n_rows) = self.table.groups.get(self.group).copied() {
            // A row group that is left out whole is not opened.
            let passed = self.columns.is_none() && *n_left_out >= n_rows;
            if passed {
                *n_left_out -= n_rows;
            }
            if passed || self.row == n_rows {
                (self.group, self.row, self.n_before) = (self.group + 1, 0, self.n_before.saturating_add(n_rows));
                self.columns = None;
                continue;
            }
            let row = self.n_before.saturating_add(self.row);
            let cells = self.cells();
            self.row += 1;
            // A row that is left out is read all the same: damage in it reaches those behind.
            match n_left_out.checked_sub(1) {
                Some(rest) => *n_left_out = rest,
                None => return Some((row, cells)),
            }
        }
        None
    }

    fn cells(&mut self) -> std::result::Result<Cells, String> {
        let (file, leaves, group) = (&self.file, self.leaves, self.group);
        let columns = self.columns.get_or_insert_with(|| {
            guarded(|| {
                let group = file.get_row_group(group)?;
                leaves.try_map(|leaf| Ok(Some(get_typed_column_reader(group.get_column_reader(leaf)?))))
            })
        });
        let readers = columns.as_mut().map_err(|message| message.clone())?;
        let cells = guarded(|| readers.as_mut().try_map(cell));
        if let Err(message) = &cells {
            *columns = Err(format!("row group {group} is damaged before this row: {message}"));
        }
        cells
    }
}

/// The next value of a column, `None` where it is null.
fn cell(column: &mut ColumnReaderImpl<ByteArrayType>) -> parquet::errors::Result<Option<ByteArray>> {
    let (mut values, mut levels) = (Vec::with_capacity(1), Vec::with_capacity(1));
    let (n_records, _, _) = column.read_records(1, Some(&mut levels), None, &mut values)?;
    match n_records {
        1 => Ok(values.pop()),
        _ => Err(ParquetError::EOF("a column has fewer rows than its row group".into())),
    }
}

/// Something for each column that is read, where there is any.
#[derive(Clone, Copy)]
struct Leaves<T> {
    bytes: Option<T>,
    path: Option<T>,
    caption: Option<T>,
    long_caption: Option<T>,
}

impl<T> Leaves<T> {
    fn try_map<U, E>(
        self,
        mut f: impl FnMut(T) -> std::result::Result<Option<U>, E>,
    ) -> std::result::Result<Leaves<U>, E> {
        let mut one = |leaf: Option<T>| leaf.map_or(Ok(None), &mut f);
        let (bytes, path) = (one(self.bytes)?, one(self.path)?);
        Ok(Leaves { bytes, path, caption: one(self.caption)?, long_caption: one(self.long_caption)? })
    }

    fn as_mut(&mut self) -> Leaves<&mut T> {
        let Self { bytes, path, caption, long_caption } = self;
        let (bytes, path) = (bytes.as_mut(), path.as_mut());
        Leaves { bytes, path, caption: caption.as_mut(), long_caption: long_caption.as_mut() }
    }
}

/// Reads a file's footer and finds the columns.
fn open(source: &Source, columns: &Columns) -> Result<(SerializedFileReader<File>, Leaves<usize>)> {
    let fault = |message: String| Error::file(&source.path, message);
    let file = File::open(&source.path).map_err(|error| fault(error.to_string()))?;
    let file =
        guarded(|| SerializedFileReader::new(file)).map_err(|error| fault(format!("{error}; give a Parquet file")))?;
    let schema = file.metadata().file_metadata().schema_descr();
    let find = |path: &[&str], texts: Option<bool>| {
        schema.columns().iter().position(|column| {
            column.path().parts() == path
                && column.physical_type() == Type::BYTE_ARRAY
                && texts.is_none_or(|texts| texts == is_text(column))
        })
    };
    let image = columns.image.as_str();
    let leaves = Leaves {
        bytes: find(&[image], Some(false)).or_else(|| find(&[image, "bytes"], None)),
        path: find(&[image], Some(true)).or_else(|| find(&[image, "path"], None)),
        caption: find(&[&columns.caption], None),
        long_caption: find(&[&columns.long_caption], None),
    };
    let lacks = |what: &str| {
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
        Err(fault(format!("has no {what}; its columns are {}", names.join(", "))))
    };
    match (leaves.bytes.or(leaves.path), leaves.caption) {
        (None, _) => lacks(&format!("column `{image}` of pictures or paths, nor a group `{image}` of bytes and path")),
        (_, None) => lacks(&format!("column `{}` of texts", columns.caption)),
        _ => Ok((file, leaves)),
    }
}

fn is_text(column: &ColumnDescriptor) -> bool {
    column.converted_type() == ConvertedType::UTF8 || matches!(column.logical_type_ref(), Some(LogicalType::String))
}

/// Runs the parser, whose panic is a fault of the file.
fn guarded<T>(parse: impl FnOnce() -> parquet::errors::Result<T>) -> std::result::Result<T, String> {
    let parsed = catch_unwind(AssertUnwindSafe(parse)).map_err(|_| "the parser gave up".to_owned())?;
    parsed.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::column::writer::ColumnWriter;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::entry::Reason::*;
    use super::super::tests::{Short, check, check_mutants};
    use super::*;

    type Column<'a> = &'a [Option<&'a [u8]>];

    const NESTED: &str = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional binary caption (UTF8);
        optional binary long_caption (UTF8);
        optional int32 width; }";

    /// A file with these row groups, each a list of columns; numbers are left null.
    fn file(schema: &str, groups: &[&[Column]], compression: Compression) -> Vec<u8> {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
        for columns in groups {
            let mut group = writer.next_row_group().unwrap();
            let mut cells = columns.iter();
            while let Some(mut column) = group.next_column().unwrap() {
                fill(column.untyped(), &mut cells, columns[0].len());
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.into_inner().unwrap()
    }

    fn fill<'a>(column: &mut ColumnWriter, cells: &mut impl Iterator<Item = &'a Column<'a>>, n_rows: usize) {
        let typed = match column {
            ColumnWriter::ByteArrayColumnWriter(typed) => typed,
            ColumnWriter::Int32ColumnWriter(typed) => {
                typed.write_batch(&[], Some(&vec![0; n_rows]), None).unwrap();
                return;
            }
            _ => panic!("a column of another type"),
        };
        let cells = cells.next().unwrap();
        let most = typed.get_descriptor().max_def_level();
        let levels: Vec<i16> = cells.iter().map(|cell| most - i16::from(cell.is_none())).collect();
        let values: Vec<ByteArray> = cells.iter().flatten().map(|cell| ByteArray::from(cell.to_vec())).collect();
        typed.write_batch(&values, Some(&levels), None).unwrap();
    }

    fn check_at(folder: &Path, columns: &Columns, expected: &[Short]) -> Vec<Content> {
        check(&*super::super::open(folder, columns, None).unwrap(), expected)
    }

    const A: Option<&[u8]> = Some(b"picture a");

    /// Two row groups: pictures by value and by path, captions of one line and of two.
    fn small(compression: Compression) -> Vec<u8> {
        let first: &[Column] = &[
            &[A, None, None],
            &[Some(b"x.jpg"), Some(b"b.jpg"), None],
            &[Some(&b" a\nb"[..]); 3],
            &[None, Some(b"long"), None],
        ];
        let second: &[Column] = &[&[A, A], &[None, None], &[None, Some(b"last")], &[None, None]];
        file(NESTED, &[first, second], compression)
    }

    fn expected_of_small(name: &str) -> [String; 5] {
        [0, 1, 2, 3, 4].map(|row| format!("{name}/{row}"))
    }

    #[test]
    fn rows_in_order_over_groups_files_and_codecs() {
        let zstd = Compression::ZSTD(Default::default());
        let gzip = Compression::GZIP(Default::default());
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, zstd, gzip, Compression::LZ4_RAW] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("b.jpg"), b"picture b").unwrap();
            let mut expected = Vec::new();
            let names = ["0.parquet", "1.parquet"].map(expected_of_small);
            for (file, names) in ["0.parquet", "1.parquet"].iter().zip(&names) {
                fs::write(folder.path().join(file), small(compression)).unwrap();
                expected.extend([
                    Ok((names[0].as_str(), &["a b"][..])),
                    Ok((names[1].as_str(), &["a b", "long"])),
                    Err((names[2].as_str(), NoPicture, "`image` is null")),
                    Err((names[3].as_str(), NoCaption, "nothing is said")),
                    Ok((names[4].as_str(), &["last"])),
                ]);
            }
            let contents = check_at(folder.path(), &Columns::default(), &expected);
            let encoded = |bytes: &[u8]| Content::Encoded(bytes.to_vec());
            assert_eq!(contents[..3], [encoded(b"picture a"), encoded(b"picture b"), encoded(b"picture a")]);
        }
    }

    #[test]
    fn binary_and_text_columns() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.jpg"), b"by path").unwrap();
        let columns = Columns { image: "jpg".into(), caption: "text".into(), ..Columns::default() };
        let write = |schema: &str, cells: &[Column]| {
            fs::write(folder.path().join("a.parquet"), file(schema, &[cells], Compression::SNAPPY)).unwrap();
        };
        write("message s { required binary jpg; required binary text (STRING); }", &[&[A], &[Some(b"c")]]);
        let contents = check_at(folder.path(), &columns, &[Ok(("a.parquet/0", &["c"]))]);
        assert_eq!(contents, [Content::Encoded(b"picture a".to_vec())]);
        write(
            "message s { required binary text; required binary jpg (STRING); }",
            &[
                &[Some(&b"c"[..]); 6],
                &[Some(b"a.jpg"), Some(b"../a.jpg"), Some(b"/a.jpg"), Some(b"b.jpg"), Some(b"\xFF"), Some(b"")],
            ],
        );
        let expected: [Short; 6] = [
            Ok(("a.parquet/0", &["c"])),
            Err(("a.parquet/1", UnsafeName, "`../a.jpg`")),
            Err(("a.parquet/2", UnsafeName, "`/a.jpg`")),
            Err(("a.parquet/3", UnreadableFile, "`b.jpg`: No such file")),
            Err(("a.parquet/4", UnsafeName, "is not UTF-8")),
            Err(("a.parquet/5", UnsafeName, "is not a path")),
        ];
        let contents = check_at(folder.path(), &columns, &expected);
        assert_eq!(contents, [Content::Encoded(b"by path".to_vec())]);
        let large = vec![b'a'; (1 << 20) + 1];
        write(
            "message s { required binary jpg; optional binary text (STRING); }",
            &[&[A; 3], &[Some(b"caf\xE9"), Some(b" "), Some(&large)]],
        );
        let expected: [Short; 3] = [
            Err(("a.parquet/0", CaptionNotUtf8, "text: ")),
            Err(("a.parquet/1", EmptyCaption, "the caption is empty")),
            Err(("a.parquet/2", TooLarge, "1048577 bytes; at most 1048576")),
        ];
        check_at(folder.path(), &columns, &expected);
    }

    #[test]
    fn files_without_the_columns_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let check = |schema: &str, part: &str| {
            fs::write(folder.path().join("a.parquet"), file(schema, &[], Compression::SNAPPY)).unwrap();
            let opened = super::super::open(folder.path(), &Columns::default(), None);
            let message = opened.map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("a.parquet: ") && message.contains(part), "{message:?} does not say {part:?}");
        };
        check("message s { required binary caption; }", "has no column `image` of pictures or paths");
        check("message s { required int32 image; required binary caption; }", "its columns are image, caption");
        check("message s { required binary image; required int32 caption; }", "has no column `caption` of texts");
        let list = "required group caption (LIST) { repeated group list { required binary element (UTF8); } }";
        check(&format!("message s {{ required binary image; {list} }}"), "its columns are image, caption.list.element");
        for bytes in [&b""[..], b"PAR1PAR1", b"not a table, and long enough to be one"] {
            fs::write(folder.path().join("a.parquet"), bytes).unwrap();
            let opened = super::super::open(folder.path(), &Columns::default(), None);
            let message = opened.map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("a.parquet: ") && message.contains("give a Parquet file"), "{message}");
        }
    }

    #[test]
    fn damage_in_a_row_group_leaves_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.parquet");
        let mut bytes = small(Compression::SNAPPY);
        // The first page's header, behind the mark at the start of the file.
        bytes[4..12].fill(0xFF);
        fs::write(&path, bytes).unwrap();
        let names = expected_of_small("0.parquet");
        let damaged = |row: usize| Err((names[row].as_str(), DamagedEntry, ""));
        let rest = [Err((names[3].as_str(), NoCaption, "")), Ok((names[4].as_str(), &["last"][..]))];
        check_at(&path, &Columns::default(), &[damaged(0), damaged(1), damaged(2), rest[0], rest[1]]);
    }

    #[test]
    fn a_parsers_panic_is_a_fault_of_the_file() {
        let fails = || -> parquet::errors::Result<()> { panic!("index out of bounds") };
        assert_eq!(guarded(fails), Err("the parser gave up".to_owned()));
    }

    #[test]
    fn mutants_cause_no_panic() {
        for (name, compression) in [("0.parquet", Compression::SNAPPY), ("1.parquet", Compression::UNCOMPRESSED)] {
            check_mutants(name, &small(compression), |folder| folder.join(name));
        }
    }
}
