//! ONNX Runtime and its models: what a user meets when a file or the library is not what it should be.
#![cfg(feature = "onnx")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use grpo_rewards::onnx::runtime::{self, REMEDY};
use grpo_rewards::onnx::{Cuda, Dim, Element, Input, Interface, OpenVino, OpenVinoPrecision, Port, Precision};
use grpo_rewards::onnx::{Provider, Session, SessionOptions};
use serde::Deserialize;

fn model(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip").join(file)
}

fn embedding(dim: usize) -> Port<'static> {
    let shape: &[Dim] = if dim == 128 { &[Dim::Free, Dim::Is(128)] } else { &[Dim::Free, Dim::Is(7)] };
    Port { name: "text_embeds", element: Element::F32, shape: Some(shape) }
}

fn ids() -> Port<'static> {
    Port { name: "input_ids", element: Element::I64, shape: Some(&[Dim::Free, Dim::Is(77)]) }
}

fn load(path: &Path, [input, output]: [Port<'_>; 2]) -> Result<Session, String> {
    let interface = Interface { inputs: &[input], outputs: &[output], precision: Precision::Fp32 };
    let options = SessionOptions::with_threads(NonZeroUsize::MIN);
    Session::from_file(path, &interface, &options).map_err(|error| error.to_string())
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
    check([ids(), embedding(7)], "output `text_embeds` has shape [free, 128]; expected [free, 7]");
    check(
        [Port { name: "tokens", ..ids() }, embedding(128)],
        r#"the model's inputs are ["input_ids"]; expected `tokens`"#,
    );
    check([Port { element: Element::F32, ..ids() }, embedding(128)], "expected a tensor of F32");
    check([Port { shape: Some(&[Dim::Is(1), Dim::Is(76)]), ..ids() }, embedding(128)], "expected [1, 76]");
    check(
        [Port { shape: Some(&[Dim::Free; 2]), ..ids() }, embedding(128)],
        "has shape [free, 77]; expected [free, free]",
    );
    let model = model("text.onnx");
    let interface = Interface { inputs: &[], outputs: &[embedding(128)], precision: Precision::Fp32 };
    let error = Session::from_file(&model, &interface, &SessionOptions::default()).unwrap_err().to_string();
    assert!(error.contains("the model also needs input `input_ids`; only [] are given"), "{error}");
    let lenient = Port { shape: None, ..embedding(128) };
    assert!(load(&model, [Port { shape: Some(&[Dim::Any, Dim::Any]), ..ids() }, lenient]).is_ok());
}

#[test]
fn a_device_that_this_library_lacks_is_an_error_with_the_one_command() {
    let refused = |provider, parts: &[&str]| {
        let options = SessionOptions { provider, ..SessionOptions::default() };
        let interface = Interface { inputs: &[ids()], outputs: &[embedding(128)], precision: Precision::Fp32 };
        match Session::from_file(&model("text.onnx"), &interface, &options) {
            // A machine may have such a library and device.
            Ok(_) => {}
            Err(error) => {
                let error = error.to_string();
                assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            }
        }
    };
    let set = "and set ORT_DYLIB_PATH to libonnxruntime.so";
    refused(Provider::Cuda(Cuda { device: 0 }), &["cannot use CUDA device 0", "run `", "onnxruntime-gpu", set]);
    let f32 = OpenVino { precision: OpenVinoPrecision::F32 };
    refused(Provider::Openvino(f32), &["cannot use OpenVINO", "run `", "onnxruntime-openvino", set]);
}

#[test]
fn a_batch_is_one_run() {
    let session = load(&model("text.onnx"), [ids(), embedding(128)]).unwrap();
    let mut tokens = vec![0i64; 3 * 77];
    for row in tokens.chunks_mut(77) {
        row[..3].copy_from_slice(&[49406, 736, 49407]);
    }
    let output = session.run_one(Input::I64(&tokens, &[3, 77])).unwrap();
    assert_eq!(output.shape, [3, 128]);
    assert_eq!(output.values[..128], output.values[128..256]);
    let error = session.run_one(Input::I64(&tokens, &[2, 77])).unwrap_err().to_string();
    assert!(error.contains("the model failed"), "{error}");
}

#[derive(Deserialize)]
struct Golden {
    ports: Ports,
}

#[derive(Deserialize)]
struct Ports {
    inputs: PortInputs,
    outputs: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct PortInputs {
    halves: Vec<f32>,
    ids: Vec<i64>,
    mask: Vec<i64>,
    bytes: Vec<u8>,
}

#[test]
fn any_inputs_and_outputs_are_converted_to_what_the_model_stores() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let text = std::fs::read_to_string(folder.join("onnx_networks.json")).unwrap();
    let Ports { inputs, outputs } = serde_json::from_str::<Golden>(&text).unwrap().ports;
    let rows: Option<&[Dim]> = Some(&[Dim::Free, Dim::Is(3)]);
    let port = |name, element| Port { name, element, shape: rows };
    let interface = Interface {
        inputs: &[
            port("bytes", Element::U8),
            port("halves", Element::F32),
            port("ids", Element::I64),
            port("mask", Element::I64),
        ],
        outputs: &[
            port("mixed", Element::F32),
            Port { shape: Some(&[Dim::Free]), ..port("best", Element::I64) },
            port("negative", Element::I64),
        ],
        precision: Precision::Fp16,
    };
    let path = folder.join("onnx/ports.onnx");
    let session = Session::from_file(&path, &interface, &SessionOptions::default()).unwrap();
    let shape: &[usize] = &[2, 3];
    let run = |ids: &[i64]| {
        session.run(&[
            ("ids", Input::I64(ids, shape)),
            ("halves", Input::F32(&inputs.halves, shape)),
            ("mask", Input::I64(&inputs.mask, shape)),
            ("bytes", Input::U8(&inputs.bytes, shape)),
        ])
    };
    let made = run(&inputs.ids).unwrap();
    assert_eq!(made.keys().collect::<Vec<_>>(), ["best", "mixed", "negative"], "what nobody asked for is not computed");
    for (name, expected) in &outputs {
        assert_eq!(&made[name].values, expected, "{name}");
    }
    assert_eq!((&made["best"].shape, &made["mixed"].shape), (&vec![2], &vec![2, 3]));
    let error = run(&[1 << 40; 6]).unwrap_err().to_string();
    assert!(error.contains("ports.onnx: input `ids`"), "{error}");
    let error = session.run(&[("halves", Input::I64(&inputs.ids, shape))]).unwrap_err().to_string();
    assert!(error.contains("input `halves` is stored as f16; the run gave it another kind"), "{error}");
    let error = session.run(&[("more", Input::I64(&inputs.ids, shape))]).unwrap_err().to_string();
    assert!(
        error.contains(r#"the model has no input `more`; its inputs are ["bytes", "halves", "ids", "mask"]"#),
        "{error}"
    );
}
