"""Golden scores of the embedded models: Pillow, open_clip's tokenizer and onnxruntime in Python.

    python rewards/tests/golden/clip_scores.py > rewards/tests/golden/clip_scores.json

Made with onnxruntime 1.31.1, Pillow 12.0.0, open_clip_torch 3.3.0 and torchvision 0.26.0; run again after every training.
"""
import json
import os

import numpy as np
import onnxruntime
import open_clip
import PIL
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "models")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
RED, BLUE, GREEN, WHITE = [220, 25, 30], [25, 70, 225], [25, 150, 50], [255, 255, 255]
PICTURES = [
    (64, 64, []),
    (64, 64, [[[20, 20, 44, 44], RED]]),
    (64, 64, [[[20, 20, 44, 44], BLUE]]),
    (64, 64, [[[6, 22, 26, 42], RED], [[38, 22, 58, 42], BLUE]]),
    (64, 64, [[[22, 6, 42, 26], GREEN], [[22, 38, 42, 58], GREEN]]),
    (97, 61, [[[30, 15, 62, 47], WHITE]]),
    (33, 80, [[[6, 20, 28, 42], RED]]),
    (128, 128, [[[40, 40, 90, 90], RED], [[4, 4, 30, 30], GREEN], [[100, 100, 124, 124], BLUE]]),
]
PROMPTS = [
    "a photo of a red square", "a photo of a blue square", "a photo of two squares", "a photo of three circles",
    "a photo of a red square and a blue square", "a photo of a star above a ring", "something else entirely", "",
]


def drawn(width, height, rectangles):
    pixels = np.full((height, width, 3), 150, dtype=np.uint8)
    for (left, top, right, bottom), color in rectangles:
        pixels[top:bottom, left:right] = color
    return pixels


def preprocessed(pixels):
    image = T.center_crop(T.resize(Image.fromarray(pixels), 64, InterpolationMode.BICUBIC), 64)
    return ((np.asarray(image).astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def embeddings(folder, file, values):
    session = onnxruntime.InferenceSession(os.path.join(MODELS, folder, file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: values})[0].astype(np.float64)


pixels = np.stack([preprocessed(drawn(*picture)) for picture in PICTURES])
ids = open_clip.get_tokenizer("ViT-H-14")(PROMPTS).numpy()
models = []
for folder in ("clip", "hps"):
    scores = embeddings(folder, "text.onnx", ids) @ embeddings(folder, "image.onnx", pixels).T
    models.append({"folder": folder, "scores": [[round(score, 6) for score in row] for row in scores.tolist()]})
versions = {"onnxruntime": onnxruntime.__version__, "pillow": PIL.__version__, "open_clip": open_clip.__version__}
images = [{"width": w, "height": h, "rectangles": rectangles} for w, h, rectangles in PICTURES]
print(json.dumps({"versions": versions, "prompts": PROMPTS, "images": images, "models": models}))
