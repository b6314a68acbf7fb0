"""The tiny networks of `onnx/`, and what ONNX Runtime's Python package makes of them.

Run in this folder: `python onnx_networks.py`. Writes `onnx/` and `onnx_networks.json`.
"""

import json
import os

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper, numpy_helper

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "onnx")


def save(path, nodes, inputs, outputs, constants=()):
    """A checked model; `inputs` and `outputs` are (name, element, shape)."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="grpo")
    model.ir_version = 8
    onnx.checker.check_model(model)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    onnx.save(model, path)


def run(path, feed):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed)))


def ports():
    """Every kind of port a session converts: four inputs, four outputs, one of which nobody asks for."""
    path = os.path.join(FOLDER, "ports.onnx")
    save(
        path,
        [
            helper.make_node("Cast", ["ids"], ["ids16"], to=T.FLOAT16),
            helper.make_node("Cast", ["mask"], ["mask16"], to=T.FLOAT16),
            helper.make_node("Cast", ["bytes"], ["bytes16"], to=T.FLOAT16),
            helper.make_node("Add", ["halves", "ids16"], ["shifted"]),
            helper.make_node("Mul", ["shifted", "mask16"], ["kept"]),
            helper.make_node("Sub", ["kept", "bytes16"], ["mixed"]),
            helper.make_node("ArgMax", ["mixed"], ["best"], axis=1, keepdims=0),
            helper.make_node("Less", ["mixed", "zero"], ["negative"]),
            helper.make_node("Identity", ["mixed"], ["unwanted"]),
        ],
        [
            ("halves", T.FLOAT16, ["batch", 3]),
            ("ids", T.INT32, ["batch", 3]),
            ("mask", T.BOOL, ["batch", 3]),
            ("bytes", T.UINT8, ["batch", 3]),
        ],
        [
            ("mixed", T.FLOAT16, ["batch", 3]),
            ("best", T.INT64, ["batch"]),
            ("negative", T.BOOL, ["batch", 3]),
            ("unwanted", T.FLOAT16, ["batch", 3]),
        ],
        [("zero", np.zeros(1, np.float16))],
    )
    halves = np.array([[0.1, -2.5, 7.0], [3.3333, 0.0, -1.0]], np.float32)
    ids = np.array([[1, 2, 3], [-4, 5, 6]], np.int64)
    mask = np.array([[1, 0, 1], [1, 1, 0]], np.int64)
    octets = np.array([[0, 3, 255], [1, 2, 4]], np.uint8)
    given = {"halves": halves, "ids": ids, "mask": mask, "bytes": octets}
    stored = {
        "halves": halves.astype(np.float16),
        "ids": ids.astype(np.int32),
        "mask": mask.astype(bool),
        "bytes": octets,
    }
    made = run(path, stored)
    return {
        "inputs": {name: value.ravel().tolist() for name, value in given.items()},
        "outputs": {name: made[name].astype(np.float32).ravel().tolist() for name in ("mixed", "best", "negative")},
    }


def external():
    """Weights in a second file, as every tower above 2 GB has them."""
    path = os.path.join(FOLDER, "external.onnx")
    x, y = [(name, T.FLOAT, ["batch", 3]) for name in "xy"]
    save(path, [helper.make_node("Add", ["x", "w"], ["y"])], [x], [y], [("w", np.array([0.5, -2, 0.25], np.float32))])
    data = os.path.join(FOLDER, "external.data")
    if os.path.exists(data):
        os.remove(data)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="external.data", size_threshold=0)
    os.chmod(data, 0o644)


def main():
    external()
    golden = {
        "versions": {"onnx": onnx.__version__, "onnxruntime": ort.__version__, "numpy": np.__version__},
        "ports": ports(),
    }
    with open(os.path.join(HERE, "onnx_networks.json"), "w") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
