//! Hugging Face folders: `config.json`, weights in one file or in shards, and the files that only others read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Decoder, DecoderConfig};
use crate::safetensors_file::{self, NamedOnce, Precision};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Weights beyond this many bytes are written in shards, as `transformers` 4 does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// The longest text file that is read; the tokenizer of Qwen2.5 has 7 MB.
const MOST_TEXT_BYTES: u64 = 256 << 20;

/// Files that change no number here and are carried from the folder that is read to the one that is written.
const COMPANIONS: [&str; 3] = [GENERATION, "special_tokens_map.json", TOKENIZER_CONFIG];
pub(crate) const GENERATION: &str = "generation_config.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

impl Decoder {
    /// Reads a Hugging Face folder of `Qwen2ForCausalLM`: `config.json`, and `model.safetensors` or the shards of
    /// `model.safetensors.index.json`, in f32, bf16 or f16.
    ///
    /// Computes in f32 on `device`. A decoder that is not `trainable` has no parameters. Takes the memory of the f32
    /// weights and of the largest tensor once more.
    pub fn load(folder: impl AsRef<Path>, device: &Device, trainable: bool) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let config = DecoderConfig::from_json(&read_text(&path)?).map_err(|error| Error::file(&path, error))?;
        let (path, tensors) = read_weights(folder)?;
        let tensors = on_device(tensors, device)?;
        Self::from_tensors(config, tensors, trainable).map_err(|error| Error::file(&path, error))
    }

    /// Writes what [`Decoder::load`] and `transformers` read, adapters merged in; weights beyond 5 GB in shards.
    pub fn save(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|error| Error::file(folder, error))?;
        write_text(&folder.join(CONFIG), &self.config().to_json(precision)?)?;
        write_weights(folder, &self.merged_tensors()?, precision, SHARD_BYTES)
    }
}

/// A text file of a sensible size.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let fault = |error: std::io::Error| Error::file(path, error);
    let mut text = String::new();
    let read = File::open(path).map_err(fault)?.take(MOST_TEXT_BYTES + 1).read_to_string(&mut text).map_err(fault)?;
    if read as u64 > MOST_TEXT_BYTES {
        return Err(Error::file(
            path,
            format!("is longer than {MOST_TEXT_BYTES} bytes; give the file of a checkpoint"),
        ));
    }
    Ok(text)
}

pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| Error::file(path, error))
}

/// As f32 where the decoder is to compute.
pub(crate) fn on_device(tensors: BTreeMap<String, Tensor>, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let moved = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?.to_device(device)?)));
    moved.collect()
}

/// Every tensor of a folder as f32 on the CPU, and the file that told of them.
fn read_weights(folder: &Path) -> Result<(PathBuf, BTreeMap<String, Tensor>)> {
    let (whole, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    // Where a folder has both, transformers takes the single file.
    if whole.exists() {
        return Ok((whole.clone(), safetensors_file::read(whole)?));
    }
    if !index.exists() {
        return Err(Error::file(
            folder,
            format!("has neither {WEIGHTS} nor {INDEX}; convert other weights with transformers' save_pretrained"),
        ));
    }
    let tensors = read_shards(folder, &index)?;
    Ok((index, tensors))
}

#[derive(Deserialize)]
struct Index {
    weight_map: NamedOnce<String>,
}

/// The tensors of every shard, each in the shard that the index names and in no other.
fn read_shards(folder: &Path, index: &Path) -> Result<BTreeMap<String, Tensor>> {
    let fault = |message: String| Error::file(index, message);
    let Index { weight_map: NamedOnce(places) } =
        serde_json::from_str(&read_text(index)?).map_err(|error| fault(error.to_string()))?;
    let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, shard) in &places {
        if shard.contains(['/', '\\']) || !shard.ends_with(".safetensors") {
            return Err(fault(format!(
                "tensor `{name}` lies in `{shard}`; give the name of a .safetensors file beside the index"
            )));
        }
        *shards.entry(shard).or_default() += 1;
    }
    if let Some(missing) = shards.keys().find(|shard| !folder.join(shard).exists()) {
        return Err(Error::file(folder.join(missing), format!("is named by {INDEX} and missing; fetch it too")));
    }
    let mut tensors = BTreeMap::new();
    for shard in shards.keys() {
        let path = folder.join(shard);
        for (name, tensor) in safetensors_file::read(&path)? {
            match places.get(&name) {
                Some(place) if place == shard => tensors.insert(name, tensor),
                Some(place) => {
                    let message = format!("holds tensor `{name}`, which {INDEX} has in {place}; fetch both again");
                    return Err(Error::file(&path, message));
                }
                None => {
                    let message = format!("holds tensor `{name}`, which {INDEX} does not name; fetch both again");
                    return Err(Error::file(&path, message));
                }
            };
        }
    }
    match places.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        None if tensors.is_empty() => Err(fault("names no tensor; write it again".into())),
        None => Ok(tensors),
        Some((name, shard)) => Err(fault(format!("has tensor `{name}` in {shard}, which lacks it; fetch both again"))),
    }
}

