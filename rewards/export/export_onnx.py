"""Writes the two towers of a model as ONNX, beside the reward.toml that the Rust side reads, and checks them against torch.

Opset 17, TorchScript exporter. A tower's weights are stored in one of three ways: f32; f16 and computed in f16, with ports
of f32; or, for the miniatures, rounded to f16 and stored so, with a cast to f32 behind each: half the size, and the very
numbers that torch is left with.
"""
import hashlib
import json
import os
import shutil
import tempfile

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

CONTEXT = 77


def versions():
    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def export_tower(tower, example, ports, embed_dim, path):
    """One tower with a dynamic batch and a declared shape, so that a reader can check it; weights in loose files if large."""
    # The fast path of torch's attention cannot be exported.
    torch.backends.mha.set_fastpath_enabled(False)
    # The exporter gives the wrapper's own train flag to its children, so it must be the wrapper that is set.
    tower = tower.eval()
    with torch.no_grad():
        torch.onnx.export(
            tower, (example,), path, input_names=[ports[0]], output_names=[ports[1]], opset_version=17,
            dynamic_axes={ports[0]: {0: "batch"}, ports[1]: {0: "batch"}}, do_constant_folding=True, dynamo=False,
        )
    model = onnx.load(path, load_external_data=False)
    output = model.graph.output[0]
    del output.type.tensor_type.shape.dim[:]
    output.type.tensor_type.shape.dim.add().dim_param = "batch"
    output.type.tensor_type.shape.dim.add().dim_value = embed_dim
    onnx.save(model, path)


def write_tower(tower, example, ports, embed_dim, path, precision):
    """A tower at `path`, with its weights in `path + "_data"` if they are large; the largest difference from torch.

    Weights above 2 GB cannot lie in the .onnx file, and smaller ones are better mapped into memory than parsed.
    """
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as loose:
        raw = os.path.join(loose, "model.onnx")
        export_tower(tower, example, ports, embed_dim, raw)
        if precision == "half_weights":
            store_as_half(raw)
        model = convert_float_to_float16(raw, keep_io_types=True) if precision == "fp16" else onnx.load(raw)
    data = os.path.basename(path) + "_data"
    external = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": data, "size_threshold": 1024}
    n_bytes = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    # What lies there already would be appended to.
    for old in (path, path + "_data"):
        if os.path.exists(old):
            os.remove(old)
    onnx.save_model(model, path, **(external if n_bytes > 2**28 else {}))
    del model
    if os.path.exists(path + "_data"):
        # onnx writes data files for their owner alone.
        shutil.copymode(path, path + "_data")
    difference = largest_difference(tower, path, ports[0], example)
    print(f"{path}: {n_bytes / 1e6:.1f} MB of weights, largest difference from torch {difference:.1e}", flush=True)
    return difference


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
    options = onnxruntime.SessionOptions()
    # At the highest level onnxruntime 1.31 crashes on towers in f16.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = tower(example).numpy()
    return float(np.abs(session.run(None, {feed_name: example.numpy()})[0] - expected).max())


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def toml_lines(table, path=()):
    """A table of plain values and tables as TOML; what is None is left out."""
    quoted = lambda key: key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
    plain = {key: value for key, value in table.items() if value is not None and not isinstance(value, dict)}
    if path and (plain or not table):
        yield f"\n[{'.'.join(quoted(key) for key in path)}]"
    for key, value in plain.items():
        # A basic string of TOML is one of JSON, and so are numbers, truth values and lists of these.
        yield f"{quoted(key)} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from toml_lines(value, (*path, key))


def write_reward(folder, name, clip, provenance):
    """`reward.toml`: the scorer, the checksum of every file that is read, and where they come from."""
    paths = [clip["image"], clip["text"], clip["image"] + "_data", clip["text"] + "_data"]
    files = {path: sha256(os.path.join(folder, path)) for path in paths if os.path.exists(os.path.join(folder, path))}
    table = {"format": 1, "name": name, "scorer": {"clip": clip}, "files": files, "provenance": provenance}
    with open(os.path.join(folder, "reward.toml"), "w") as file:
        file.write("\n".join(toml_lines(table)) + "\n")


def write_clip(towers, folder, name, clip, provenance):
    """A folder for `ClipReward::load`: `towers` are the image tower and the text tower, each with an example.

    `clip` is the scorer's table without what this program knows. Its `precision` is that of the computation; "half_weights"
    stands for f16 weights that are computed in f32.
    """
    os.makedirs(folder, exist_ok=True)
    precision, parity = clip["precision"], {}
    for (tower, example), kind, feed in zip(towers, ("image", "text"), ("pixel_values", "input_ids")):
        path = os.path.join(folder, f"{kind}.onnx")
        parity[f"{kind}.onnx"] = write_tower(tower, example, (feed, f"{kind}_embeds"), clip["embed_dim"], path, precision)
    clip = {"image": "image.onnx", "text": "text.onnx", **clip, "precision": "fp16" if precision == "fp16" else "fp32"}
    stored = {"stored_as": "f16, cast to f32 when loaded"} if precision == "half_weights" else {}
    provenance = {**stored, **provenance, "parity_with_torch": parity}
    provenance["versions"] = {**versions(), **provenance.get("versions", {})}
    write_reward(folder, name, clip, provenance)


def export_model(model, folder, name, provenance):
    """A miniature: `image.onnx`, `text.onnx` and `reward.toml`."""
    model = model.cpu().eval()
    round_to_half(model)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, CONTEXT, dtype=torch.int64)
    ids[:, 0], ids[:, 1], ids[0, 2], ids[1:, 2] = 49406, 320, 49407, model.known_ids[0]
    ids[1, 3], ids[2, 3], ids[2, 4] = 49407, 320, 49407
    clip = {
        "image_size": 64, "preprocess": "pil-bicubic", "embed_dim": model.embed_dim,
        "logit_scale": round(model.scale().item(), 4), "precision": "half_weights",
    }
    write_clip([(model.image, pixels), (model.text, ids)], folder, name, clip, provenance)
