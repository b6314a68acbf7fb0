"""Exports a full-size open_clip model, or HPSv2 on top of it, as the folder that `ClipReward::load` reads.

    python rewards/export/export_clip.py --weights open_clip_pytorch_model.bin --out clip-vit-h
    python rewards/export/export_clip.py --hps HPS_v2.1_compressed.pt --preprocess hpsv2 --name hps --out hps

Needs torch, open_clip_torch 3.3, onnx and onnxruntime, and about 6 GB of memory for ViT-H-14. `--weights` is a checkpoint
file (.pt, .bin, .safetensors; nothing is fetched) or an open_clip tag such as laion2b_s32b_b79k, which open_clip fetches;
without either the weights are random, which is only good for a test. HPSv2's file holds open_clip's own keys in f16.
Weights above 2 GB cannot lie in the .onnx file itself; they go into one data file beside it, and both must be moved
together. On a CPU f16 is no faster than f32; it halves the files and is made for GPUs.
"""
import argparse
import os
import shlex
import sys

import numpy as np
import open_clip
import torch
from torch import nn

from export_onnx import CONTEXT, round_to_half, sha256, write_clip

PREPROCESS = ["pil-bicubic", "pil-bicubic-13", "hpsv2", "hpsv2-2023", "simplear"]
# The published checkpoints of HPSv2, by the beginning and end of their sha256. A file named HPS_v2_1.pt is about that holds v2.0.
HPS_VERSIONS = {("07cb0d20", "1a1"): "v2.0", ("c57a38fb", "837"): "v2.1"}


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
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", help="checkpoint file, or open_clip tag")
    weights.add_argument("--hps", help="HPSv2 checkpoint of the architecture, v2.0 or v2.1")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--half-weights", action="store_true", help="round weights to f16 and store them so, computing in f32")
    parser.add_argument("--preprocess", default="pil-bicubic", choices=PREPROCESS)
    parser.add_argument("--name", default="clip", help="the reward's name in logs")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.half_weights and args.precision == "fp16":
        parser.error("--half-weights computes in f32; leave it out, or choose --precision fp32")
    return args


def create(arch, weights=None, hps=None, seed=0):
    """The open_clip model in f32, and what is known of its weights."""
    if arch.endswith(".json"):
        open_clip.add_model_config(arch)
        arch = os.path.splitext(os.path.basename(arch))[0]
    torch.manual_seed(seed)
    model = open_clip.create_model(arch, pretrained=weights)
    source = {"architecture": arch, "weights": weights and os.path.basename(weights)}
    if weights and os.path.isfile(weights):
        source["weights_sha256"] = sha256(weights)
    elif hps:
        model.load_state_dict(torch.load(hps, map_location="cpu", weights_only=True)["state_dict"])
        source |= {"weights": os.path.basename(hps), "weights_sha256": (checksum := sha256(hps))}
        known = [name for (start, end), name in HPS_VERSIONS.items() if checksum.startswith(start) and checksum.endswith(end)]
        source["hps_version"] = known[0] if known else "unknown; not a published file"
        print(f"{hps}: sha256 {checksum}, HPSv2 version {source['hps_version']}", flush=True)
    elif not weights:
        source |= {"weights": "random", "seed": seed}
    model = model.float().eval()
    check(model, arch)
    return model, source


def check(model, arch):
    """That the Rust side's normalisation and tokenizer are those of the model."""
    for name, ours in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
        theirs = getattr(model.visual, f"image_{name}") or ours
        if np.abs(np.array(theirs) - np.array(ours)).max() > 1e-6:
            raise SystemExit(f"{arch} normalises with {name} {theirs}; ClipReward knows CLIP's own {name} only")
    if model.context_length != CONTEXT or model.vocab_size != 49408:
        size = f"a context of {model.context_length} and a vocabulary of {model.vocab_size}"
        raise SystemExit(f"{arch} has {size}; ClipReward's tokenizer has {CONTEXT} and 49408")


def side(model):
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]


def main():
    args = arguments()
    model, source = create(args.arch, args.weights, args.hps, args.seed)
    if args.half_weights:
        round_to_half(model)
    pixels = torch.randn(2, 3, side(model), side(model), generator=torch.Generator().manual_seed(0))
    ids = open_clip.get_tokenizer(source["architecture"])(["a red bicycle next to a blue house", "a cat"])
    with torch.no_grad():
        embed_dim = model.encode_text(ids).shape[1]
    clip = {
        "image_size": side(model), "preprocess": args.preprocess, "embed_dim": embed_dim,
        "logit_scale": round(model.logit_scale.exp().item(), 4),
        "precision": "half_weights" if args.half_weights else args.precision,
    }
    # Files are named without their folders, which say something about one machine only.
    given = [os.path.basename(word) for word in sys.argv]
    provenance = {"command": shlex.join(given), **source, "versions": {"open_clip": open_clip.__version__}}
    write_clip([(Images(model), pixels), (Texts(model), ids)], args.out, args.name, clip, provenance)


if __name__ == "__main__":
    main()
