//! Checkpoints: folders of safetensors whose manifest is the commit mark.
//!
//! A checkpoint is written under a temporary name, synced and renamed; its manifest lists every file with size and
//! SHA-256, so a folder that a crash or a full disk left half-written is never mistaken for a checkpoint.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{AdamW, Error, Params, Result, write_whole};

const MANIFEST: &str = "manifest.json";
const PARAMS: &str = "params.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const REFERENCE: &str = "reference.safetensors";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    step: usize,
    state: Value,
    files: BTreeMap<String, FileMark>,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct FileMark {
    bytes: u64,
    sha256: String,
}

/// Writes and finds the checkpoints of one run: `checkpoints/step-N/`.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints below `folder`; the last `keep` are kept, at least one.
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Self {
        Self { folder: folder.into(), keep: keep.max(1) }
    }

    /// Writes the parameters and the optimiser as they are after `step` steps, then removes the oldest checkpoints.
    ///
    /// `reference` holds the reference's parameters where training moves it, and none where it stays what it was.
    pub fn save(&self, step: usize, optimizer: &AdamW, reference: &Params, state: &Value) -> Result<PathBuf> {
        let target = self.folder.join(format!("step-{step}"));
        let partial = self.folder.join(format!(".step-{step}.partial"));
        let at = |error: std::io::Error| Error::checkpoint(&partial, error.to_string());
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(at)?;
        }
        fs::create_dir_all(&partial).map_err(at)?;
        let mut files = BTreeMap::new();
        let contents = [
            (PARAMS, tensors_of(optimizer.params())),
            (OPTIMIZER, optimizer.state()?),
            (REFERENCE, tensors_of(reference)),
        ];
        for (name, tensors) in contents.into_iter().filter(|(_, tensors)| !tensors.is_empty()) {
            let path = partial.join(name);
            write_tensors(&path, tensors)?;
            files.insert(name.to_string(), mark(&path)?);
        }
        let manifest = Manifest { step, state: state.clone(), files };
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|error| Error::checkpoint(&partial, error.to_string()))?;
        write_whole(&partial.join(MANIFEST), &text)?;
        if target.exists() {
            fs::remove_dir_all(&target).map_err(at)?;
        }
        fs::rename(&partial, &target).map_err(at)?;
        // A rename is durable once its folder is.
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(at)?;
        self.prune()?;
        Ok(target)
    }

    /// The newest complete checkpoint, if there is one. Folders without a manifest are passed over.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        Ok(self.steps()?.pop().map(|step| self.folder.join(format!("step-{step}"))))
    }

    fn steps(&self) -> Result<Vec<usize>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.folder).map_err(|error| Error::checkpoint(&self.folder, error.to_string()))?;
        let mut steps: Vec<usize> = entries
            .filter_map(|entry| entry.ok())
            .filter(|entry| entry.path().join(MANIFEST).is_file())
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn prune(&self) -> Result<()> {
        let steps = self.steps()?;
        for step in steps.iter().take(steps.len().saturating_sub(self.keep)) {
            let old = self.folder.join(format!("step-{step}"));
            fs::remove_dir_all(&old).map_err(|error| Error::checkpoint(&old, error.to_string()))?;
        }
        Ok(())
    }
}

/// A checkpoint read back and proven whole.
pub struct Checkpoint {
    /// Steps done when it was written.
    pub step: usize,
    /// What the trainer stored beside the tensors.
    pub state: Value,
    params: BTreeMap<String, Tensor>,
    optimizer: BTreeMap<String, Tensor>,
    reference: BTreeMap<String, Tensor>,
    path: PathBuf,
}

