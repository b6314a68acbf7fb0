//! Safetensors files, read strictly: every size is checked before memory is taken, every number is finite.
//!
//! The format: eight bytes of header length, a JSON header `name -> {dtype, shape, data_offsets}`, the data.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::json;

/// The longest header that is read; real ones stay below a megabyte.
const MOST_HEADER_BYTES: u64 = 100 << 20;

/// Numbers pass between disk and memory in pieces of this many, so that no tensor is held twice.
const PIECE: usize = 1 << 18;

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to the nearest bfloat16, ties to even; half the size.
    Bf16,
    /// Rounded to the nearest IEEE half, ties to even; half the size, and nothing beyond 65,504.
    F16,
}

/// Reads every tensor of a file as f32 on the CPU.
///
/// A file that is cut short, overlong, holds a name twice, another type than f32, f16 or bf16, or a number that
/// is not finite, is an error that names the file and the tensor.
pub fn read(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|error| Error::file(path, format!("{error}; give a safetensors file")))?;
    let metadata = file.metadata().map_err(|error| Error::file(path, error))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "not a file; give a safetensors file"));
    }
    Source { name: path.to_owned(), size: metadata.len(), stream: BufReader::new(file) }.tensors()
}

/// Reads the bytes of a file that is already in memory; `name` stands for its path in errors.
pub fn read_bytes(name: impl Into<PathBuf>, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    Source { name: name.into(), size: bytes.len() as u64, stream: bytes }.tensors()
}

