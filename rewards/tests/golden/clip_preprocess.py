"""Golden values for `clip::Preprocess`: open_clip's and HPSv2's own transforms and torch's interpolation.

    python rewards/tests/golden/clip_preprocess.py FOLDER_OF_12 FOLDER_OF_13 HPSV2 > rewards/tests/golden/clip_preprocess.json

The first two folders hold Pillow 12.0.0 and 13.0.0, as for tests/golden/resize.py; HPSV2 is a checkout of github.com/tgxs002/HPSv2
(866735e). Made with open_clip_torch 3.3.0, torch 2.11.0 and torchvision 0.26.0, whose default is antialiasing; for 2023 it is
switched off in the call. Torch 2.11 garbles a picture that shrinks to one column, so there is none here. The pictures are
resize.py's noise.
"""
import importlib
import json
import os
import sys
import types
import zlib

import numpy as np
import open_clip
import torch
import torchvision
from PIL import Image

# The root package's goldens hold the pictures' formula.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../tests/golden"))

from resize import noise, with_pillow  # noqa: E402

MEAN, STD = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
# Target, width, height: down, up, square, wide, tall, one edge or both of the very size, edges that round to even.
SIZES = [(24, *sides) for sides in (
    (24, 24), (64, 64), (97, 61), (300, 200), (33, 180), (10, 13), (1, 5), (24, 48), (48, 31), (512, 24), (23, 25), (40, 500), (16, 15),
)] + [(224, *sides) for sides in ((224, 224), (512, 512), (100, 180), (640, 427), (333, 1000), (225, 224))]
# Of the values of float modes, one in so many is stored.
STRIDE = {24: 13, 224: 1499}


def shown(pixels):
    """`[S, S, 3]` in `[0, 1]`."""
    return (pixels.double().permute(1, 2, 0) * STD.double() + MEAN.double()).numpy()


def pil(size, width, height):
    pixels = open_clip.image_transform(size, is_train=False)(Image.fromarray(noise(width, height)))
    return f"{zlib.adler32(np.rint(shown(pixels) * 255).astype(np.uint8).tobytes()):08x}"


def hpsv2(checkout):
    """HPSv2's transform, out of its package without running the rest of it."""
    package = types.ModuleType("hps")
    package.__path__ = [os.path.join(checkout, "hpsv2", "src", "open_clip")]
    sys.modules["hps"] = package
    return importlib.import_module("hps.transform")


def hps_pixels(transform, image, size, antialias):
    """HPSv2's evaluation: the longest side, padded."""
    resize = torchvision.transforms.functional.resize
    transform.F.resize = lambda *args: resize(*args, antialias=antialias)
    pixels = transform.image_transform(size, is_train=False, resize_longest_max=True)(image)
    transform.F.resize = resize
    return pixels


def simplear_pixels(image, size):
    """SimpleAR's `_decode_images` from `[-1, 1]` on, with the floats of the picture's bytes in the place of the decoder's."""
    decoded = torchvision.transforms.functional.to_tensor(image)[None] * 2 - 1
    resized = torch.nn.functional.interpolate(decoded, size=(size, size), mode="bilinear", align_corners=False)
    values = (resized * 127.5 + 127.5).clamp(0, 255)[0] / 255
    return (values - MEAN[:, None, None]) / STD[:, None, None]


def sampled(pixels, size):
    return [round(value, 6) for value in shown(pixels).flatten()[:: STRIDE[size]].tolist()]


def case(transform, size, width, height):
    image = Image.fromarray(noise(width, height))
    # The original fails here; what it does at every other size is the meaning that ours keeps.
    padded = image if width == height or max(width, height) != size else padding(image, size)
    return {
        "size": size, "width": width, "height": height, "stride": STRIDE[size],
        "hpsv2": sampled(hps_pixels(transform, padded, size, True), size),
        "hpsv2_2023": sampled(hps_pixels(transform, padded, size, False), size),
        "simplear": sampled(simplear_pixels(image, size), size),
    }


def padding(image, size):
    square = Image.new("RGB", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps([pil(*sizes) for sizes in SIZES]))
    else:
        torch.set_num_threads(1)
        transform = hpsv2(sys.argv[3])
        cases = [case(transform, *sizes) for sizes in SIZES]
        for folder, name in zip(sys.argv[1:3], ("pil_bicubic", "pil_bicubic_13")):
            for one, checksum in zip(cases, with_pillow(folder, __file__)):
                one[name] = checksum
        versions = {"open_clip": open_clip.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
        print(json.dumps({"versions": versions, "cases": cases}))
