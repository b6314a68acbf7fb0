//! What an ONNX file would make ONNX Runtime open or call, found without ONNX Runtime.
//!
//! A model may name further files for its weights and operators of libraries outside ONNX Runtime. Both are read from
//! the protobuf itself, before anything is loaded: only the fields that lead to tensors and nodes are followed, every
//! length is checked against what is there, and nesting is bounded. Field numbers: `onnx.proto` of ONNX 1.23.

use std::collections::BTreeSet;
use std::path::Path;

use grpo::{Error, Result};

/// Operator sets that every ONNX Runtime carries; `com.microsoft` is what its own fp16 and int8 converters write.
const DOMAINS: [&str; 4] = ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"];
/// Messages inside messages: a subgraph is three, and real models nest two or three of them.
const DEPTH: u32 = 32;

/// The other files a model reads its weights from, as it names them; an error where it asks for more than weights.
pub(crate) fn external_files(path: &Path, model: &[u8]) -> Result<BTreeSet<String>> {
    let mut walk = Walk { files: BTreeSet::new(), n_graphs: 0 };
    match walk.message(Message::Model, model, 0) {
        Ok(()) if walk.n_graphs == 0 => Err(Error::file(path, format!("there is no graph in it; {ANEW}"))),
        Ok(()) => Ok(walk.files),
        Err(fault) => Err(Error::file(path, fault)),
    }
}

const ANEW: &str = "export it again, or copy it anew";

/// The messages of `onnx.proto` on the way to tensors and nodes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    ExternalEntry,
    OperatorSet,
    Function,
    Training,
}

/// What a field of a message means here.
enum Field {
    Inside(Message),
    /// The operator set of a node, an import or a function.
    Domain,
    /// The operator of a node.
    Operator,
    Ignored,
}

impl Message {
    fn field(self, number: u64) -> Field {
        use Field::{Domain, Ignored, Inside, Operator};
        match (self, number) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) | (Self::Training, 1 | 2) => Inside(Self::Graph),
            (Self::Model, 8) | (Self::Function, 9) => Inside(Self::OperatorSet),
            (Self::Model, 20) => Inside(Self::Training),
            (Self::Model, 25) => Inside(Self::Function),
            (Self::Graph, 1) | (Self::Function, 7) => Inside(Self::Node),
            (Self::Function, 11) | (Self::Node, 5) => Inside(Self::Attribute),
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::SparseTensor, 1 | 2) => Inside(Self::Tensor),
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Inside(Self::SparseTensor),
            (Self::Tensor, 13) => Inside(Self::ExternalEntry),
            (Self::Node, 7) | (Self::OperatorSet, 1) | (Self::Function, 10) => Domain,
            (Self::Node, 4) => Operator,
            _ => Ignored,
        }
    }
}

struct Walk {
    files: BTreeSet<String>,
    n_graphs: usize,
}

impl Walk {
    fn message(&mut self, kind: Message, bytes: &[u8], depth: u32) -> Result<(), String> {
        if depth > DEPTH {
            return Err(format!("its graphs are nested more than {DEPTH} messages deep; {ANEW}"));
        }
        self.n_graphs += usize::from(kind == Message::Graph);
        if kind == Message::ExternalEntry {
            return self.external_entry(bytes);
        }
        let mut reader = Reader(bytes);
        while let Some((number, value)) = reader.field()? {
            match kind.field(number) {
                Field::Inside(inner) => self.message(inner, value, depth + 1)?,
                Field::Domain => check_domain(value)?,
                Field::Operator => check_operator(value)?,
                Field::Ignored => {}
            }
        }
        Ok(())
    }

    /// A key and a value; protobuf lets either come first, or twice, so every value beside the key counts.
    fn external_entry(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut reader = Reader(bytes);
        let (mut is_location, mut values) = (false, Vec::new());
        while let Some((number, value)) = reader.field()? {
            match number {
                1 => is_location |= value == b"location",
                2 => values.push(text(value)?),
                _ => {}
            }
        }
        if is_location {
            self.files.extend(values.into_iter().map(str::to_string));
        }
        Ok(())
    }
}

fn check_domain(bytes: &[u8]) -> Result<(), String> {
    let domain = text(bytes)?;
    if DOMAINS.contains(&domain) {
        return Ok(());
    }
    Err(format!("it needs operators of `{domain}`, and only onnx runtime's own are run; export it without them"))
}

/// `EPContext` holds, or names the file of, code compiled for one device.
fn check_operator(bytes: &[u8]) -> Result<(), String> {
    match text(bytes)? {
        "EPContext" => Err("it holds compiled code (EPContext); export the plain graph".into()),
        _ => Ok(()),
    }
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| format!("a name in it is not UTF-8; {ANEW}"))
}

