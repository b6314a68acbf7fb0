"""Writes the two towers of a model as ONNX, beside the sidecar that the Rust side reads, and checks them against torch.

The miniatures' weights are rounded to f16 and stored so, with a cast to f32 behind each: half the size, and the very
numbers that torch is left with. Opset 17, TorchScript exporter.
"""
import json
import os

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

CONTEXT = 77


def versions():
    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def export_tower(tower, example, input_name, output_name, path):
    """One tower with a dynamic batch; the fast path of torch's attention cannot be exported, so it is off."""
    torch.backends.mha.set_fastpath_enabled(False)
    # The exporter gives the wrapper's own train flag to its children, so it must be the wrapper that is set.
    tower = tower.eval()
    with torch.no_grad():
        torch.onnx.export(
            tower, (example,), path, input_names=[input_name], output_names=[output_name], opset_version=17,
            dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}}, do_constant_folding=True, dynamo=False,
        )


def declare_shape(path, embed_dim):
    """Writes the output's shape, which the exporter leaves partly unknown, so that a reader can check it."""
    model = onnx.load(path, load_external_data=False)
    output = model.graph.output[0]
    del output.type.tensor_type.shape.dim[:]
    output.type.tensor_type.shape.dim.add().dim_param = "batch"
    output.type.tensor_type.shape.dim.add().dim_value = embed_dim
    onnx.save(model, path)


def round_to_half(model):
    """Rounds every weight to f16 in place, so that what is measured is what is stored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def store_as_half(path):
    """Replaces every f32 initializer that f16 holds exactly by its f16 form and a cast."""
    model = onnx.load(path)
    casts, kept = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor) if tensor.data_type == TensorProto.FLOAT else None
        if values is None or values.size < 64 or not np.array_equal(values.astype(np.float16).astype(np.float32), values):
            kept.append(tensor)
            continue
        kept.append(numpy_helper.from_array(values.astype(np.float16), tensor.name + "_half"))
        casts.append(helper.make_node("Cast", [tensor.name + "_half"], [tensor.name], to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(casts + nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def largest_difference(tower, path, feed_name, example):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = tower(example).numpy()
    return float(np.abs(session.run(None, {feed_name: example.numpy()})[0] - expected).max())


def write_sidecar(folder, fields, provenance):
    with open(os.path.join(folder, "clip.json"), "w") as file:
        json.dump({**fields, "provenance": provenance}, file, indent=2)
        file.write("\n")


def export_model(model, folder, name, provenance):
    """A miniature: `image.onnx`, `text.onnx` and `clip.json`."""
    model = model.cpu().eval()
    round_to_half(model)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, CONTEXT, dtype=torch.int64)
    ids[:, 0], ids[:, 1], ids[0, 2], ids[1:, 2] = 49406, 320, 49407, model.known_ids[0]
    ids[1, 3], ids[2, 3], ids[2, 4] = 49407, 320, 49407
    parity = {}
    for tower, example, feed, output, file in (
        (model.image, pixels, "pixel_values", "image_embeds", "image.onnx"),
        (model.text, ids, "input_ids", "text_embeds", "text.onnx"),
    ):
        path = os.path.join(folder, file)
        export_tower(tower, example, feed, output, path)
        declare_shape(path, model.embed_dim)
        store_as_half(path)
        parity[file] = largest_difference(tower, path, feed, example)
        print(f"{file}: {os.path.getsize(path)} bytes, largest difference from torch {parity[file]:.1e}")
    fields = {
        "name": name, "image_size": 64, "context": CONTEXT, "preprocess": "pil_u8", "embed_dim": model.embed_dim,
        "logit_scale": round(model.scale().item(), 4),
    }
    write_sidecar(folder, fields, {**provenance, "parity_with_torch": parity})
