"""Golden values for `picture::decode`: small files of many kinds, and what Pillow reads in them.

    python tests/golden/decode.py > tests/golden/decode.json

Made with pillow 12.0.0 (libjpeg-turbo 3.1.2) alone. `dropped` is `convert("RGB")`; `onto` is the picture pasted on COLOUR
with itself as the mask. Pictures of 16 bits, which Pillow cannot write and of grey cannot read as RGB, are written here by
hand, and what is expected is the byte that is nearest. `tolerance` is in levels: two sound decoders of JPEG and of lossy
WebP round otherwise.
"""
import io
import json
import random
import struct
import zlib

import PIL
from PIL import Image, ImageDraw

SIZE = (19, 13)
COLOUR = (10, 200, 30)


def base():
    """A ramp and a disc: smooth, since what is tested is the kind of a file and not the decoder."""
    picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize(SIZE) for turn in (0, 90, 180)])
    ImageDraw.Draw(picture).ellipse((3, 2, 12, 9), fill=(200, 60, 90))
    return picture


def alpha():
    return Image.linear_gradient("L").rotate(270).resize(SIZE)


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(colour_type, depth, n_channels, numbers):
    """A PNG of rows without a filter."""
    width, height = SIZE
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    row = width * n_channels
    rows = (numbers[start : start + row] for start in range(0, len(numbers), row))
    data = b"".join(b"\0" + struct.pack(f">{row}H", *numbers) for numbers in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def upright():
    """A JPEG that asks to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(base(), "JPEG", quality=95, exif=exif)


def files():
    rgb, grey = base(), base().convert("L")
    seen = rgb.copy()
    seen.putalpha(alpha())
    few = rgb.quantize(13)
    clear = few.copy()
    clear.info["transparency"] = bytes((index * 37) % 256 for index in range(13))
    grey_seen = Image.merge("LA", (grey, alpha()))
    return [
        ("png rgb", saved(rgb, "PNG"), 0),
        ("png rgba", saved(seen, "PNG"), 0),
        ("png grey", saved(grey, "PNG"), 0),
        ("png grey and alpha", saved(grey_seen, "PNG"), 0),
        ("png palette", saved(few, "PNG"), 0),
        ("png palette with transparency", saved(clear, "PNG", transparency=clear.info["transparency"]), 0),
        ("png one bit", saved(grey.convert("1"), "PNG"), 0),
        ("png rgb with a transparent colour", saved(rgb, "PNG", transparency=(200, 60, 90)), 0),
        ("webp lossless", saved(rgb, "WEBP", lossless=True), 0),
        ("webp lossless with alpha", saved(seen, "WEBP", lossless=True, exact=True), 0),
        ("webp lossy", saved(rgb, "WEBP", quality=95), 12),
        ("webp lossy with alpha", saved(seen, "WEBP", quality=95, exact=True), 12),
        ("jpeg", saved(rgb, "JPEG", quality=95, subsampling="4:4:4"), 4),
        ("jpeg 4:2:0", saved(rgb, "JPEG", quality=95, subsampling="4:2:0"), 8),
        ("jpeg 4:2:2", saved(rgb, "JPEG", quality=95, subsampling="4:2:2"), 8),
        ("jpeg progressive", saved(rgb, "JPEG", quality=95, progressive=True), 8),
        ("jpeg with restarts", saved(rgb, "JPEG", quality=95, restart_marker_blocks=1), 8),
        ("jpeg grey", saved(grey, "JPEG", quality=95), 4),
        ("jpeg rgb", saved(rgb, "JPEG", quality=95, keep_rgb=True), 4),
        ("jpeg cmyk", saved(rgb.convert("CMYK"), "JPEG", quality=95), 4),
        ("jpeg on its side", upright(), 8),
    ]


def read(file):
    """Pixels without transparency, and on the colour."""
    picture = Image.open(io.BytesIO(file))
    ground = Image.new("RGB", picture.size, COLOUR)
    seen = picture.convert("RGBA")
    ground.paste(seen.convert("RGB"), mask=seen.getchannel("A"))
    return picture.convert("RGB").tobytes(), ground.tobytes()


def deep():
    draw = random.Random(0)
    n_pixels = SIZE[0] * SIZE[1]
    numbers = [draw.randrange(1 << 16) for _ in range(3 * n_pixels)]
    nearest = lambda numbers: bytes((number * 255 + 32767) // 65535 for number in numbers)
    yield "png rgb of 16 bits", png(2, 16, 3, numbers), nearest(numbers)
    grey = numbers[:n_pixels]
    yield "png grey of 16 bits", png(0, 16, 1, grey), nearest([number for number in grey for _ in range(3)])


def main():
    cases = [(name, file, *read(file), tolerance) for name, file, tolerance in files()]
    cases += [(name, file, pixels, pixels, 0) for name, file, pixels in deep()]
    rows = [
        {"name": name, "file": file.hex(), "dropped": dropped.hex(), "onto": onto.hex(), "tolerance": tolerance}
        for name, file, dropped, onto, tolerance in cases
    ]
    print(json.dumps({"pillow": PIL.__version__, "size": SIZE, "colour": COLOUR, "cases": rows}))


if __name__ == "__main__":
    main()
