"""Golden instances for Mask2Former's surroundings: OpenCV's resize and torch's interpolation as mmdet 2 calls them.

    python mask2former.py        (numpy, torch, onnx, onnxruntime, opencv-python-headless; versions in the file it writes)

Two halves. `inputs`: pictures by a formula, resized by `cv2.resize` as mmcv's `imrescale` does and padded; of each a
SHA-256 of the resized bytes and the sum of the network's input. `outputs`: random class logits and smooth mask logits,
turned into instances by a program written from mmdet's description: softmax without the last class, the best 100 of
queries x classes, masks brought to the padded size, cut, brought to the original size, above 0, score times the mean
probability inside, bounds. A third, `session`, sends a picture of two squares through `mask2former.onnx`, a network of
three queries that find what is bright, what is dark and nothing. Writes both files beside itself.
"""

import hashlib
import json
import pathlib
import platform

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

SIZES = [(64, 64), (61, 97), (200, 30), (512, 512), (1600, 1600), (301, 451), (1600, 1000)]
N_CLASSES = 5


def picture(height, width):
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return ((x * x + 3 * x * y // 7 + 11 * y + 85 * c + (x * y) % 251) % 256).astype(np.uint8)


def rescaled(height, width):
    scale = min(1333 / max(height, width), 800 / min(height, width))
    return int(height * float(scale) + 0.5), int(width * float(scale) + 0.5)


def normalised(pixels):
    to_height, to_width = rescaled(*pixels.shape[:2])
    resized = cv2.resize(pixels, (to_width, to_height), interpolation=cv2.INTER_LINEAR)
    padded = np.full((-(-to_height // 32) * 32, -(-to_width // 32) * 32, 3), 128, np.float32)
    padded[:to_height, :to_width] = resized
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    return resized, (padded - mean) / std


def network_input(height, width):
    resized, pixels = normalised(picture(height, width))
    digest = hashlib.sha256(resized.tobytes()).hexdigest()
    total = float(pixels.sum(dtype=np.float64))
    return {"size": [height, width], "resized": list(resized.shape[:2]), "sha256": digest, "sum": total}


def smooth(rng, n, height, width):
    coarse = torch.tensor(rng.normal(0, 4, (1, n, 4, 5)), dtype=torch.float32)
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic")[0].numpy()
    return np.round(fine, 2).astype(np.float32)


def instances(classes, masks, original, n_classes=N_CLASSES):
    height, width = rescaled(*original)
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)
    logits = F.interpolate(torch.from_numpy(masks)[None], size=padded, mode="bilinear", align_corners=False)[0]
    logits = logits[:, :height, :width]
    logits = F.interpolate(logits[:, None], size=original, mode="bilinear", align_corners=False)[:, 0]
    scores = F.softmax(torch.from_numpy(classes), dim=-1)[:, :-1].flatten()
    order = torch.argsort(scores, descending=True)[:100]
    found = []
    for place in order.tolist():
        query, label = divmod(place, n_classes)
        inside = logits[query] > 0
        certainty = float((logits[query].sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        ys, xs = torch.where(inside)
        box = [0.0] * 4 if len(xs) == 0 else [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        if float(scores[place]) > 0.05:
            found.append([label, float(scores[place]) * certainty, *map(float, box), int(inside.sum())])
    return found


def network(path):
    """Brightness of squares of 32 pixels, times a weight and plus a bias for each query."""
    classes = np.full((1, 3, 81), -8, np.float32)
    for query, label, logit in ((0, 0, 1.5), (0, 16, 1.0), (1, 15, 2.0), (2, 3, 4.0)):
        classes[0, query, label] = logit
    constants = {
        "classes": classes,
        "weights": np.array([2, -2, 0], np.float32).reshape(1, 3, 1, 1),
        "biases": np.array([-1, -2, -1], np.float32).reshape(1, 3, 1, 1),
    }
    nodes = [
        helper.make_node("Identity", ["classes"], ["cls_logits"]),
        helper.make_node("ReduceMean", ["images"], ["grey"], axes=[1], keepdims=1),
        helper.make_node("AveragePool", ["grey"], ["cells"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Mul", ["cells", "weights"], ["scaled"]),
        helper.make_node("Add", ["scaled", "biases"], ["mask_logits"]),
    ]
    port = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    outputs = [port("cls_logits", [1, 3, 81]), port("mask_logits", [1, 3, "h", "w"])]
    inputs = [port("images", [1, 3, "height", "width"])]
    initial = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "squares", inputs, outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def session(path):
    network(path)
    pixels = np.full((90, 120, 3), 100, np.uint8)
    pixels[20:60, 10:50], pixels[30:80, 70:110] = 255, 0
    _, values = normalised(pixels)
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = values.transpose(2, 0, 1)[None].astype(np.float32)
    classes, masks = runtime.run(["cls_logits", "mask_logits"], {"images": values})
    return instances(classes[0], masks[0], (90, 120), 80)


def main():
    rng = np.random.default_rng(100)
    outputs = []
    for original in ((40, 60), (97, 61)):
        classes = np.round(rng.normal(0, 2.5, (7, N_CLASSES + 1)), 2).astype(np.float32)
        masks = smooth(rng, 7, 12, 16)
        masks[6] = -1
        row = {"size": original, "classes": classes.round(2).tolist(), "masks": masks.round(2).tolist()}
        outputs.append({**row, "instances": instances(classes, masks, original)})
    golden = {
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "session": session(pathlib.Path(__file__).with_suffix(".onnx")),
        "inputs": [network_input(*size) for size in SIZES],
        "outputs": outputs,
    }
    text = json.dumps(golden, separators=(",", ":"))
    for value in {str(v) for row in outputs for q in row["masks"] for line in q for v in line if len(str(v)) > 6}:
        text = text.replace(value, f"{float(value):.2f}")
    pathlib.Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