/// The rest of a protobuf message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The number and bytes of the next field that has a length; `None` at the end.
    fn field(&mut self) -> Result<Option<(u64, &'a [u8])>, String> {
        while !self.0.is_empty() {
            let key = self.varint()?;
            match key & 7 {
                0 => self.varint().map(drop)?,
                1 => self.take(8).map(drop)?,
                2 => {
                    let length = self.varint()?;
                    let value = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
                    return Ok(Some((key >> 3, value)));
                }
                5 => self.take(4).map(drop)?,
                kind => return Err(format!("it holds a field of kind {kind}, which no ONNX file has; {ANEW}")),
            }
        }
        Ok(None)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (value, rest) = self
            .0
            .split_at_checked(length)
            .ok_or_else(|| format!("it is cut: a field of {length} bytes has {} left; {ANEW}", self.0.len()))?;
        self.0 = rest;
        Ok(value)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for (at, &byte) in self.0.iter().enumerate().take(10) {
            value |= u64::from(byte & 127).checked_shl(7 * at as u32).unwrap_or(0);
            if byte < 128 {
                self.0 = &self.0[at + 1..];
                return Ok(value);
            }
        }
        Err(format!("it is cut, or not an ONNX file: a number has no end; {ANEW}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with a length.
    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2];
        let mut length = value.len();
        while length >= 128 {
            bytes.push((length & 127) as u8 | 128);
            length >>= 7;
        }
        bytes.push(length as u8);
        [&bytes, value].concat()
    }

    /// Field numbers from 16 take two bytes of key.
    fn far_field(number: u32, value: &[u8]) -> Vec<u8> {
        let key = number << 3 | 2;
        [&[(key & 127) as u8 | 128, (key >> 7) as u8, value.len() as u8], value].concat()
    }

    fn read(model: &[u8]) -> Result<Vec<String>, String> {
        let files = external_files(Path::new("model.onnx"), model);
        files.map(|files| files.into_iter().collect()).map_err(|error| error.to_string())
    }

    fn tensor(key: &[u8], value: &[u8]) -> Vec<u8> {
        field(13, &[field(1, key), field(2, value)].concat())
    }

    #[test]
    fn every_place_a_tensor_can_stand_is_seen() {
        let at = |name: &str| tensor(b"location", name.as_bytes());
        let attribute = |inner: Vec<u8>| field(1, &field(5, &inner));
        let places = [
            field(5, &at("initializer")),
            far_field(15, &field(1, &at("sparse values"))),
            far_field(15, &field(2, &at("sparse indices"))),
            attribute(field(5, &at("attribute"))),
            attribute(field(10, &at("attributes"))),
            attribute(far_field(22, &field(1, &at("sparse attribute")))),
            attribute(far_field(23, &field(2, &at("sparse attributes")))),
            attribute(field(6, &field(5, &at("subgraph")))),
            attribute(field(11, &field(5, &at("subgraphs")))),
        ];
        let mut expected: Vec<&str> = vec!["attribute", "attributes", "function", "initializer", "sparse attribute"];
        expected.extend(["sparse attributes", "sparse indices", "sparse values", "subgraph", "subgraphs", "training"]);
        let function = far_field(25, &field(7, &field(5, &field(5, &at("function")))));
        let training = far_field(20, &field(1, &field(5, &at("training"))));
        let model = [field(7, &places.concat()), function, training].concat();
        assert_eq!(read(&model).unwrap(), expected);
    }

    #[test]
    fn an_entry_with_its_value_first_or_twice_hides_nothing() {
        let entry = field(13, &[field(2, b"a"), field(1, b"location"), field(2, b"b")].concat());
        assert_eq!(read(&field(7, &field(5, &entry))).unwrap(), ["a", "b"]);
        assert!(read(&field(7, &field(5, &tensor(b"offset", b"0")))).unwrap().is_empty());
    }

    #[test]
    fn foreign_operators_and_compiled_code_are_refused() {
        let model = |node: &[u8]| field(7, &field(1, node));
        for own in ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"] {
            assert!(read(&model(&field(7, own.as_bytes()))).is_ok(), "{own}");
        }
        let error = read(&model(&field(7, b"my.ops"))).unwrap_err();
        assert!(error.starts_with("model.onnx: it needs operators of `my.ops`"), "{error}");
        assert!(read(&[field(8, &field(1, b"my.ops")), model(b"")].concat()).is_err(), "an import of them counts");
        assert!(read(&model(&field(4, b"EPContext"))).unwrap_err().contains("compiled code"));
    }

    #[test]
    fn damage_is_said_in_words() {
        let whole = field(7, &field(5, &tensor(b"location", b"weights")));
        let cut = read(&whole[..whole.len() - 1]).unwrap_err();
        assert!(cut.contains("it is cut: a field of 23 bytes has 22 left"), "{cut}");
        assert!(read(b"").unwrap_err().contains("there is no graph in it"));
        assert!(read(&[0xFF; 12]).unwrap_err().contains("a number has no end"));
        assert!(read(&[0x3B]).unwrap_err().contains("kind 3"));
        let deep = (0..40).fold(Vec::new(), |inner, _| field(1, &field(5, &field(6, &inner))));
        assert!(read(&field(7, &deep)).unwrap_err().contains("nested"), "a bomb of subgraphs");
    }
}
