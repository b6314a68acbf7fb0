"""The image tower in torch as one contender of experiments/benches/clip.rs, which starts it and speaks to it in lines.

    python rewards/export/torch_tower.py CHECK fp32|bf16 THREADS

CHECK is what check_full_size.py made, from random weights of ViT-H-14 or from a checkpoint that lies where it lay. It says
`ready`, and to each line with a batch size answers with the seconds and the processor's seconds that the batch took, and its
embeddings' largest difference and largest 1 - cosine from the f32 ones in CHECK.
"""
import json
import os
import sys
import time

import numpy as np
import torch

from export_clip import create

MODE = "pil-bicubic"


def main():
    folder, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with open(os.path.join(folder, "check.json")) as file:
        check = json.load(file)
    source = check["source"]
    if source["weights"] != "random":
        raise SystemExit(f"the weights are {source['weights']}; speed is compared with random ones")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tower = create(source["architecture"], seed=source["seed"])[0].visual.to(dtype).eval()
    size = check["size"]
    pixels = np.fromfile(os.path.join(folder, f"{MODE}.pixels"), dtype=np.float32).reshape(-1, 3, size, size)
    exact = np.fromfile(os.path.join(folder, f"{MODE}.f32"), dtype=np.float32).reshape(-1, check["embed_dim"])
    print("ready", flush=True)
    for line in sys.stdin:
        n = int(line)
        started, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            values = tower(torch.from_numpy(pixels[:n]).to(dtype)).float()
            embedded = torch.nn.functional.normalize(values, dim=-1).numpy()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        cosines = (embedded.astype(np.float64) * exact[:n]).sum(1)
        print(json.dumps([seconds, cpu, float(np.abs(embedded - exact[:n]).max()), float((1 - cosines).max())]), flush=True)


if __name__ == "__main__":
    main()
