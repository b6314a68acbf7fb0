"""The image tower in torch as one contender of experiments/benches/clip.rs, which starts it and speaks to it in lines.

    python rewards/export/torch_tower.py CHECK fp32|bf16|products-fp32|products-bf16 THREADS

CHECK is what check_full_size.py made, from random weights of ViT-H-14. `products-` is the floor: the matrix products with the
tower's weights, without attention and the rest. It says `ready`, and to each line with a batch size answers with the seconds
and the processor's seconds that the batch took, open_clip's own preprocessing included, and its embeddings' largest difference
and largest 1 - cosine from the f32 ones in CHECK; products have none and answer with zeros.
"""
import json
import os
import sys
import time

import numpy as np
import open_clip
import torch
from PIL import Image

from export_clip import create

MODE = "pil-bicubic"
MAX_BATCH = 8


def embed(tower, pixels):
    return torch.nn.functional.normalize(tower(pixels).float(), dim=-1).numpy()


def weights(tower):
    """Of every product, its transposed weight and how many rows an image brings to it."""
    n_patches = tower.grid_size[0] * tower.grid_size[1]
    found = [(tower.conv1.weight.flatten(1), n_patches), (tower.proj.T, 1)]
    for block in tower.transformer.resblocks:
        attention = block.attn
        matrices = [attention.in_proj_weight, attention.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]
        found += [(matrix, n_patches + 1) for matrix in matrices]
    return [(matrix.detach(), rows) for matrix, rows in found]


def multiply(weights, pixels):
    shapes = {(n * len(pixels), matrix.shape[1]) for matrix, n in weights}
    rows = {shape: torch.ones(shape, dtype=pixels.dtype) for shape in shapes}
    for matrix, n in weights:
        torch.nn.functional.linear(rows[n * len(pixels), matrix.shape[1]], matrix)


def main():
    folder, what, threads = sys.argv[1:]
    precision = what.removeprefix("products-")
    torch.set_num_threads(int(threads))
    with open(os.path.join(folder, "check.json")) as file:
        check = json.load(file)
    source = check["source"]
    if source["weights"] != "random":
        raise SystemExit(f"the weights are {source['weights']}; speed is compared with random ones")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tower = create(source["architecture"], seed=source["seed"])[0].visual.to(dtype).eval()
    answer = embed
    if what != precision:
        tower, answer = weights(tower), multiply
    size = check["size"]
    transform = open_clip.image_transform(size, is_train=False)
    images = [Image.open(os.path.join(folder, f"{at:03}.png")).convert("RGB") for at in range(MAX_BATCH)]
    exact = np.fromfile(os.path.join(folder, f"{MODE}.f32"), dtype=np.float32).reshape(-1, check["embed_dim"])
    print("ready", flush=True)
    for line in sys.stdin:
        n = int(line)
        started, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            embedded = answer(tower, torch.stack([transform(image) for image in images[:n]]).to(dtype))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        embedded = exact[:n] if embedded is None else embedded  # products alone
        cosines = (embedded.astype(np.float64) * exact[:n]).sum(1)
        print(json.dumps([seconds, cpu, float(np.abs(embedded - exact[:n]).max()), float((1 - cosines).max())]), flush=True)


if __name__ == "__main__":
    main()
