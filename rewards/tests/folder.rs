//! A reward's folder: what is verified before ONNX Runtime sees a file, and what damage looks like to a user.
#![cfg(feature = "onnx")]
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

use std::fs;
use std::path::{Path, PathBuf};

use grpo_rewards::onnx::{Dim, Element, Folder, Interface, Port, Precision, Session, SessionOptions};
use sha2::{Digest, Sha256};

/// `x [n, 3]` plus weights in another file gives `y [n, 3]`; made by `golden/onnx_networks.py`.
const GRAPH: &str = "external.onnx";
const WEIGHTS: &str = "external.data";

fn network(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/onnx").join(file)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A manifest that lists these files, as long as `[scorer.clip]` may say anything about them.
fn manifest(files: &[(&str, &str)]) -> String {
    let clip = "image = \"external.onnx\"\ntext = \"external.onnx\"\nimage_size = 8\npreprocess = \"pil-bicubic\"\n\
        embed_dim = 3\nlogit_scale = 100.0\nprecision = \"fp32\"";
    let listed: String = files.iter().map(|(file, sha256)| format!("\"{file}\" = \"{sha256}\"\n")).collect();
    format!("format = 1\nname = \"tiny\"\n[scorer.clip]\n{clip}\n[files]\n{listed}[provenance]\nnote = \"a test\"\n")
}

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    /// The graph and its weights, listed as they are.
    fn new() -> Self {
        let case = Self { folder: tempfile::tempdir().unwrap() };
        for file in [GRAPH, WEIGHTS] {
            case.put(file, &fs::read(network(file)).unwrap());
        }
        case.list(&[GRAPH, WEIGHTS]);
        case
    }

    fn put(&self, file: &str, bytes: &[u8]) {
        let path = self.folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn list(&self, files: &[&str]) {
        let hashed: Vec<(&str, String)> =
            files.iter().map(|file| (*file, sha256(&fs::read(self.folder.path().join(file)).unwrap()))).collect();
        let hashed: Vec<(&str, &str)> = hashed.iter().map(|(file, sha256)| (*file, sha256.as_str())).collect();
        self.put("reward.toml", manifest(&hashed).as_bytes());
    }

    fn open(&self) -> Result<Session, String> {
        let rows: &[Dim] = &[Dim::Free, Dim::Is(3)];
        let port = |name| Port { name, element: Element::F32, shape: Some(rows) };
        let interface = Interface { inputs: &[port("x")], outputs: &[port("y")], precision: Precision::Fp32 };
        let folder = Folder::open(self.folder.path()).map_err(|error| error.to_string())?;
        folder.session(GRAPH, &interface, &SessionOptions::default()).map_err(|error| error.to_string())
    }

    /// The error, which must begin with the file's own path.
    fn fault(&self, file: &str) -> String {
        let error = self.open().unwrap_err();
        let path = format!("{}: ", self.folder.path().join(file).display());
        assert!(error.starts_with(&path), "{error} does not begin with {path}");
        error[path.len()..].to_string()
    }
}

#[test]
fn weights_in_a_listed_file_are_found() {
    let session = Case::new().open().unwrap();
    let output = session.run_one(grpo_rewards::onnx::Input::F32(&[1.0, 2.0, 3.0], &[1, 3])).unwrap();
    assert_eq!(output.values, [1.5, 0.0, 3.25]);
}

#[test]
fn a_changed_or_missing_file_is_found_before_it_is_used() {
    let case = Case::new();
    let mut weights = fs::read(network(WEIGHTS)).unwrap();
    weights[0] ^= 1;
    case.put(WEIGHTS, &weights);
    let error = case.fault(WEIGHTS);
    assert!(error.starts_with(&format!("its sha256 is {}; reward.toml says", sha256(&weights))), "{error}");
    fs::remove_file(case.folder.path().join(WEIGHTS)).unwrap();
    assert!(case.fault(WEIGHTS).ends_with("reward.toml lists it"));
}

#[test]
fn what_is_read_must_be_listed() {
    let case = Case::new();
    case.list(&[GRAPH]);
    let error = case.fault(GRAPH);
    assert_eq!(error, r#"`external.data` is read, but [files] lists ["external.onnx"]; list it with its sha256"#);
    case.list(&[WEIGHTS]);
    assert!(case.fault("reward.toml").starts_with("`external.onnx` is read, but"));
}

/// The graph with the name of its weights replaced by another of equal length.
fn relocated(location: &str) -> Vec<u8> {
    assert_eq!(location.len(), WEIGHTS.len());
    let mut graph = fs::read(network(GRAPH)).unwrap();
    let at = graph.windows(WEIGHTS.len()).position(|window| window == WEIGHTS.as_bytes()).unwrap();
    graph[at..at + location.len()].copy_from_slice(location.as_bytes());
    graph
}

#[test]
fn nothing_outside_the_folder_is_opened() {
    for location in ["/external.da", "../ernal.data", "e/../al.data", "..\\ernal.dat"] {
        let case = Case::new();
        let location = format!("{location:a<13}");
        case.put(GRAPH, &relocated(&location));
        case.list(&[GRAPH, WEIGHTS]);
        let error = case.fault(GRAPH);
        assert!(error.starts_with(&format!("its weights lie in `{location}`, which does not stay inside")), "{error}");
    }
    for name in ["/etc/passwd", "../other.onnx", "a/../../b", "", ".", "c:evil"] {
        let case = Case::new();
        case.put("reward.toml", manifest(&[(name, &"0".repeat(64))]).as_bytes());
        let error = case.fault("reward.toml");
        assert!(error.contains("does not stay inside the folder"), "{name}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_may_not_leave_the_folder() {
    let (case, elsewhere) = (Case::new(), tempfile::tempdir().unwrap());
    let (inside, outside) = (case.folder.path().join(WEIGHTS), elsewhere.path().join(WEIGHTS));
    fs::rename(&inside, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &inside).unwrap();
    assert!(case.fault(WEIGHTS).contains("a link that leaves its folder"));
    fs::remove_file(&inside).unwrap();
    fs::rename(&outside, case.folder.path().join("real.data")).unwrap();
    std::os::unix::fs::symlink("real.data", &inside).unwrap();
    assert!(case.open().is_ok(), "a link inside the folder is a file like any other");
}

#[test]
fn a_manifest_is_read_strictly() {
    let case = Case::new();
    let whole = fs::read_to_string(case.folder.path().join("reward.toml")).unwrap();
    for (from, to, expected) in [
        ("format = 1", "format = 2\nnew = true", "format is 2; this program reads format 1"),
        ("format = 1\n", "", "missing field `format`"),
        ("name = \"tiny\"", "name = \" \"", "name is empty"),
        ("name = \"tiny\"", "name = \"tiny\"\nnmae = 1", "unknown field `nmae`"),
        ("precision = \"fp32\"", "precision = \"fp8\"", "unknown variant `fp8`"),
        ("image_size = 8", "image_size = 1000000", "image_size is 1000000; give 1 to 4096"),
        ("external.onnx\" = \"", "external.onnx\" = \"z", "64 lower-case hex digits are meant"),
    ] {
        assert!(whole.contains(from), "{from}");
        case.put("reward.toml", whole.replacen(from, to, 1).as_bytes());
        let error = case.fault("reward.toml");
        assert!(error.contains(expected), "{from}: {error}");
    }
    case.put("reward.toml", &vec![b'#'; (1 << 20) + 1]);
    assert!(case.fault("reward.toml").contains("at most 1048576 are read"));
}
