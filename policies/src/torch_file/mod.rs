//! Torch's zip archives, read strictly and as data: what `torch.save` and `torch.jit.save` write, and nothing is run.
//!
//! An archive holds a pickle, `<name>/data.pkl`, and the numbers of each storage, `<name>/data/<key>`. The pickle of a
//! state dict is a map of tensors, that of a TorchScript module a tree of objects whose attributes are tensors or
//! objects. Sizes are checked before memory is taken, entries are read where they lie.

mod archive;
mod pickle;
mod value;
mod view;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use grpo::{Error, Result};

use archive::Archive;
use pickle::Pickle;
use value::{Id, Node};
use view::View;

/// Maps inside maps; a module tree of torch stays below 20.
const DEEPEST: usize = 64;
/// Values that are looked at; the pickles that torch writes share few of them.
const MOST_VALUES: usize = 1 << 20;
const MOST_TENSORS: usize = 1 << 16;
const LONGEST_NAME: usize = 512;

/// What is wrong with a file, without its name.
type Checked<T> = std::result::Result<T, String>;

/// Reads every floating-point tensor of an archive as f32 on the CPU, under its attribute names joined by dots.
///
/// Integer tensors are left out. A file that is cut short, asks for code to be run, holds a name twice, a view beyond
/// its storage or a number that is not finite, is an error that names the file and the tensor.
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut archive = Archive::open(path)?;
    tensors(&mut archive).map_err(|message| Error::file(path, message))
}

fn tensors(archive: &mut Archive) -> Checked<BTreeMap<String, Tensor>> {
    let bytes = archive.pickle()?;
    let pickle = Pickle::read(&bytes)?;
    let mut views = Views::default();
    views.collect(&pickle)?;
    let mut n_numbers = 0u64;
    let mut by_storage: BTreeMap<&str, Vec<(&str, &View)>> = BTreeMap::new();
    for (name, view) in &views.by_name {
        let count = view.check().map_err(|message| format!("tensor `{name}` {message}"))?;
        n_numbers = n_numbers.saturating_add(count);
        by_storage.entry(view.storage.key).or_default().push((name, view));
    }
    // A number takes at least a byte, so more of them than bytes are one storage seen many times.
    if n_numbers > archive.size() {
        return Err(format!(
            "its tensors have {n_numbers} numbers in a file of {} bytes; save them without expanded views",
            archive.size()
        ));
    }
    let mut tensors = BTreeMap::new();
    for (key, views) in by_storage {
        let bytes = archive.storage(key)?;
        for (name, view) in views {
            let tensor = tensor(view, &bytes).map_err(|message| format!("tensor `{name}` {message}"))?;
            tensors.insert(name.to_owned(), tensor);
        }
    }
    match tensors.is_empty() {
        true => Err("holds no floating-point tensor; give the file of a model's weights".into()),
        false => Ok(tensors),
    }
}

fn tensor(view: &View, bytes: &[u8]) -> Checked<Tensor> {
    let values = view.values(bytes)?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Tensor::from_vec(values, &view.shape[..], &Device::Cpu).map_err(|error| error.to_string()),
        Some(index) => {
            Err(format!("is {} at element {index}; weights must be finite, take an earlier checkpoint", values[index]))
        }
    }
}

/// The floating-point tensors of a pickle, by name.
#[derive(Default)]
struct Views<'a> {
    by_name: BTreeMap<String, View<'a>>,
}