/// Writes tensors to a file, in name order, one piece of one tensor at a time.
///
/// A number that is not finite, or no longer is after rounding, is an error that names the tensor.
pub fn write(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>, precision: Precision) -> Result<()> {
    let path = path.as_ref();
    let fault = |error: std::io::Error| Error::file(path, error);
    // Readers of Hugging Face refuse a file that does not say whose tensors it holds.
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    for (name, tensor) in tensors {
        let first = end;
        end += (tensor.elem_count() * precision.width()) as u64;
        let entry = json!({"dtype": precision.name(), "shape": tensor.dims(), "data_offsets": [first, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut out = BufWriter::new(File::create(path).map_err(fault)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(fault)?;
    out.write_all(header.as_bytes()).map_err(fault)?;
    for (name, tensor) in tensors {
        for piece in pieces(tensor)? {
            let bytes = precision.bytes(&piece?).map_err(|value| {
                Error::file(path, format!("tensor `{name}` holds {value}, which {} cannot say", precision.name()))
            })?;
            out.write_all(&bytes).map_err(fault)?;
        }
    }
    out.flush().map_err(fault)
}

/// The numbers of a tensor as f32, a piece at a time, in row-major order.
pub(crate) fn pieces(tensor: &Tensor) -> Result<impl Iterator<Item = Result<Vec<f32>>>> {
    let flat = tensor.detach().flatten_all()?;
    let n = flat.elem_count();
    Ok((0..n).step_by(PIECE).map(move |first| {
        let piece = flat.narrow(0, first, PIECE.min(n - first))?;
        Ok(piece.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()?)
    }))
}

impl Precision {
    /// The name in a safetensors header.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// Bytes of one number.
    pub(crate) fn width(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The bytes of numbers, or the first that is not finite once rounded.
    pub(crate) fn bytes(self, values: &[f32]) -> std::result::Result<Vec<u8>, f32> {
        let finite = |value: f32| match self {
            Self::F32 => value.is_finite(),
            // The largest bfloat16 has bits 0x7F7F; half of the next step above it rounds to infinity.
            Self::Bf16 => value.abs().to_bits() < 0x7F7F_8000,
            Self::F16 => value.abs() < 65_520.0,
        };
        if let Some(value) = values.iter().find(|value| !finite(**value)) {
            return Err(*value);
        }
        Ok(match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16_of(*value).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| half_of(*value).to_le_bytes()).collect(),
        })
    }
}

#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// A JSON map whose names each come once; a name that comes twice is an error, where a plain map would keep the last.
pub(crate) struct NamedOnce<V>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for NamedOnce<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(NamedOnceVisitor(PhantomData))
    }
}

struct NamedOnceVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for NamedOnceVisitor<V> {
    type Value = NamedOnce<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to their places")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<NamedOnce<V>, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<serde::de::IgnoredAny>()?;
                continue;
            }
            let entry = map.next_value()?;
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{name}` comes twice")));
            }
            entries.insert(name, entry);
        }
        Ok(NamedOnce(entries))
    }
}

struct Source<R> {
    name: PathBuf,
    size: u64,
    stream: R,
}

impl<R: Read> Source<R> {
    fn tensors(mut self) -> Result<BTreeMap<String, Tensor>> {
        let mut entries: Vec<(String, Entry)> = self.header()?.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            let values = self.values(&name, &entry)?;
            tensors.insert(name, Tensor::from_vec(values, entry.shape, &Device::Cpu)?);
        }
        Ok(tensors)
    }

    /// Reads the header and checks that the tensors fill the rest of the file, without gap or overlap.
    fn header(&mut self) -> Result<BTreeMap<String, Entry>> {
        let length = match self.size {
            0..8 => return Err(self.fault("shorter than a safetensors header; the file is cut short or another kind")),
            _ => u64::from_le_bytes(self.array()?),
        };
        if length > MOST_HEADER_BYTES || length > self.size - 8 {
            return Err(self.fault(format!(
                "claims a header of {length} bytes in a file of {}; it is cut short or no safetensors file",
                self.size
            )));
        }
        let json = self.bytes(length)?;
        let NamedOnce(header) =
            serde_json::from_slice(&json).map_err(|error| self.fault(format!("header: {error}")))?;
        if header.is_empty() {
            return Err(self.fault("holds no tensor; write it again"));
        }
        let mut places: Vec<(&String, &Entry)> = header.iter().collect();
        places.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut end = 0;
        for (name, entry) in places {
            let bytes = entry.n_bytes().map_err(|message| self.fault(format!("tensor `{name}`: {message}")))?;
            let (first, last) = entry.data_offsets;
            if first != end || last.checked_sub(first) != Some(bytes) {
                return Err(self.fault(format!(
                    "tensor `{name}` of {bytes} bytes lies at {first}..{last}, expected at {end}; write the file again"
                )));
            }
            end = last;
        }
        let expected = (8 + length).checked_add(end);
        if expected != Some(self.size) {
            return Err(self.fault(format!(
                "has {} bytes where its header tells of {}; copy it again",
                self.size,
                8u128 + u128::from(length) + u128::from(end)
            )));
        }
        Ok(header)
    }

    fn values(&mut self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        let mut left = (entry.data_offsets.1 - entry.data_offsets.0) as usize;
        let n = left / if entry.dtype == "F32" { 4 } else { 2 };
        let mut values: Vec<f32> = Vec::new();
        values.try_reserve_exact(n).map_err(|error| self.fault(format!("tensor `{name}` of {n} numbers: {error}")))?;
        let mut buffer = vec![0; left.min(4 * PIECE)];
        while left > 0 {
            let piece = &mut buffer[..left.min(4 * PIECE)];
            let read = self.stream.read_exact(piece);
            read.map_err(|error| Error::file(&self.name, format!("tensor `{name}`: {error}; copy the file again")))?;
            match entry.dtype.as_str() {
                "F32" => values.extend(piece.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
                "BF16" => {
                    let widened = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                    values.extend(piece.as_chunks::<2>().0.iter().map(widened));
                }
                _ => {
                    values.extend(piece.as_chunks::<2>().0.iter().map(|bytes| half_to_f32(u16::from_le_bytes(*bytes))))
                }
            }
            left -= piece.len();
        }
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(self.fault(format!(
                "tensor `{name}` is {} at element {index}; weights must be finite, take an earlier checkpoint",
                values[index]
            ))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).map_err(|error| Error::file(&self.name, error))?;
        Ok(bytes)
    }

    /// The next bytes; the caller has checked that the file is long enough.
    fn bytes(&mut self, n: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.stream.by_ref().take(n).read_to_end(&mut bytes);
        match read.map_err(|error| Error::file(&self.name, error))? {
            got if got as u64 == n => Ok(bytes),
            got => Err(self.fault(format!("ends after {got} of {n} bytes; copy it again"))),
        }
    }

    fn fault(&self, message: impl fmt::Display) -> Error {
        Error::file(&self.name, message)
    }
}

impl Entry {
    fn n_bytes(&self) -> std::result::Result<u64, String> {
        let width = match self.dtype.as_str() {
            "F32" => 4,
            "F16" | "BF16" => 2,
            other => return Err(format!("has type {other}; convert it to F32, F16 or BF16")),
        };
        let product = self.shape.iter().try_fold(width, |bytes: u64, size| bytes.checked_mul(*size as u64));
        product.ok_or_else(|| format!("has shape {:?}, more than any memory holds", self.shape))
    }
}

/// IEEE half precision, subnormals included.
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let mantissa = f32::from(bits & 0x3FF);
    let magnitude = match (bits >> 10) & 0x1F {
        0 => mantissa * 2f32.powi(-24),
        31 if bits & 0x3FF == 0 => f32::INFINITY,
        31 => f32::NAN,
        exponent => (1024.0 + mantissa) * 2f32.powi(i32::from(exponent) - 25),
    };
    sign * magnitude
}

/// The nearest half of a finite number below 65,520, ties to even.
fn half_of(value: f32) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = value.abs();
    if magnitude < 2f32.powi(-14) {
        return sign | (magnitude * 2f32.powi(24)).round_ties_even() as u16;
    }
    let bits = magnitude.to_bits();
    // The exponent's bias falls from 127 to 15.
    sign | (((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10)) as u16
}

/// The nearest bfloat16 of a finite number, ties to even.
fn bf16_of(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn error_of(bytes: &[u8]) -> String {
        read_bytes("weights.safetensors", bytes).unwrap_err().to_string()
    }

    const ONE: &str = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let tensor = Tensor::from_vec(vec![1.5f32, -0.25, 3.0, 1e-3], (2, 2), &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([("b".to_owned(), tensor.t().unwrap()), ("a".to_owned(), tensor)]);
        for (precision, tolerance) in [(Precision::F32, 0.0), (Precision::Bf16, 1e-5), (Precision::F16, 1e-6)] {
            write(&path, &tensors, precision).unwrap();
            let back = read(&path).unwrap();
            assert_eq!(back.keys().collect::<Vec<_>>(), ["a", "b"]);
            for (name, tensor) in &tensors {
                let (got, want): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
                    (back[name].to_vec2().unwrap(), tensor.to_vec2().unwrap());
                assert!(got.concat().iter().zip(want.concat()).all(|(x, y)| (x - y).abs() <= tolerance));
            }
        }
    }

    #[test]
    fn halves_are_widened() {
        for (bits, value) in [(0x3C00, 1.0), (0xC000, -2.0), (0x3555, 0.333_251_95), (0x0001, 5.960_464_5e-8)] {
            assert_eq!(half_to_f32(bits), value);
        }
        let header = r#"{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}"#;
        let tensors = read_bytes("w", &file(header, &0x3C00u16.to_le_bytes())).unwrap();
        assert_eq!(tensors["a"].to_vec1::<f32>().unwrap(), [1.0]);
    }

    /// Every half and every bfloat16 is itself; between neighbours the nearer one is taken, half-way the even one.
    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        type Kind = (fn(f32) -> u16, fn(u16) -> f32, u16);
        let bf16: Kind = (bf16_of, |bits| f32::from_bits(u32::from(bits) << 16), 0x7F7F);
        let half: Kind = (half_of, half_to_f32, 0x7BFF);
        for (round, widen, largest) in [bf16, half] {
            for bits in 0..largest {
                let (low, high) = (widen(bits), widen(bits + 1));
                assert_eq!((round(low), round(-low)), (bits, bits | 0x8000));
                let middle = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
                assert_eq!(round(middle), bits + (bits & 1), "half-way above {low}");
                assert_eq!((round(middle.next_down()), round(middle.next_up())), (bits, bits + 1), "near {middle}");
            }
        }
    }

    #[test]
    fn numbers_beyond_a_precision_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        for (precision, value, said) in [
            (Precision::F32, f32::NAN, Some("tensor `a` holds NaN, which F32 cannot say")),
            (Precision::F16, 65_519.0, None),
            (Precision::F16, -65_520.0, Some("tensor `a` holds -65520, which F16 cannot say")),
            (Precision::Bf16, 3.389e38, None),
            (Precision::Bf16, 3.397e38, Some("which BF16 cannot say")),
        ] {
            let tensors = BTreeMap::from([("a".to_owned(), Tensor::new(&[value], &Device::Cpu).unwrap())]);
            let written = write(&path, &tensors, precision).map_err(|error| error.to_string());
            match said {
                None => drop(read(&path).unwrap()),
                Some(said) => assert!(written.unwrap_err().contains(said)),
            }
        }
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it_and_the_tensor() {
        let good = file(ONE, &1f32.to_le_bytes());
        read_bytes("w", &good).unwrap();
        for (bytes, message) in [
            (vec![], "weights.safetensors: shorter than a safetensors header"),
            (good[..5].to_vec(), "shorter"),
            (good[..20].to_vec(), "cut short"),
            (good[..good.len() - 1].to_vec(), "copy it again"),
            ([good.clone(), vec![0]].concat(), "copy it again"),
            (u64::MAX.to_le_bytes().to_vec(), "claims a header of 18446744073709551615 bytes"),
            (file("{}", &[]), "holds no tensor"),
            (file("[", &[]), "header: "),
            (file(ONE, &f32::NAN.to_le_bytes()), "tensor `a` is NaN at element 0"),
            (file(&ONE.replace("F32", "I64"), &[0; 4]), "tensor `a`: has type I64"),
            (file(&ONE.replace("[1]", "[2]"), &[0; 4]), "tensor `a` of 8 bytes lies at 0..4"),
            (file(&ONE.replace("[1]", "[4294967296, 4294967296, 4294967296]"), &[0; 4]), "more than any memory"),
            (file(&ONE.replace("[0, 4]", "[4, 0]"), &[0; 4]), "lies at 4..0"),
        ] {
            let error = error_of(&bytes);
            assert!(error.contains(message), "{error}");
        }
        let entry = r#""a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}"#;
        let twice = error_of(&file(&format!("{{{entry}, {entry}}}"), &[0; 4]));
        assert!(twice.contains("tensor `a` comes twice"), "{twice}");
        assert!(read("no/such/file").unwrap_err().to_string().contains("no/such/file"));
    }
}
