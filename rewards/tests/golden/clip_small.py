"""A CLIP of ViT-H's graph at a small width, in both precisions, and its cosines in every mode of preprocessing.

    python rewards/tests/golden/clip_small.py FOLDER_OF_12 FOLDER_OF_13 HPSV2

Arguments and versions as for clip_preprocess.py, and onnx 1.23.2, onnxruntime 1.31.1. Writes clip_small/fp32 and clip_small/fp16
through rewards/export/export_clip.py, and clip_small.json: the cosines of torch's own f32 model. Weights are random, f16
numbers in both folders (fp32 computes with them in f32), and larger than usual, so that pictures differ.
"""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import open_clip
import torch
from PIL import Image

from clip_preprocess import MEAN, STD, hps_pixels, hpsv2, padding, simplear_pixels
from resize import noise, with_pillow

HERE = os.path.dirname(os.path.abspath(__file__))
EXPORT = os.path.join(HERE, "..", "..", "export")
SIZE = 224
ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
SIDES = [(224, 224), (512, 512), (64, 64), (640, 480), (480, 640), (100, 300), (300, 100), (224, 150), (97, 224), (333, 334),
         (700, 224), (256, 1000), (31, 33), (1024, 768), (225, 223), (400, 111), (180, 720), (448, 448), (60, 250), (500, 90)]
PROMPTS = ["a photo of a red circle", "two dogs left of a bench", "", "\u201ccaf\u00e9\u201d &amp; \U0001f600", "oil painting, 4k " * 30]


def blocks(width, height):
    """Noise in squares of 16 pixels, so that a patch differs from its neighbours."""
    coarse = noise(width // 16 + 1, height // 16 + 1)
    return coarse.repeat(16, 0).repeat(16, 1)[:height, :width]


def checkpoint(folder):
    """The architecture's and the weights' file."""
    architecture = os.path.join(folder, "clip_small.json")
    with open(architecture, "w") as file:
        json.dump(ARCHITECTURE, file)
    open_clip.add_model_config(architecture)
    torch.manual_seed(0)
    model = open_clip.create_model("clip_small", pretrained=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.4)
            if name == "visual.class_embedding":
                parameter.mul_(0.1)
            parameter.copy_(parameter.half().float())
    weights = os.path.join(folder, "clip_small.pt")
    torch.save(model.state_dict(), weights)
    return model.eval(), architecture, weights


def pil_pixels(folder):
    values = np.array(with_pillow(folder, os.path.abspath(__file__)), dtype=np.uint8).reshape(-1, 3, SIZE, SIZE)
    return (torch.from_numpy(values).float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def one_pillow():
    transform = open_clip.image_transform(SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = torch.stack([transform(Image.fromarray(blocks(*sides))) for sides in SIDES])
    return (pixels * 255).round().byte().flatten().tolist()


def all_pixels(pillow12, pillow13, checkout):
    transform, images = hpsv2(checkout), [Image.fromarray(blocks(*sides)) for sides in SIDES]
    # The original fails on a picture whose long edge alone has the very size.
    padded = [image if max(image.size) != SIZE else padding(image, SIZE) for image in images]
    return {
        "pil-bicubic": pil_pixels(pillow12),
        "pil-bicubic-13": pil_pixels(pillow13),
        "hpsv2": torch.stack([hps_pixels(transform, image, SIZE, True) for image in padded]),
        "hpsv2-2023": torch.stack([hps_pixels(transform, image, SIZE, False) for image in padded]),
        "simplear": torch.stack([simplear_pixels(image, SIZE) for image in images]),
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        model, architecture, weights = checkpoint(folder)
        for precision, extra in (("fp32", ["--half-weights"]), ("fp16", ["--precision", "fp16"])):
            command = [sys.executable, os.path.join(EXPORT, "export_clip.py"), "--arch", architecture, "--weights", weights]
            subprocess.run([*command, *extra, "--out", os.path.join(HERE, "clip_small", precision)], check=True)
    ids = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    with torch.inference_mode():
        texts = model.encode_text(ids, normalize=True)
        cosines = {
            mode: [[round(value, 6) for value in row] for row in (model.encode_image(pixels, normalize=True) @ texts.T).tolist()]
            for mode, pixels in all_pixels(*sys.argv[1:]).items()
        }
    with open(os.path.join(HERE, "clip_small.json"), "w") as file:
        json.dump({"sides": SIDES, "prompts": PROMPTS, "cosines": cosines}, file)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(one_pillow()))
    else:
        main()
