"""Golden luma and JPEG sizes for one picture, from Pillow.

Prints the values that `tests/image_rewards.rs` quotes; Pillow 11 or later, run `python image_rewards.py`.
"""

import io

import PIL
from PIL import Image, ImageStat

image = Image.new("RGB", (40, 24))
image.putdata([((7 * x) % 256, (11 * y) % 256, (5 * x * y) % 256) for y in range(24) for x in range(40)])
buffer = io.BytesIO()
image.save(buffer, "JPEG", quality=95, subsampling=0)
red, green, blue = ImageStat.Stat(image).mean
print(PIL.__version__, (0.299 * red + 0.587 * green + 0.114 * blue) / 255, len(buffer.getvalue()) / 1000)
