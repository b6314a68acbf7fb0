"""What rapidocr-onnxruntime 1.4.4 makes of small maps, boxes and probabilities: the steps around PP-OCRv4's networks.

Run in this folder, with that package and its dependencies: `python ocr.py`. Writes `ocr.json`. No network is run.
"""

import json
import os

import cv2
import numpy as np
from rapidocr_onnxruntime import RapidOCR
from rapidocr_onnxruntime.ch_ppocr_det.utils import DBPostProcess
from rapidocr_onnxruntime.ch_ppocr_rec.text_recognize import TextRecognizer
from rapidocr_onnxruntime.ch_ppocr_rec.utils import CTCLabelDecode

HERE = os.path.dirname(os.path.abspath(__file__))
# Centre, half width, half height, turn in degrees, largest probability.
MAPS = [
    [(48, 20, 36, 6, 0, 0.95)],
    [(30, 16, 20, 5, 0, 0.9), (70, 44, 18, 7, 0, 0.99), (20, 50, 10, 4, 0, 0.55)],
    [(48, 32, 34, 7, 12, 0.97)],
    [(40, 34, 30, 5, -25, 0.9), (84, 14, 8, 6, 0, 0.8)],
    [(14, 32, 5, 26, 0, 0.93), (60, 32, 2, 1, 0, 0.9), (80, 50, 9, 3, 0, 0.42)],
]


def probability(regions, width=96, height=64):
    """A smooth region of text for each rectangle, in 255ths."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    total = np.zeros((height, width))
    for cx, cy, half_width, half_height, turn, largest in regions:
        cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        along, across = (x - cx) * cos + (y - cy) * sin, -(x - cx) * sin + (y - cy) * cos
        outside = np.maximum(np.abs(along) - half_width, np.abs(across) - half_height)
        total = np.maximum(total, largest / (1 + np.exp(3 * outside)))
    return np.round(total * 255).astype(np.uint8)


def maps():
    post = DBPostProcess(thresh=0.3, box_thresh=0.5, unclip_ratio=1.6, use_dilation=True)
    for regions in MAPS:
        values = probability(regions)
        boxes, _ = post((values / 255.0).astype(np.float32)[None, None], values.shape)
        yield {"width": values.shape[1], "values": values.tobytes().hex(), "boxes": boxes.tolist()}


def lines():
    """Lines cut out of the picture of `patterned` in `tests/clip.rs`, and as the recogniser takes them."""
    y, x = np.mgrid[:48, :64]
    waves = [np.sin(x / 5) * 100 + 128, np.cos(y / 7) * 90 + 120, np.sin((x + y) / 9) * 110 + 128]
    picture = np.stack(waves, -1).round().astype(np.uint8)
    quads = [
        [[4, 6], [58, 6], [58, 20], [4, 20]],
        [[8, 12], [50, 24], [46, 38], [4, 26]],
        [[30, 2], [40, 2], [40, 44], [30, 44]],
    ]
    recognizer = TextRecognizer.__new__(TextRecognizer)
    recognizer.rec_image_shape = [3, 48, 320]
    for quad in quads:
        points = np.array(quad, np.float32)
        # The package works on blue first.
        (line,) = RapidOCR.get_crop_img_list(None, picture[..., ::-1].copy(), [points])
        height, width = line.shape[:2]
        given = recognizer.resize_norm_img(line, max(320 / 48, width / height))
        yield {
            "quad": quad,
            "size": [width, height],
            "line_every_7th": line[..., ::-1].ravel()[::7].tolist(),
            "input_width": given.shape[2],
            "input_every_101st": np.round(given.ravel()[::101], 4).tolist(),
        }


def readings():
    characters = list("abé-") + [" "]
    decode = CTCLabelDecode(character=characters[:-1])
    rng = np.random.default_rng(3)
    for steps in (1, 9, 30):
        values = np.round(rng.dirichlet(np.full(6, 0.15), steps).repeat(2, 0) * 1000) / 1000
        ((text, mean),) = decode(values[None].astype(np.float32))
        yield {"characters": characters, "values": values.ravel().tolist(), "text": text, "mean": float(mean)}


def main():
    golden = {
        "versions": {"rapidocr_onnxruntime": "1.4.4", "opencv": cv2.__version__, "numpy": np.__version__},
        "maps": list(maps()),
        "lines": list(lines()),
        "readings": list(readings()),
    }
    with open(os.path.join(HERE, "ocr.json"), "w") as file:
        json.dump(golden, file)
        file.write("\n")


if __name__ == "__main__":
    main()