/// A map on the way down: its entries, the next one, and how long the name was above it.
struct Level<'p, 'a> {
    entries: Vec<(Key<'a>, &'p Node<'a>)>,
    next: usize,
    name: usize,
}

/// How an entry is called.
#[derive(Clone, Copy)]
enum Key<'a> {
    Name(&'a str),
    Number(i64),
}

impl<'a> Views<'a> {
    /// Walks the tree from its root without recursion, since a hostile file decides how deep it is.
    fn collect(&mut self, pickle: &Pickle<'a>) -> Checked<()> {
        let (mut name, mut n_values) = (String::new(), 0);
        let mut levels = vec![Level { entries: entries(pickle, pickle.root())?, next: 0, name: 0 }];
        while let Some(level) = levels.last_mut() {
            name.truncate(level.name);
            let Some((key, node)) = level.entries.get(level.next) else {
                levels.pop();
                continue;
            };
            level.next += 1;
            n_values += 1;
            push(&mut name, *key)?;
            match node {
                Node::Tensor(view) => self.insert(&name, view)?,
                Node::Map(_) | Node::Object(_) | Node::Sequence(_) => {
                    let entries = entries(pickle, node)?;
                    n_values += entries.len();
                    levels.push(Level { entries, next: 0, name: name.len() });
                }
                _ => {}
            }
            if levels.len() > DEEPEST || n_values > MOST_VALUES {
                return Err(format!(
                    "its pickle is nested deeper than {DEEPEST} or holds more than {MOST_VALUES} values at `{name}`; \
                     save a plain state dict"
                ));
            }
        }
        Ok(())
    }

    fn insert(&mut self, name: &str, view: &View<'a>) -> Checked<()> {
        if !view.storage.kind.is_float() {
            return Ok(());
        }
        if self.by_name.len() == MOST_TENSORS {
            return Err(format!("holds more than {MOST_TENSORS} tensors; save fewer in one file"));
        }
        match self.by_name.insert(name.to_owned(), view.clone()) {
            None => Ok(()),
            Some(_) => Err(format!("tensor `{name}` comes twice; save the file again")),
        }
    }
}

/// What a map, an object or a sequence holds; nothing of other values.
fn entries<'p, 'a>(pickle: &'p Pickle<'a>, node: &Node<'a>) -> Checked<Vec<(Key<'a>, &'p Node<'a>)>> {
    match node {
        Node::Object(None) => Ok(Vec::new()),
        Node::Object(Some(state)) => match pickle.node(*state) {
            Node::Map(map) => named(pickle, map),
            _ => Ok(Vec::new()),
        },
        Node::Map(map) => named(pickle, map),
        Node::Sequence(items) => {
            Ok((0..).zip(items).map(|(index, &item)| (Key::Number(index), pickle.node(item))).collect())
        }
        _ => Err("its pickle holds no map and no module; save a state dict or a scripted module".into()),
    }
}

fn named<'p, 'a>(pickle: &'p Pickle<'a>, map: &[(Id, Id)]) -> Checked<Vec<(Key<'a>, &'p Node<'a>)>> {
    let key = |id| match pickle.node(id) {
        Node::Text(name) => Ok(Key::Name(name)),
        Node::Int(number) => Ok(Key::Number(*number)),
        _ => Err("its pickle has a map whose keys are neither names nor numbers; save a plain state dict".to_string()),
    };
    map.iter().map(|&(name, value)| Ok((key(name)?, pickle.node(value)))).collect()
}

fn push(name: &mut String, key: Key) -> Checked<()> {
    let key = match key {
        Key::Name(key) => Cow::Borrowed(key),
        Key::Number(key) => Cow::Owned(key.to_string()),
    };
    if name.len() + 1 + key.len() > LONGEST_NAME {
        return Err(format!("has a name of more than {LONGEST_NAME} bytes below `{name}`; save a plain state dict"));
    }
    if !name.is_empty() {
        name.push('.');
    }
    name.push_str(&key);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::*;

    /// A pickle in the making, by opcodes.
    struct Writer(Vec<u8>);

    impl Writer {
        fn new() -> Self {
            Self(vec![0x80, 2])
        }

        fn op(mut self, bytes: &[u8]) -> Self {
            self.0.extend_from_slice(bytes);
            self
        }

        fn text(self, text: &str) -> Self {
            self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
        }

        fn global(self, module: &str, name: &str) -> Self {
            self.op(format!("c{module}\n{name}\n").as_bytes())
        }

        fn int(self, number: i64) -> Self {
            self.op(&[0x8A, 8]).op(&number.to_le_bytes())
        }

        fn ints(self, numbers: &[i64]) -> Self {
            numbers.iter().fold(self.op(b"("), |writer, &number| writer.int(number)).op(b"t")
        }

        fn tensor(self, class: &str, (key, count): (&str, i64), view: (i64, &[i64], &[i64])) -> Self {
            let writer = self.global("torch._utils", "_rebuild_tensor_v2").op(b"((").text("storage");
            let writer = writer.global("torch", class).text(key).text("cpu").int(count).op(b"tQ");
            let (offset, shape, strides) = view;
            let writer = writer.int(offset).ints(shape).ints(strides).op(b"\x89");
            writer.global("collections", "OrderedDict").op(b")RtR")
        }

        fn end(self) -> Vec<u8> {
            self.op(b".").0
        }
    }

    fn archive(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        let mut entry = |name: String, bytes: &[u8]| {
            zip.start_file(name, options).unwrap();
            zip.write_all(bytes).unwrap();
        };
        entry("w/data.pkl".into(), pickle);
        storages.iter().for_each(|(key, bytes)| entry(format!("w/{key}"), bytes));
        zip.finish().unwrap().into_inner()
    }

    fn read_bytes(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path())
    }

