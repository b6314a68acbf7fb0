//! Safetensors files, read strictly: every size is checked before memory is taken, every number is finite.
//!
//! The format: eight bytes of header length, a JSON header `name -> {dtype, shape, data_offsets}`, the data.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

/// The longest header that is read; real ones stay below a megabyte.
const MOST_HEADER_BYTES: u64 = 100 << 20;

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to bfloat16, half the size.
    Bf16,
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

/// Writes tensors to a file, in name order.
pub fn write(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>, precision: Precision) -> Result<()> {
    let path = path.as_ref();
    let dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let mut on_disk = BTreeMap::new();
    for (name, tensor) in tensors {
        on_disk.insert(name, tensor.detach().to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?);
    }
    safetensors::serialize_to_file(on_disk, None, path).map_err(|error| Error::file(path, error))
}

#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header's entries; a name that comes twice is an error, where a plain map would keep the last.
struct Header(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to their places")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
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
        Ok(Header(entries))
    }
}

struct Source<R> {
    name: PathBuf,
    size: u64,
    stream: R,
}

impl<R: Read> Source<R> {
    fn tensors(mut self) -> Result<BTreeMap<String, Tensor>> {
        let mut entries: Vec<(String, Entry)> = self.header()?.0.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            let values = self.values(&name, &entry)?;
            tensors.insert(name, Tensor::from_vec(values, entry.shape, &Device::Cpu)?);
        }
        Ok(tensors)
    }

    /// Reads the header and checks that the tensors fill the rest of the file, without gap or overlap.
    fn header(&mut self) -> Result<Header> {
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
        let header: Header = serde_json::from_slice(&json).map_err(|error| self.fault(format!("header: {error}")))?;
        if header.0.is_empty() {
            return Err(self.fault("holds no tensor; write it again"));
        }
        let mut places: Vec<(&String, &Entry)> = header.0.iter().collect();
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
        let bytes = self.bytes(entry.data_offsets.1 - entry.data_offsets.0)?;
        let values: Vec<f32> = match entry.dtype.as_str() {
            "F32" => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            "BF16" => {
                let widened = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                bytes.as_chunks::<2>().0.iter().map(widened).collect()
            }
            _ => bytes.as_chunks::<2>().0.iter().map(|bytes| half_to_f32(u16::from_le_bytes(*bytes))).collect(),
        };
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
        for (precision, tolerance) in [(Precision::F32, 0.0), (Precision::Bf16, 1e-5)] {
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
