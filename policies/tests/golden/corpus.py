"""Small corpora by the programs whose files `grpo_policies::corpus` reads; writes the folder corpus/.

Made with Python 3.11.7, numpy 2.4.6, pyarrow 26.0.1; run `python corpus.py` in this folder.
  00000.tar             by tarfile in the pax format, as webdataset and img2dataset write archives
  32_codes, 32_labels   by numpy, as SimpleAR's extract_token.py writes token folders; the last code is out of range
  table.parquet         by pyarrow, with the columns of Hugging Face's datasets, two rows a row group
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent / "corpus"
# Longer than a header's 100 bytes and not to be split at a slash, so that a pax record has to say it.
LONG = "k" * 120


def archive(path):
    samples = {
        "000000": {
            "jpg": b"picture 0",
            "txt": b"a caption\nof two lines",
            "json": json.dumps({"caption": "no", "long_caption": "a long one", "exif": "{}"}, indent=4).encode(),
        },
        LONG: {"png": b"picture 1", "txt": "un été".encode()},
        "000002": {"webp": b"picture 2", "json": json.dumps({"caption": "from json: \u2603"}).encode()},
        "000003": {"jpg": b"picture 3"},
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples.items():
            for extension, body in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                # A fraction of a second makes a pax record of its own.
                info.mtime = 0.5
                tar.addfile(info, io.BytesIO(body))


def tokens(folder):
    for sub in ["32_codes", "32_labels"]:
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for n in [0, 1, 10]:
        codes = (np.arange(4, dtype=np.int32).reshape(1, 1, 2, 2) + 7 * n) * 900
        np.save(folder / f"32_codes/{n}.npy", codes)
        (folder / f"32_labels/{n}.npy").write_text(f"caption {n}")
    (folder / "32_labels/1.npy").write_text("short\nlong\n")


def table(path):
    pictures = [
        {"bytes": b"picture 0", "path": None},
        {"bytes": b"picture 1", "path": "1.jpg"},
        None,
        {"bytes": b"picture 3", "path": None},
    ]
    columns = {
        "image": pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([1, 2, 3, 4]),
        "caption": ["a", "un été", "b", None],
        "long_caption": [None, "c\nd", None, None],
    }
    pq.write_table(pa.table(columns), path, row_group_size=2, compression="zstd")


HERE.mkdir(exist_ok=True)
archive(HERE / "00000.tar")
tokens(HERE)
table(HERE / "table.parquet")
