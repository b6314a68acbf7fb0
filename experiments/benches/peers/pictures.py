"""Pillow as the peer of experiments/benches/pictures.rs, which starts it and speaks to it in lines.

    python pictures.py make FOLDER      writes the pictures
    python pictures.py crop FOLDER WIDTHxHEIGHT SIDE plain|kept

A lap decodes the pictures of that size in FOLDER and crops them by the steps of SimpleAR's `center_crop_arr` (the cut is
Pillow's own, which is faster than by way of numpy); it tells the seconds of processor time for one picture, the mean of each
channel of the first, and the seconds of both parts by the wall clock.

`plain` is Python as it is started: what a picture has taken is returned to the system, and taken anew page by page for the
next one. `kept` tells the C library to keep it, which Pillow's own PILLOW_BLOCKS_MAX does only in part. pillow is all that
is needed.
"""
import io
import itertools
import os
import pathlib
import random
import sys
import time

from PIL import Image, ImageDraw, ImageStat

from protocol import Channel

# Read by the C library when a process starts.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
SIZES = [(1024, 1024), (2048, 2048), (1365, 1024)]
N_PICTURES = 4
# So many pixels are decoded in a lap.
PIXELS = 24 << 20


def photo(seed, width, height):
    """Like a photograph to an encoder: a smooth ground, edges, and noise of every octave, weaker the finer it is."""
    draw = random.Random(seed)
    side = max(width, height)

    def grid(n):
        return Image.frombytes("RGB", (n, n), draw.randbytes(3 * n * n)).resize((side, side), Image.Resampling.BICUBIC)

    picture = grid(3)
    pen = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, radius = draw.randrange(side), draw.randrange(side), draw.randrange(side // 40, side // 6)
        colour = tuple(draw.randrange(256) for _ in range(3))
        draw.choice([pen.ellipse, pen.rectangle])((x - radius, y - radius, x + radius, y + radius), fill=colour)
    n, share = 8, 0.4
    while n <= side:
        picture = Image.blend(picture, grid(n), share)
        n, share = 2 * n, 0.74 * share
    return picture.crop((0, 0, width, height))


def make(folder):
    for width, height in SIZES:
        for seed in range(N_PICTURES):
            name = f"{width}x{height}_{seed}.jpg"
            photo(seed, width, height).save(folder / name, quality=92, subsampling="4:2:0")


def center_crop(picture, size):
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


def processor_seconds():
    """What the kernel has counted of this thread's time on a processor: the bench's own clock."""
    return int(pathlib.Path("/proc/thread-self/schedstat").read_text().split()[0]) / 1e9


def crop(folder, size, side, memory):
    if memory == "kept" and not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})
    channel = Channel()
    channel.imported()
    files = [path.read_bytes() for path in sorted(folder.glob(f"{size}_*.jpg"))]
    width, height = map(int, size.split("x"))
    n_pictures = max(len(files), PIXELS // (width * height))
    channel.say("ready")
    while channel.wait():
        started = processor_seconds()
        decoding, cropping, value = 0.0, 0.0, None
        for file in itertools.islice(itertools.cycle(files), n_pictures):
            before = time.perf_counter()
            picture = Image.open(io.BytesIO(file)).convert("RGB")
            between = time.perf_counter()
            picture = center_crop(picture, int(side))
            cropping += (time.perf_counter() - between) / n_pictures
            decoding += (between - before) / n_pictures
            value = value or ImageStat.Stat(picture).mean
        channel.lap((processor_seconds() - started) / n_pictures, [*value, decoding, cropping])


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    {"make": make, "crop": crop}[mode](pathlib.Path(folder), *rest)
