"""Exports a full-size open_clip model, or HPSv2 on top of it, as the folder that `ClipReward::load` reads.

    python rewards/export/export_clip.py --arch ViT-H-14 --weights laion2b_s32b_b79k --out clip-vit-h
    python rewards/export/export_clip.py --hps HPS_v2.1_compressed.pt --preprocess tensor_antialias --name hps --out hps

Needs torch, open_clip_torch 3.3, onnx and onnxruntime, and about 6 GB of memory for ViT-H-14. `--weights` is an open_clip
tag (fetched from its hub) or a file; without it the weights are random, which is only good for a test. HPSv2's file holds
open_clip's own keys in f16. Weights above 2 GB cannot lie in the .onnx file itself; they go into one data file beside it,
and both must be moved together.
"""
import argparse
import json
import os
import tempfile

import numpy as np
import onnx
import open_clip
import torch
from torch import nn

from export_onnx import CONTEXT, declare_shape, export_tower, largest_difference, versions, write_sidecar


class Images(nn.Module):
    """The image tower alone, normalised."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.encode_image(pixel_values, normalize=True)


class Texts(nn.Module):
    """The text tower alone, normalised."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model.encode_text(input_ids, normalize=True)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="ViT-H-14", help="open_clip architecture, or a JSON file that describes one")
    parser.add_argument("--weights", help="open_clip tag or checkpoint file")
    parser.add_argument("--hps", help="HPSv2 checkpoint, loaded over the architecture")
    parser.add_argument("--preprocess", default="pil_u8", choices=["pil_u8", "tensor_antialias", "tensor_no_antialias"])
    parser.add_argument("--name", default="clip", help="the reward's name in logs")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def load(args):
    if args.arch.endswith(".json"):
        open_clip.add_model_config(args.arch)
        args.arch = os.path.splitext(os.path.basename(args.arch))[0]
    torch.manual_seed(0)
    model = open_clip.create_model(args.arch, pretrained=args.weights)
    if args.hps:
        state = torch.load(args.hps, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict(state)
    model = model.float().eval()
    mean = np.array(model.visual.image_mean or open_clip.OPENAI_DATASET_MEAN)
    if np.abs(mean - np.array(open_clip.OPENAI_DATASET_MEAN)).max() > 1e-6:
        raise SystemExit(f"{args.arch} normalises with mean {mean}; ClipReward knows CLIP's own mean only")
    if model.context_length != CONTEXT:
        raise SystemExit(f"{args.arch} has a context of {model.context_length}; ClipReward makes {CONTEXT} ids")
    return model


def export(tower, example, ports, embed_dim, path):
    """Exports beside many loose weight files, then gathers them in one data file (none for a small model)."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as loose:
        raw = os.path.join(loose, "model.onnx")
        export_tower(tower, example, *ports, raw)
        declare_shape(raw, embed_dim)
        model = onnx.load(raw)
    n_bytes = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    data = os.path.basename(path) + "_data"
    external = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": data, "size_threshold": 1024}
    onnx.save_model(model, path, **(external if n_bytes > 1.5e9 else {}))
    del model
    difference = largest_difference(tower, path, ports[0], example)
    print(f"{path}: {n_bytes / 1e6:.1f} MB of weights, largest difference from torch {difference:.1e}")
    return difference


def main():
    args = arguments()
    model = load(args)
    os.makedirs(args.out, exist_ok=True)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = open_clip.get_tokenizer(args.arch)(["a red bicycle next to a blue house", "a cat"])
    with torch.no_grad():
        embed_dim = model.encode_text(ids).shape[1]
    parity = {
        "image.onnx": export(Images(model), pixels, ("pixel_values", "image_embeds"), embed_dim, os.path.join(args.out, "image.onnx")),
        "text.onnx": export(Texts(model), ids, ("input_ids", "text_embeds"), embed_dim, os.path.join(args.out, "text.onnx")),
    }
    fields = {
        "name": args.name, "image_size": size, "context": CONTEXT, "preprocess": args.preprocess, "embed_dim": embed_dim,
        "logit_scale": round(model.logit_scale.exp().item(), 4),
    }
    provenance = {
        "architecture": args.arch, "weights": args.weights or "random", "hps": args.hps and os.path.basename(args.hps),
        "parity_with_torch": parity, "versions": {**versions(), "open_clip": open_clip.__version__},
    }
    write_sidecar(args.out, fields, provenance)
    print(json.dumps(fields))


if __name__ == "__main__":
    main()
