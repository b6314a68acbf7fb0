"""The import of a Cosmos tokenizer at its published size, against NVIDIA's own modules; run by hand.

No published weights are needed: NVIDIA's DV8x16x16 gets random ones and is saved as NVIDIA publishes it. `grpo import`
reads encoder.jit with decoder.jit, model.pt and autoencoder.jit, which must give the same bytes. For one picture a
size, the codes, pixels and seconds of NVIDIA's modules in float32 go into the folder, where the bench compares them:

    python policies/tests/cosmos_full_size.py --cosmos FOLDER --grpo target/release/grpo --out full
    cargo bench -p grpo-experiments --bench cosmos -- full

FOLDER is a checkout of NVIDIA's Cosmos-Tokenizer. Written with Python 3.11, torch 2.11.0 and einops 0.8;
16 GB of memory and 3 GB of disk.
"""

import argparse
import copy
import json
import pathlib
import subprocess
import sys
import time
import warnings

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))
from cosmos_nvidia import draw_weights, margin, nvidia, picture, save, video


def timed(run):
    """The result, and the seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def write_case(model, side, folder):
    image = picture(side, side)
    (codes, *_), encode_s = timed(lambda: model.encode(video(image)))
    pixels, decode_s = timed(lambda: model.decode_code(codes))
    image.byte().numpy().tofile(folder / f"{side}.rgb")
    pixels[0, :, 0].permute(1, 2, 0).contiguous().numpy().astype("<f4").tofile(folder / f"{side}.f32")
    case = {"side": side, "codes": codes.flatten().tolist(), "encode_s": encode_s, "decode_s": decode_s}
    (folder / f"{side}.json").write_text(json.dumps(case))
    print(
        f"{side} px: torch encodes in {encode_s:.2f} s, decodes in {decode_s:.2f} s, "
        f"{len(set(case['codes']))} different codes, pixels of deviation {pixels.std():.2f}, "
        f"margin {margin(model, image) if side < 512 else float('nan'):.2g}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cosmos", required=True, help="NVIDIA's Cosmos-Tokenizer")
    parser.add_argument("--grpo", required=True, help="the grpo command")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tokenizer, config = nvidia(args.cosmos)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = tokenizer(**config).eval().to(dtype=torch.float32)
    draw_weights(model)
    published = args.out / "published"
    published.mkdir(parents=True)
    with torch.no_grad():
        save(model, published)
        whole = torch.jit.trace(copy.deepcopy(model), video(picture(32, 32)))
        torch.jit.save(whole.to(torch.bfloat16), str(published / "autoencoder.jit"))
        for name, source in [
            ("tokenizer", [published]),
            ("of_state_dict", ["--model", published / "model.pt"]),
            ("of_autoencoder", ["--model", published / "autoencoder.jit"]),
        ]:
            start = time.perf_counter()
            subprocess.run([args.grpo, "import", "cosmos", *source, "--out", args.out / name], check=True)
            print(f"{name}: imported in {time.perf_counter() - start:.1f} s")
            same = (args.out / name / "model.safetensors").read_bytes()
            assert same == (args.out / "tokenizer" / "model.safetensors").read_bytes()
        for side in args.sides:
            write_case(model, side, args.out)


if __name__ == "__main__":
    main()
