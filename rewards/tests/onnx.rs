//! ONNX Runtime and its models: what a user meets when a file or the library is not what it should be.
#![cfg(feature = "onnx")]

use std::num::NonZeroUsize;
use std::path::Path;

use grpo_rewards::onnx::runtime::{self, REMEDY};
use grpo_rewards::onnx::{Element, Input, Port, Session};

fn model(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip").join(file)
}

fn embedding(dim: usize) -> Port<'static> {
    let shape: &[Option<usize>] = if dim == 128 { &[None, Some(128)] } else { &[None, Some(7)] };
    Port { name: "text_embeds", element: Element::F32, shape }
}

fn ids() -> Port<'static> {
    Port { name: "input_ids", element: Element::I64, shape: &[None, Some(77)] }
}

fn load(path: &Path, ports: [Port<'_>; 2]) -> Result<Session, String> {
    Session::from_file(path, ports, NonZeroUsize::MIN).map_err(|error| error.to_string())
}

#[test]
fn a_named_library_that_is_not_there_is_an_error_with_the_one_command() {
    let error = runtime::open(Path::new("nowhere/libonnxruntime.so")).unwrap_err().to_string();
    assert!(error.starts_with("nowhere/libonnxruntime.so: the given path names no file"), "{error}");
    assert!(error.contains(REMEDY), "{error}");
}

#[test]
fn a_corrupt_model_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(model("text.onnx")).unwrap();
    for (name, bytes) in
        [("empty.onnx", &whole[..0]), ("cut.onnx", &whole[..whole.len() / 2]), ("noise.onnx", b"\xFFnot")]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = load(&path, [ids(), embedding(128)]).unwrap_err();
        assert!(error.contains(name) && error.contains("not a model that onnx runtime can read"), "{error}");
        assert!(error.ends_with("export it again, or copy it anew together with its data file"), "{error}");
    }
}

#[test]
fn a_missing_model_names_its_path() {
    let error = load(Path::new("nowhere/text.onnx"), [ids(), embedding(128)]).unwrap_err();
    assert!(error.starts_with("nowhere/text.onnx: there is no such file"), "{error}");
}

#[test]
fn ports_are_checked_when_the_model_is_loaded() {
    let check = |ports, expected: &str| {
        let error = load(&model("text.onnx"), ports).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    check([ids(), embedding(7)], "output `text_embeds` has shape [-1, 128]; expected [-1, 7]");
    check(
        [Port { name: "tokens", ..ids() }, embedding(128)],
        r#"the model's input is ["input_ids"]; expected `tokens`"#,
    );
    check([Port { element: Element::F32, ..ids() }, embedding(128)], "expected a tensor of F32");
    check([Port { shape: &[Some(1), Some(76)], ..ids() }, embedding(128)], "expected [1, 76]");
    check([Port { shape: &[None, None], ..ids() }, embedding(128)], "where -1 is the dynamic batch");
}

#[test]
fn a_batch_is_one_run() {
    let session = load(&model("text.onnx"), [ids(), embedding(128)]).unwrap();
    let mut tokens = vec![0i64; 3 * 77];
    for row in tokens.chunks_mut(77) {
        row[..3].copy_from_slice(&[49406, 736, 49407]);
    }
    let output = session.run(Input::I64(&tokens, &[3, 77])).unwrap();
    assert_eq!(output.shape, [3, 128]);
    assert_eq!(output.values[..128], output.values[128..256]);
    let error = session.run(Input::I64(&tokens, &[2, 77])).unwrap_err().to_string();
    assert!(error.contains("the model failed"), "{error}");
}
