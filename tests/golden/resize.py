"""Golden checksums for `picture::resize::pillow_bicubic`: Pillow's own `Image.resize`, before and after it changed its passes.

    python tests/golden/resize.py FOLDER_OF_12 FOLDER_OF_13 > tests/golden/resize.json

Each folder was filled with `pip install --target FOLDER pillow==12.0.0` (13.0.0). Pictures are noise by a formula, so that
every pixel matters and sums leave the range of a byte.
"""
import json
import os
import random
import subprocess
import sys
import zlib

import numpy as np
import PIL
from PIL import Image

# Whose bytes are stored beside their checksum.
WHOLE = [((7, 5), (3, 9)), ((20, 31), (9, 4)), ((5, 40), (6, 3))]


def sizes():
    draw = random.Random(0)
    side = lambda: draw.choice([draw.randint(1, 12), draw.randint(10, 100), draw.randint(60, 320)])
    pairs = WHOLE + [((side(), side()), (side(), side())) for _ in range(170)]
    # Tall pictures that shrink are where Pillow 13 differs, and sides that stay are passed over.
    for _ in range(30):
        width, height = draw.randint(4, 60), draw.randint(150, 400)
        pairs.append(((width, height), (draw.choice([width, draw.randint(2, 80)]), draw.randint(3, 120))))
    for _ in range(10):
        width, height = side(), side()
        pairs += [((width, height), (width, side())), ((width, height), (side(), height))]
    return pairs


def noise(width, height):
    """`[height, width, 3]` bytes."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    value = (x * 374761393 + y * 668265263 + c * 2246822519) % 2**32
    value = ((value ^ (value >> 13)) * 1274126177) % 2**32
    return ((value ^ (value >> 16)) & 255).astype(np.uint8)


def resized(source, target):
    return np.asarray(Image.fromarray(noise(*source)).resize(target, Image.Resampling.BICUBIC)).tobytes()


def with_pillow(folder, program):
    """What this program says when it is run with the Pillow of that folder."""
    environment = {**os.environ, "PYTHONPATH": folder}
    return json.loads(subprocess.run([sys.executable, program, "--one"], env=environment, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        pictures = [resized(*pair) for pair in sizes()]
        checksums = [f"{zlib.adler32(picture):08x}" for picture in pictures]
        print(json.dumps({"pillow": PIL.__version__, "checksums": checksums, "bytes": [p.hex() for p in pictures[: len(WHOLE)]]}))
    else:
        print(json.dumps({"sizes": sizes(), "versions": [with_pillow(folder, __file__) for folder in sys.argv[1:3]]}))
