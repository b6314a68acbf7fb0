"""Golden values for `picture::centre_crop`: SimpleAR's own `center_crop_arr` under Pillow 12.

    python tests/golden/crop.py SIMPLEAR > tests/golden/crop.json

SIMPLEAR is a checkout of github.com/wdrink/SimpleAR; the function is taken out of simpar/train/t2i_data.py and run as it
stands, without the file's other imports. It knows squares only; `covering` takes the same steps for any shape, and is
checked against it. Made with pillow 12.0.0 and numpy 2.4.6. Pictures are resize.py's noise.
"""
import ast
import json
import pathlib
import random
import sys
import zlib

import numpy as np
import PIL
from PIL import Image

from resize import noise

# Whose bytes are stored beside their checksum: halved and enlarged, odd and even.
WHOLE = [((21, 17), 8), ((9, 34), 8), ((5, 7), 6), ((32, 16), 4)]


def original(checkout):
    """The function itself."""
    tree = ast.parse((pathlib.Path(checkout) / "simpar/train/t2i_data.py").read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "center_crop_arr"]
    names = {"Image": Image, "np": np}
    exec(compile(ast.Module(wanted, []), "t2i_data.py", "exec"), names)
    return names["center_crop_arr"]


def covering(picture, wanted):
    """The original's steps for a shape that need not be square."""
    while all(side >= 2 * target for side, target in zip(picture.size, wanted)):
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    scale = max(target / side for side, target in zip(picture.size, wanted))
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    left, top = ((side - target) // 2 for side, target in zip(picture.size, wanted))
    return picture.crop((left, top, left + wanted[0], top + wanted[1]))


def rectangles():
    draw = random.Random(1)
    rectangles = [((100, 100), (40, 20)), ((100, 100), (20, 40)), ((64, 48), (32, 24)), ((64, 48), (24, 32)), ((3, 200), (9, 1))]
    side = lambda limit: draw.randint(1, limit)
    return rectangles + [((side(200), side(200)), (side(60), side(60))) for _ in range(35)]


def cases():
    draw = random.Random(0)
    cases = WHOLE + [((1024, 1024), 512), ((1025, 1025), 512), ((1365, 1024), 512), ((1023, 1027), 256), ((512, 512), 512)]
    # Exact powers, one pixel beside them, and sides of one pixel.
    cases += [((side + a, side + b), 16) for side in (16, 32, 64, 128) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    cases += [((1, 1), 5), ((1, 40), 3), ((40, 1), 3), ((2, 3), 1), ((700, 9), 4), ((9, 700), 4), ((1, 1), 1)]
    for _ in range(60):
        side = draw.choice([draw.randint(1, 12), draw.randint(10, 100)])
        long = draw.choice([1, 1, 2, 5])
        edges = draw.randint(1, 300), draw.randint(1, 300) * long
        cases.append((edges if draw.random() < 0.5 else edges[::-1], side))
    return cases


def main():
    crop = original(sys.argv[1])
    source = lambda size: Image.fromarray(noise(*size))
    pictures = [crop(source(size), side).tobytes() for size, side in cases()]
    for (size, side), picture in zip(cases(), pictures):
        assert covering(source(size), (side, side)).tobytes() == picture, (size, side)
    checksum = lambda picture: f"{zlib.adler32(picture):08x}"
    golden = {
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "squares": [(size, (side, side)) for size, side in cases()],
        "rectangles": rectangles(),
        "bytes": [picture.hex() for picture in pictures[: len(WHOLE)]],
        "checksums": [checksum(picture) for picture in pictures]
        + [checksum(covering(source(size), wanted).tobytes()) for size, wanted in rectangles()],
    }
    print(json.dumps(golden))


if __name__ == "__main__":
    main()
