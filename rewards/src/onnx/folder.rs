//! A reward's folder: every file verified before ONNX Runtime sees it.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use grpo::{Error, Result};

use super::manifest::{self, Manifest};
use super::{Interface, Session, SessionOptions, graph};
use crate::evaluation::{check_inside, sha256_once};

/// What a protobuf message can hold at most.
const MAX_GRAPH_BYTES: u64 = i32::MAX as u64;

/// A manifest and the files it lists, whose bytes are those whose sha256 it gives.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    manifest: Manifest,
    contents: Contents,
}

#[derive(Clone, Copy, Debug)]
enum Contents {
    Disk,
    /// Files that travel inside the program, by name.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Folder {
    /// Reads `reward.toml` and verifies every file it lists; four gigabytes take seconds, once per process.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = Manifest::read(&path.join(manifest::FILE))?;
        let folder = Self { path: path.into(), manifest, contents: Contents::Disk };
        for (file, expected) in &folder.manifest.files {
            let path = folder.path.join(file);
            let unreadable = |error| Error::file(&path, format!("{error}; {} lists it", manifest::FILE));
            let found = check_inside(&folder.path, &path).and_then(|()| sha256_once(&path)).map_err(unreadable)?;
            if found != *expected {
                let remedy = "copy the folder anew, or make it again by its export command";
                let message = format!("its sha256 is {found}; {} says {expected}; {remedy}", manifest::FILE);
                return Err(Error::file(&path, message));
            }
        }
        Ok(folder)
    }

    /// A folder that travels inside the program; `label` stands for its path.
    pub(crate) fn embedded(
        label: &str,
        manifest: &str,
        files: &'static [(&'static str, &'static [u8])],
    ) -> Result<Self> {
        let path = PathBuf::from(label);
        let manifest = Manifest::parse(&path.join(manifest::FILE), manifest)?;
        Ok(Self { path, manifest, contents: Contents::Embedded(files) })
    }

    /// What `reward.toml` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where a file of this folder lies, for messages.
    pub fn path_of(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    /// An error about `reward.toml`.
    pub fn fault(&self, message: impl std::fmt::Display) -> Error {
        Error::file(self.path.join(manifest::FILE), message)
    }

    /// The bytes of a listed file.
    pub fn read(&self, file: &str) -> Result<Cow<'static, [u8]>> {
        self.manifest.check_listed(file).map_err(|message| self.fault(message))?;
        let path = self.path.join(file);
        match self.contents {
            Contents::Disk => fs::read(&path).map(Cow::Owned).map_err(|error| Error::file(&path, error)),
            Contents::Embedded(files) => {
                let found = files.iter().find(|(name, _)| *name == file);
                found.map(|(_, bytes)| Cow::Borrowed(*bytes)).ok_or_else(|| Error::file(&path, "it is not embedded"))
            }
        }
    }

    /// A session of a listed model whose weights, if they lie in other files, are listed too.
    pub fn session(&self, file: &str, interface: &Interface<'_>, options: &SessionOptions) -> Result<Session> {
        self.manifest.check_listed(file).map_err(|message| self.fault(message))?;
        let path = self.path.join(file);
        if let Contents::Embedded(_) = self.contents {
            return Session::from_bytes(&path, &self.read(file)?, interface, options);
        }
        let length = fs::metadata(&path).map_err(|error| Error::file(&path, error))?.len();
        if length > MAX_GRAPH_BYTES {
            let message = format!("{length} bytes long; a graph holds {MAX_GRAPH_BYTES}: export with external data");
            return Err(Error::file(&path, message));
        }
        for location in graph::external_files(&path, &self.read(file)?)? {
            self.check_external(file, &location).map_err(|message| Error::file(&path, message))?;
        }
        Session::from_file(&path, interface, options)
    }

    /// A location is relative to the model, which may lie in a folder below this one.
    fn check_external(&self, model: &str, location: &str) -> Result<(), String> {
        manifest::check_name(location).map_err(|fault| format!("its weights lie in `{location}`, {fault}"))?;
        let beside = Path::new(model).with_file_name(location);
        let listed = beside.to_str().ok_or("a name is not UTF-8")?;
        self.manifest.check_listed(listed)
    }
}
