"""What the original programs make of real pictures, for experiments/benches/clip.rs to compare with.

    python rewards/export/check_full_size.py --pillow12 P12 --pillow13 P13 --hpsv2 HPSV2 --out check [--weights FILE]
    cargo bench --bench clip -- check check MODEL

`--weights`, `--hps`, `--arch` and `--seed` are those that MODEL was exported with. P12 and P13 were filled with
`pip install --target FOLDER pillow==12.0.0` (13.0.0); HPSV2 is a checkout of github.com/tgxs002/HPSv2. Needs scikit-image for
its photographs. Writes the pictures, the prompts, their text embeddings and, for each mode, the preprocessed pixels and the
image embeddings, picture by picture, so that it may be stopped and gone on with at any time: what is there is compared.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import open_clip
import torch
from PIL import Image

from export_clip import PREPROCESS, create, side

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden"))

PHOTOS = ["astronaut", "cat", "coffee", "rocket", "colorwheel", "hubble_deep_field", "immunohistochemistry", "retina", "logo"]


def pictures(n, draw):
    """Photographs whole and in crops of every shape, and drawn pictures with edges and noise, the last ones tall; RGB."""
    import skimage

    photos = []
    for name in PHOTOS:
        try:
            photos.append(np.asarray(getattr(skimage.data, name)())[..., :3])
        except Exception as error:  # Some versions fetch some pictures, which may not be possible.
            print(f"without {name}: {type(error).__name__}", flush=True)
    for at in range(n):
        if at < len(photos):
            yield photos[at]
        elif at >= n - n // 25:
            # More than twice as high as wide, and shrinking: where the Pillows differ.
            width = int(draw.integers(240, 400))
            yield drawn(draw, int(draw.uniform(2.2, 3.5) * width), width)
        elif at % 4 == 0:
            yield drawn(draw, *(int(edge) for edge in draw.integers(40, 1100, 2)))
        else:
            photo = photos[at % len(photos)]
            height, width = (int(draw.integers(20, edge + 1)) for edge in photo.shape[:2])
            top, left = (int(draw.integers(0, edge - cut + 1)) for edge, cut in zip(photo.shape[:2], (height, width)))
            yield photo[top : top + height, left : left + width]


def drawn(draw, height, width):
    pixels = np.broadcast_to(draw.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)).copy()
    for _ in range(12):
        (top, bottom), (left, right) = (np.sort(draw.integers(0, edge, 2)) for edge in (height, width))
        pixels[top : bottom + 1, left : right + 1] = draw.integers(0, 256, 3, dtype=np.uint8)
    pixels[: height // 5] = draw.integers(0, 256, (height // 5, width, 3), dtype=np.uint8)
    return pixels


def prompts(n, draw):
    things = ["a cat", "an astronaut", "two red apples", "a cup of coffee", "a rocket", "a blue bench left of a dog", "an eye"]
    styles = ["a photo of", "an oil painting of", "A blurry picture of", "the logo of", "4k, highly detailed:", "\u201cart\u201d of"]
    places = ["on the moon", "in a caf\u00e9", "at night", "under water", "&amp; a tree", "\U0001f600", "seen from above"]
    every = [f"{style} {thing} {place}" for style in styles for thing in things for place in places]
    return [every[at] for at in draw.permutation(len(every))[:n]]


def pil_pixels(folder, names, size):
    """open_clip's own transform under the Pillow of that folder."""
    command = [sys.executable, os.path.abspath(__file__), "--pixels", str(size), *names]
    environment = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return torch.from_numpy(np.frombuffer(done.stdout, dtype=np.float32).reshape(len(names), 3, size, size).copy())


def print_pixels(size, names):
    transform = open_clip.image_transform(size, is_train=False)
    for name in names:
        sys.stdout.buffer.write(transform(Image.open(name)).numpy().tobytes())


