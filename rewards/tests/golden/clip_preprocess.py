"""Golden values for `clip::Preprocess`: Pillow and torchvision on pictures made by a formula.

    python rewards/tests/golden/clip_preprocess.py > rewards/tests/golden/clip_preprocess.json

Made with Pillow 12.0.0 (13 resizes tall pictures in another order), torch 2.11.0 and torchvision 0.26.0.
"""
import json

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

SIZE = 24
SIDES = [(24, 24), (64, 64), (97, 61), (300, 200), (33, 180), (10, 13), (1, 5)]


def picture(width, height):
    x, y, c = np.meshgrid(np.arange(width), np.arange(height), np.arange(3), indexing="xy")
    return ((3 * x * x + 5 * y * y + 7 * x * y + 40 * c) % 256).astype(np.uint8)


def tensor(image, antialias):
    resized = T.resize(T.to_tensor(image), SIZE, InterpolationMode.BICUBIC, antialias=antialias)
    values = T.center_crop(resized, SIZE).permute(1, 2, 0).flatten().tolist()
    return [round(value, 5) for value in values[::11]]


cases = []
for width, height in SIDES:
    image = Image.fromarray(picture(width, height))
    bytes_ = np.asarray(T.center_crop(T.resize(image, SIZE, InterpolationMode.BICUBIC), SIZE)).tobytes()
    cases.append({
        "width": width, "height": height, "pil_u8": bytes_.hex(),
        "tensor_antialias_every_11th": tensor(image, True), "tensor_no_antialias_every_11th": tensor(image, False),
    })
versions = {"pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
print(json.dumps({"versions": versions, "size": SIZE, "cases": cases}))