/// One file, or where that would be longer than `shard_bytes`, shards in name order and their index.
fn write_weights(
    folder: &Path,
    tensors: &BTreeMap<String, Tensor>,
    precision: Precision,
    shard_bytes: u64,
) -> Result<()> {
    let mut shards: Vec<(u64, BTreeMap<String, Tensor>)> = vec![(0, BTreeMap::new())];
    for (name, tensor) in tensors {
        let bytes = (tensor.elem_count() * precision.width()) as u64;
        match shards.last_mut() {
            Some((filled, shard)) if shard.is_empty() || *filled + bytes <= shard_bytes => {
                *filled += bytes;
                shard.insert(name.clone(), tensor.clone());
            }
            _ => shards.push((bytes, BTreeMap::from([(name.clone(), tensor.clone())]))),
        }
    }
    if let [(_, whole)] = shards.as_slice() {
        safetensors_file::write(folder.join(WEIGHTS), whole, precision)?;
        return remove(&folder.join(INDEX));
    }
    let n = shards.len();
    let mut places = serde_json::Map::new();
    for (at, (_, shard)) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{n:05}.safetensors", at + 1);
        safetensors_file::write(folder.join(&file), shard, precision)?;
        places.extend(shard.keys().map(|name| (name.clone(), json!(file))));
    }
    let total: u64 = shards.iter().map(|(bytes, _)| bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": places});
    write_text(&folder.join(INDEX), &format!("{index:#}\n"))?;
    remove(&folder.join(WEIGHTS))
}

/// Removes the other form of weights that an earlier save left, which readers would mix up with these.
fn remove(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_file(path).map_err(|error| Error::file(path, error)) } else { Ok(()) }
}

/// Those of [`COMPANIONS`] that a folder holds: each one's text and what it says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Companions(BTreeMap<&'static str, (String, Value)>);

impl Companions {
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let mut found = BTreeMap::new();
        for name in COMPANIONS {
            let path = folder.join(name);
            if path.exists() {
                let text = read_text(&path)?;
                let json = serde_json::from_str(&text)
                    .map_err(|error| Error::file(path, format!("{error}; mend it or remove it")))?;
                found.insert(name, (text, json));
            }
        }
        Ok(Self(found))
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        self.0.iter().try_for_each(|(name, (text, _))| write_text(&folder.join(name), text))
    }

    /// What one of them says, where the folder holds it.
    pub(crate) fn json(&self, name: &str) -> Option<&Value> {
        self.0.get(name).map(|(_, json)| json)
    }

    pub(crate) fn replace(&mut self, name: &'static str, json: Value) {
        self.0.insert(name, (format!("{json:#}\n"), json));
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use grpo::Seed;

    use super::*;

    fn files(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn shards_are_filled_in_order_and_read_back() {
        let config = DecoderConfig { vocab_size: 50, hidden_size: 8, num_hidden_layers: 2, ..DecoderConfig::default() };
        let tensors = Decoder::init(config, Seed::new(1)).unwrap().tensors();
        let bytes = |names: &mut dyn Iterator<Item = &String>| names.map(|name| 2 * tensors[name].elem_count()).sum();
        let total: usize = bytes(&mut tensors.keys());
        let folder = tempfile::tempdir().unwrap();
        for limit in [total, 20_000, 1] {
            write_weights(folder.path(), &tensors, Precision::Bf16, limit as u64).unwrap();
            let (said, back) = read_weights(folder.path()).unwrap();
            assert_eq!(said.ends_with(WEIGHTS), limit == total, "the older form is removed");
            assert!(back.keys().eq(tensors.keys()));
            if limit == total {
                continue;
            }
            let index: Value = serde_json::from_str(&read_text(&said).unwrap()).unwrap();
            assert_eq!(index["metadata"]["total_size"], total);
            let places: BTreeMap<String, String> = serde_json::from_value(index["weight_map"].clone()).unwrap();
            let n: usize = places.values().max().unwrap()[15..20].parse().unwrap();
            assert!(n >= total.div_ceil(limit).min(tensors.len()), "{n} shards");
            for shard in 1..=n {
                let file = format!("model-{shard:05}-of-{n:05}.safetensors");
                assert!(files(folder.path()).contains(&file));
                let held: usize = bytes(&mut places.iter().filter(|(_, at)| **at == file).map(|(name, _)| name));
                assert!(held > 0 && (held <= limit || limit == 1), "{file} holds {held} bytes");
            }
        }
        write_weights(folder.path(), &tensors, Precision::F32, 2 * total as u64).unwrap();
        assert!(
            files(folder.path()).contains(&WEIGHTS.to_owned()) && !files(folder.path()).contains(&INDEX.to_owned())
        );
    }

    #[test]
    fn a_text_without_end_is_refused() {
        let error = read_text(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("is longer than 268435456 bytes"), "{error}");
    }
}