def all_pixels(args, names, size):
    """`[N, 3, S, S]` of each mode."""
    from clip_preprocess import hps_pixels, hpsv2, simplear_pixels

    transform, images = hpsv2(args.hpsv2), [Image.open(name).convert("RGB") for name in names]
    return {
        "pil-bicubic": pil_pixels(args.pillow12, names, size),
        "pil-bicubic-13": pil_pixels(args.pillow13, names, size),
        "hpsv2": torch.stack([hps_pixels(transform, image, size, True) for image in images]),
        "hpsv2-2023": torch.stack([hps_pixels(transform, image, size, False) for image in images]),
        "simplear": torch.stack([simplear_pixels(image, size) for image in images]),
    }


@torch.inference_mode()
def embed(model, pixels, embed_dim, out):
    """Appends one embedding a picture to each mode's file; equal pixels of two modes are embedded once."""
    paths = {mode: os.path.join(out, f"{mode}.f32") for mode in pixels}
    done = min(os.path.getsize(path) if os.path.exists(path) else 0 for path in paths.values()) // (4 * embed_dim)
    for path in paths.values():
        # An interrupted picture is in some files only.
        with open(path, "ab") as file:
            file.truncate(done * 4 * embed_dim)
    for at in range(done, len(next(iter(pixels.values())))):
        rows = torch.stack([mode[at] for mode in pixels.values()])
        distinct, which = torch.unique(rows, dim=0, return_inverse=True)
        started = time.time()
        embedded = model.encode_image(distinct, normalize=True)[which].numpy()
        for mode, row in zip(pixels, embedded):
            with open(paths[mode], "ab") as file:
                file.write(row.tobytes())
        print(f"{at + 1} pictures, {(time.time() - started) / len(distinct):.1f} s each", flush=True)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="ViT-H-14")
    parser.add_argument("--weights")
    parser.add_argument("--hps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pillow12", required=True)
    parser.add_argument("--pillow13", required=True)
    parser.add_argument("--hpsv2", required=True)
    parser.add_argument("-n", type=int, default=100, help="pictures and prompts")
    parser.add_argument("--modes", nargs="+", choices=PREPROCESS, default=PREPROCESS, help="to embed pictures in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def prepare(args, model, source):
    """The pictures, the prompts and what need not be stopped; `check.json` comes last."""
    os.makedirs(args.out, exist_ok=True)
    draw = np.random.default_rng(0)
    names = [os.path.join(args.out, f"{at:03}.png") for at in range(args.n)]
    for name, pixels in zip(names, pictures(args.n, draw)):
        Image.fromarray(pixels).save(name)
    texts = prompts(args.n, draw)
    pixels = all_pixels(args, names, side(model))
    for mode, values in pixels.items():
        values.numpy().tofile(os.path.join(args.out, f"{mode}.pixels"))
    ids = open_clip.get_tokenizer(source["architecture"])(texts)
    with torch.inference_mode():
        embedded = torch.cat([model.encode_text(chunk, normalize=True) for chunk in ids.split(10)])
    embedded.numpy().tofile(os.path.join(args.out, "texts.f32"))
    with open(os.path.join(args.out, "check.json"), "w") as file:
        shape = {"n": args.n, "size": side(model), "embed_dim": embedded.shape[1]}
        json.dump({**shape, "modes": list(pixels), "prompts": texts, "source": source}, file)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    model, source = create(args.arch, args.weights, args.hps, args.seed)
    path = os.path.join(args.out, "check.json")
    if not os.path.exists(path):
        prepare(args, model, source)
    with open(path) as file:
        check = json.load(file)
    if check["source"] != source:
        raise SystemExit(f"{args.out} was begun with {check['source']}; this is {source}, so name another folder")
    shape = (check["n"], 3, check["size"], check["size"])
    read = lambda mode: np.fromfile(os.path.join(args.out, f"{mode}.pixels"), dtype=np.float32).reshape(shape)
    embed(model, {mode: torch.from_numpy(read(mode)) for mode in args.modes}, check["embed_dim"], args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pixels"]:
        print_pixels(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
