"""Golden crops and colours: GenEval's own `ImageCrops`, and a zero-shot classifier over the embedded CLIP.

    python geneval_colors.py CHECKOUT        (a checkout of github.com/djghosh13/geneval)

`ImageCrops` is compiled out of `evaluation/evaluate_images.py` at run time. Its crops go through open_clip's transform
(Pillow's bicubic) and the embedded image tower in onnxruntime; captions, as clip_benchmark's `zero_shot_classifier`
makes them (each text normalised, the mean of three, normalised again), through the text tower. Writes
`geneval_colors.json` beside itself. Run it with Pillow 12 or earlier.
"""

import ast
import hashlib
import json
import pathlib
import platform
import sys
import types

import numpy as np
import onnxruntime
import open_clip
import PIL
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

MODELS = pathlib.Path(__file__).parent / ".." / ".." / "models" / "clip"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
WIDTH, HEIGHT = 96, 80
# Class, corners, and the box of the mask where there is one; fractions of a half, and corners beyond the image.
OBJECTS = [
    ["circle", [10.5, 11.5, 40.5, 41.5], [12, 12, 40, 41]],
    ["circle", [10.49, 11.51, 40.2, 41.9], None],
    ["square", [-4.6, 30.0, 33.4, 92.5], [0, 30, 33, 80]],
    ["square", [50.0, 8.0, 110.0, 48.0], None],
    ["star", [52.5, 43.5, 91.5, 78.5], [60, 50, 90, 70]],
    ["wine glass", [0.0, 0.0, 96.0, 80.0], [40, 0, 96, 40]],
]
RECTANGLES = [[[8, 8, 44, 44], [220, 25, 30]], [[48, 4, 92, 44], [25, 70, 225]], [[52, 46, 92, 78], [25, 150, 50]]]


def drawn():
    pixels = np.full((HEIGHT, WIDTH, 3), 150, np.uint8)
    for (left, top, right, bottom), color in RECTANGLES:
        pixels[top:bottom, left:right] = color
    return Image.fromarray(pixels)


def crops(checkout, image):
    tree = ast.parse((checkout / "evaluation" / "evaluate_images.py").read_text())
    wanted = [node for node in tree.body if getattr(node, "name", "") == "ImageCrops"]
    space = {"torch": torch, "Image": Image, "args": types.SimpleNamespace(options={}), "transform": lambda it: it}
    exec(compile(ast.Module(wanted, []), "evaluate_images.py", "exec"), space)
    objects = []
    for _, box, inside in OBJECTS:
        mask = None
        if inside is not None:
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[inside[1] : inside[3], inside[0] : inside[2]] = True
        objects.append((np.array([*box, 0.9], np.float32), mask))
    dataset = space["ImageCrops"](image, objects)
    return [dataset[row][0] for row in range(len(objects))]


def embedded(file, values):
    session = onnxruntime.InferenceSession(str(MODELS / file), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: values})[0]
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def preprocessed(image):
    image = T.center_crop(T.resize(image, 64, InterpolationMode.BICUBIC), 64)
    return ((np.asarray(image).astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def classifier(name):
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
    rows = []
    for color in COLORS:
        texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
        mean = embedded("text.onnx", tokenizer(texts).numpy()).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def main():
    assert int(PIL.__version__.split(".")[0]) <= 12, "newer versions of Pillow resize tall images in another order"
    found = crops(pathlib.Path(sys.argv[1]), drawn())
    images = embedded("image.onnx", np.stack([preprocessed(crop) for crop in found]))
    objects = []
    for (name, box, inside), crop, image in zip(OBJECTS, found, images):
        similarities = classifier(name) @ image
        digest = hashlib.sha256(crop.tobytes()).hexdigest()
        row = {"class": name, "bbox": box, "mask": inside, "size": crop.size, "sha256": digest}
        color = COLORS[int(similarities.argmax())]
        objects.append({**row, "similarities": [round(float(s), 6) for s in similarities], "color": color})
        print(name, crop.size, color)
    versions = {"python": platform.python_version(), "pillow": PIL.__version__, "open_clip": open_clip.__version__}
    versions |= {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    golden = {"versions": versions, "width": WIDTH, "height": HEIGHT, "rectangles": RECTANGLES, "objects": objects}
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