impl Checkpoint {
    /// Reads a checkpoint folder; a missing manifest, file or byte is an error that names it.
    pub fn load(path: &Path) -> Result<Self> {
        let manifest_path = path.join(MANIFEST);
        let text = fs::read(&manifest_path).map_err(|error| {
            let remedy = "a checkpoint is complete only with its manifest: choose another step";
            Error::checkpoint(path, format!("{MANIFEST} cannot be read ({error}); {remedy}"))
        })?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Error::checkpoint(&manifest_path, format!("{error}; choose another step")))?;
        for (name, expected) in &manifest.files {
            check_file(&path.join(name), expected)?;
        }
        let read = |name: &str| -> Result<BTreeMap<String, Tensor>> {
            if !manifest.files.contains_key(name) {
                return Err(Error::checkpoint(path, format!("the manifest lists no {name}; choose another step")));
            }
            let tensors = candle_core::safetensors::load(path.join(name), &Device::Cpu)
                .map_err(|error| Error::checkpoint(path.join(name), format!("{error}; choose another step")))?;
            Ok(tensors.into_iter().collect())
        };
        let (params, optimizer) = (read(PARAMS)?, read(OPTIMIZER)?);
        let reference = if manifest.files.contains_key(REFERENCE) { read(REFERENCE)? } else { BTreeMap::new() };
        Ok(Self { step: manifest.step, state: manifest.state, params, optimizer, reference, path: path.into() })
    }

    /// The state as what the trainer stored.
    pub(crate) fn state<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.state.clone()).map_err(|error| {
            let remedy = "go on with the version of grpo that wrote it, or start a new run";
            Error::checkpoint(&self.path, format!("its state is not of this version ({error}); {remedy}"))
        })
    }

    /// The parameters alone.
    pub fn params(&self) -> &BTreeMap<String, Tensor> {
        &self.params
    }

    /// Puts the parameters into a policy's variables; every one must be there in its shape.
    pub fn restore_params(&self, params: &Params) -> Result<()> {
        self.put(&self.params, params)
    }

    /// Puts the parameters of a reference that training moves into its variables.
    pub fn restore_reference(&self, params: &Params) -> Result<()> {
        self.put(&self.reference, params)
    }

    fn put(&self, saved: &BTreeMap<String, Tensor>, params: &Params) -> Result<()> {
        for (name, var) in params.iter() {
            let saved = saved.get(name).ok_or_else(|| {
                Error::checkpoint(&self.path, format!("it has no parameter `{name}`; it is of another policy"))
            })?;
            if saved.dims() != var.dims() {
                let message =
                    format!("parameter `{name}` has shape {:?}; the policy needs {:?}", saved.dims(), var.dims());
                return Err(Error::checkpoint(&self.path, message));
            }
            var.set(&saved.to_device(var.device())?.to_dtype(var.dtype())?)?;
        }
        match saved.keys().find(|name| params.get(name).is_none()) {
            None => Ok(()),
            Some(extra) => Err(Error::checkpoint(
                &self.path,
                format!("it holds parameter `{extra}`, which the policy has not; it is of another policy"),
            )),
        }
    }

    /// Puts parameters and moments back.
    pub fn restore(&self, optimizer: &mut AdamW) -> Result<()> {
        self.restore_params(optimizer.params())?;
        optimizer.restore(&self.optimizer).map_err(|error| Error::checkpoint(&self.path, error.to_string()))
    }
}

fn tensors_of(params: &Params) -> BTreeMap<String, Tensor> {
    params.iter().map(|(name, var)| (name.to_string(), var.as_tensor().detach())).collect()
}

fn write_tensors(path: &Path, tensors: BTreeMap<String, Tensor>) -> Result<()> {
    let on_host: std::collections::BTreeMap<String, Tensor> = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?)))
        .collect::<Result<_>>()?;
    safetensors::serialize_to_file(on_host.iter(), None, path)
        .map_err(|error| Error::checkpoint(path, error.to_string()))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::checkpoint(path, error.to_string()))
}

fn mark(path: &Path) -> Result<FileMark> {
    let at = |error: std::io::Error| Error::checkpoint(path, error.to_string());
    let mut file = File::open(path).map_err(at)?;
    let bytes = file.metadata().map_err(at)?.len();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer).map_err(at)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    let sha256 = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(FileMark { bytes, sha256 })
}

fn check_file(path: &Path, expected: &FileMark) -> Result<()> {
    let got = mark(path)?;
    if got.bytes != expected.bytes {
        let message = format!(
            "it has {} bytes; its manifest says {}: it is truncated, choose another step",
            got.bytes, expected.bytes
        );
        return Err(Error::checkpoint(path, message));
    }
    if got != *expected {
        return Err(Error::checkpoint(path, "its checksum is not the manifest's: it is damaged, choose another step"));
    }
    Ok(())
}
