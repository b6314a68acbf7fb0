"""Networks of a few numbers in the shapes of CenterNet and of PP-OCR, whose answers can be worked out by hand.

Run in this folder: `python tiny_networks.py` (onnx 1.23.2). Writes `centernet_tiny/` and `ocr_tiny/`; the tests say what they see.

- CenterNet: a cell's heat is the mean of its 4 x 4 pixels less 0.9, where red is class 0, green 1 and blue 2; the box of each
  reaches 4, 8, 12 and 16 pixels of input.
- The text detector takes a pixel for text where its brightest channel is. The recogniser reads every 8 columns of a line as
  one character: R, G or B by the brightest channel of any pixel, nothing where none is bright; blue comes first in its input.
"""
import hashlib
import os

import numpy as np
from onnx import helper

from onnx_networks import HERE, T, save

OCR = """format = 1
name = "ocr"
[scorer.ocr]
detector = "detector.onnx"
recogniser = "recogniser.onnx"
characters = "characters.txt"
column = "text"
min_side = 32
pixel_threshold = 0.3
box_threshold = 0.5
unclip_ratio = 1.6
text_threshold = 0.5
[provenance]
command = "rewards/tests/golden/tiny_networks.py"
[files]
"""


def sums(folder, names, line):
    digests = [(name, hashlib.sha256(open(os.path.join(folder, name), "rb").read()).hexdigest()) for name in names]
    return "".join(line.format(name=name, digest=digest) for name, digest in digests)


def conv(name, weights, bias):
    weights = np.asarray(weights, np.float32)[:, :, None, None]
    return [(f"{name}_w", weights), (f"{name}_b", np.asarray(bias, np.float32))]


def centernet(folder):
    heat = np.zeros((80, 3), np.float32)
    heat[:3] = np.eye(3)
    nodes = [
        helper.make_node("AveragePool", ["images"], ["cells"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Div", ["cells", "white"], ["light"]),
        helper.make_node("Conv", ["light", "heat_w", "heat_b"], ["above"]),
        helper.make_node("Relu", ["above"], ["heatmap"]),
        helper.make_node("Conv", ["light", "wh_w", "wh_b"], ["wh"]),
    ]
    constants = [("white", np.float32([255])), *conv("heat", heat, [-0.9] * 80), *conv("wh", np.zeros((4, 3)), [4, 8, 12, 16])]
    image = ("images", T.FLOAT, ["n", 3, 512, 512])
    outputs = [("heatmap", T.FLOAT, ["n", 80, 128, 128]), ("wh", T.FLOAT, ["n", 4, 128, 128])]
    save(os.path.join(folder, "model.onnx"), nodes, [image], outputs, constants)
    with open(os.path.join(folder, "SHA256SUMS"), "w") as file:
        file.write(sums(folder, ["model.onnx"], "{digest}  {name}\n"))


def ocr(folder):
    image = ("x", T.FLOAT, ["n", 3, "h", "w"])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["brightest"], axes=[1], keepdims=1),
        helper.make_node("Relu", ["brightest"], ["probabilities"]),
    ]
    save(os.path.join(folder, "detector.onnx"), nodes, [image], [("probabilities", T.FLOAT, ["n", 1, "h", "w"])])
    # Blank, R, G, B from blue, green, red.
    weights = [[0, 0, 0], [0, 0, 10], [0, 10, 0], [10, 0, 0]]
    nodes = [
        helper.make_node("MaxPool", ["x"], ["steps"], kernel_shape=[48, 8], strides=[48, 8]),
        helper.make_node("Conv", ["steps", "class_w", "class_b"], ["logits"]),
        helper.make_node("Squeeze", ["logits", "axis"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Softmax", ["turned"], ["probabilities"], axis=2),
    ]
    constants = [*conv("class", weights, [5, 0, 0, 0]), ("axis", np.int64([2]))]
    line = ("x", T.FLOAT, ["n", 3, 48, "w"])
    save(os.path.join(folder, "recogniser.onnx"), nodes, [line], [("probabilities", T.FLOAT, ["n", "t", 4])], constants)
    with open(os.path.join(folder, "characters.txt"), "w") as file:
        file.write("R\nG\nB\n")
    names = ["detector.onnx", "recogniser.onnx", "characters.txt"]
    with open(os.path.join(folder, "reward.toml"), "w") as file:
        file.write(OCR + sums(folder, names, '"{name}" = "{digest}"\n'))


if __name__ == "__main__":
    centernet(os.path.join(HERE, "centernet_tiny"))
    ocr(os.path.join(HERE, "ocr_tiny"))