    const SIX: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    fn six() -> Vec<u8> {
        SIX.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    /// `{"w": tensor}` over a storage of six numbers.
    fn one(view: (i64, &[i64], &[i64])) -> Vec<u8> {
        Writer::new().op(b"}").text("w").tensor("FloatStorage", ("0", 6), view).op(b"s").end()
    }

    #[test]
    fn views_are_read_in_the_order_of_their_shape() {
        for (offset, shape, strides, expected) in [
            (0, &[2, 3][..], &[3, 1][..], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..]),
            (0, &[3, 2], &[1, 3], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
            (1, &[2, 1, 2], &[3, i64::MAX, 1], &[2.0, 3.0, 5.0, 6.0]),
            (2, &[3, 2], &[0, 1], &[3.0, 4.0, 3.0, 4.0, 3.0, 4.0]),
            (5, &[], &[], &[6.0]),
            (0, &[0, 7], &[7, 1], &[]),
        ] {
            let tensors = read_bytes(&archive(&one((offset, shape, strides)), &[("data/0", &six())])).unwrap();
            let dims: Vec<i64> = tensors["w"].dims().iter().map(|&size| size as i64).collect();
            assert_eq!(dims, shape);
            assert_eq!(tensors["w"].flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
        }
    }

    #[test]
    fn every_type_of_numbers_is_read_and_integers_are_left_out() {
        let pickle =
            ["HalfStorage", "BFloat16Storage", "DoubleStorage", "LongStorage"].iter().zip(["0", "1", "2", "3"]);
        let pickle = pickle.fold(Writer::new().op(b"}("), |writer, (class, key)| {
            writer.text(class).tensor(class, (key, 1), (0, &[1], &[1]))
        });
        let bytes = archive(
            &pickle.op(b"u").end(),
            &[
                ("data/0", &0xC000u16.to_le_bytes()),
                ("data/1", &0x3FC0u16.to_le_bytes()),
                ("data/2", &0.25f64.to_le_bytes()),
                ("byteorder", b"little"),
            ],
        );
        let tensors = read_bytes(&bytes).unwrap();
        let values: Vec<(&str, f32)> =
            tensors.iter().map(|(name, tensor)| (&name[..], tensor.to_vec1::<f32>().unwrap()[0])).collect();
        assert_eq!(values, [("BFloat16Storage", 1.5), ("DoubleStorage", 0.25), ("HalfStorage", -2.0)]);
    }

    /// `{"model": {0: [parameter]}}`, and an object that refers to itself.
    #[test]
    fn names_are_joined_and_circles_are_refused() {
        let nested = Writer::new().op(b"}").text("model").op(b"}").int(0).op(b"](");
        let nested = nested.global("torch._utils", "_rebuild_parameter").op(b"(");
        let nested = nested.tensor("FloatStorage", ("0", 6), (0, &[6], &[1])).op(b"tRess").end();
        let tensors = read_bytes(&archive(&nested, &[("data/0", &six())])).unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["model.0.0"]);
        let circle = Writer::new().global("__torch__.a", "B").op(b")\x81q\x00}").text("b").op(b"h\x00sb").end();
        let message = read_bytes(&archive(&circle, &[])).unwrap_err().to_string();
        assert!(message.contains("nested deeper than 64") && message.contains("b.b.b"), "{message}");
        // Twenty maps that each hold the next one twice.
        let doubling = Writer::new().op(b"}q\x00");
        let doubling = (0u8..40).fold(doubling, |writer, level| {
            let writer = writer.op(b"}(").text("a").op(&[b'h', level]).text("b").op(&[b'h', level]);
            writer.op(&[b'u', b'q', level + 1])
        });
        let message = read_bytes(&archive(&doubling.end(), &[])).unwrap_err().to_string();
        assert!(message.contains("more than 1048576 values"), "{message}");
    }

    #[test]
    fn a_pickle_that_is_wrong_is_named() {
        let check = |pickle: Vec<u8>, expected: &str| {
            let message = read_bytes(&archive(&pickle, &[("data/0", &six())])).unwrap_err().to_string();
            assert!(message.contains(expected), "no `{expected}` in {message}");
        };
        let new = Writer::new;
        let tensor = |class: &str, storage, view| new().op(b"}").text("w").tensor(class, storage, view).op(b"s").end();
        check(
            new().global("os", "system").op(b"(").text("true").op(b"tR").end(),
            "data.pkl at byte 2: asks for `os.system`, and nothing is run here",
        );
        check(new().global("torch", "ComplexFloatStorage").end(), "`torch.ComplexFloatStorage`");
        check(new().global("__torch__evil", "A").end(), "asks for `__torch__evil.A`");
        check(vec![0x80, 4, b'.'], "protocol 4 where torch writes 2");
        check(new().op(b"i").end(), "opcode 0x69");
        check(new().end(), "the stack is empty");
        check(new().op(b"}(s").end(), "the stack is empty");
        check(new().op(b"t").end(), "no mark is set");
        check(new().op(b"h\x07").end(), "memo 7 was never written");
        check(new().op(b"X\xFF\xFF\xFF\xFF").end(), "4294967295 bytes are due and 1 left");
        check(new().op(b"X\x01\x00\x00\x00\xFF").end(), "a string that is no text");
        check(new().op(b"ctorch").end(), "a name without an end");
        check(new().op(b"\x8A\x09").op(&[0; 9]).end(), "an integer of 9 bytes");
        check(new().op(b"NN\x81").end(), "none, a truth value or a float where a module's class is due");
        check(new().op(b"N)R").end(), "where a function is due");
        check(new().op(b"N}b").end(), "where a module is due");
        check(new().op(b"NNNs").end(), "where a map is due");
        check(new().op(b"}(Nu").end(), "a key without a value");
        check(new().op(b"NNa").end(), "where a list is due");
        check(new().op(b"NQ").end(), "where a tuple is due");
        check(new().op(b")Q").end(), "0 values where 5 are due");
        check(new().op(b"N").end(), "holds no map and no module");
        check(new().op(b"}NNs").end(), "keys are neither names nor numbers");
        check(new().op(b"}").end(), "holds no floating-point tensor");
        check(new().op(b"}").text(&"x".repeat(600)).op(b"Ns").end(), "a name of more than 512 bytes");
        let twice = new().op(b"}").text("w").tensor("FloatStorage", ("0", 6), (0, &[1], &[1])).op(b"s");
        check(twice.text("w").tensor("FloatStorage", ("0", 6), (0, &[1], &[1])).op(b"s").end(), "`w` comes twice");
        check(one((0, &[2, 3], &[1])), "2 dimensions with 1 strides");
        check(one((-1, &[2], &[1])), "the number -1 where an offset is due");
        check(one((0, &[-2], &[1])), "the number -2 where a size is due");
        check(one((0, &[1; 9], &[1; 9])), "9 dimensions; at most 8");
        check(one((1, &[6], &[1])), "tensor `w` of shape [6], strides [1] and offset 1 lies beyond its storage of 6");
        check(one((0, &[2, 2], &[6, 1])), "lies beyond");
        check(one((0, &[i64::MAX, i64::MAX], &[1, 1])), "lies beyond");
        check(one((0, &[i64::MAX], &[0])), "numbers in a file of");
        check(tensor("FloatStorage", ("1", 6), (0, &[1], &[1])), "`data/1`: specified file not found");
        check(tensor("FloatStorage", ("0", 7), (0, &[1], &[1])), "tensor `w` has a storage of 7 numbers of 4 bytes");
        check(tensor("DoubleStorage", ("0", 6), (0, &[6], &[1])), "`data/0` has 24 bytes");
        check(tensor("FloatStorage", ("0", -6), (0, &[6], &[1])), "a reference to something other than a storage");
    }

    #[test]
    fn numbers_that_are_not_finite_are_named() {
        let mut bytes = six();
        bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
        let message = read_bytes(&archive(&one((0, &[6], &[1])), &[("data/0", &bytes)])).unwrap_err().to_string();
        assert!(message.contains("tensor `w` is NaN at element 2"), "{message}");
    }

    #[test]
    fn an_archive_that_is_wrong_is_named() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read_bytes(bytes).unwrap_err().to_string();
            assert!(message.contains(expected), "no `{expected}` in {message}");
        };
        let pickle = one((0, &[6], &[1]));
        let good = archive(&pickle, &[("data/0", &six())]);
        read_bytes(&good).unwrap();
        check(b"", "no zip archive, or one that is cut short");
        check(&pickle, "no zip archive");
        check(&archive(&pickle, &[("data/0", &six()), ("byteorder", b"big")]), "byte order `big`");
        check(&archive(&vec![b'N'; (8 << 20) + 1], &[]), "`data.pkl` has 8388609 bytes, more than 8388608");
        let mut other = good.clone();
        let names = other.windows(4).enumerate().filter(|(_, bytes)| bytes == b".pkl").map(|(at, _)| at);
        names.collect::<Vec<_>>().into_iter().for_each(|at| other[at + 1] = b'q');
        check(&other, "without a data.pkl");
        // A changed number is found by the archive's checksum.
        let mut changed = good.clone();
        let at = changed.windows(24).position(|bytes| bytes == six()).unwrap();
        changed[at] ^= 1;
        check(&changed, "`data/0`: Invalid checksum");
        assert!(read(Path::new("no/such.jit")).unwrap_err().to_string().contains("no/such.jit"));
        assert!(read(Path::new(".")).unwrap_err().to_string().contains("not a file"));
    }

    /// Neither a cut nor a changed byte anywhere makes a panic; a cut is always an error.
    #[test]
    fn no_damage_is_a_panic() {
        let good = archive(&one((0, &[3, 2], &[1, 3])), &[("data/0", &six())]);
        for length in 0..good.len() {
            assert!(read_bytes(&good[..length]).is_err(), "{length}");
        }
        for at in 0..good.len() {
            for flip in [0x01, 0x80, 0xFF] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                drop(read_bytes(&bytes));
            }
        }
        // The checksum hides changes in the pickle; here it agrees with them.
        let pickle = one((0, &[3, 2], &[1, 3]));
        for at in 0..pickle.len() {
            for flip in [0x01, 0x10, 0x80, 0xFF] {
                let mut bytes = pickle.clone();
                bytes[at] ^= flip;
                drop(read_bytes(&archive(&bytes, &[("data/0", &six())])));
            }
        }
    }
}
