"""Runs the guide's program over a folder of tokens: what it reads must be what the manifest and a row's checksum say.

    python tests/read_tokens.py TOKENS src/docs/train_on_your_images.md

Needs numpy, safetensors and crc32c; made with numpy 2.4.6, safetensors 0.8.0, crc32c 2.8.
"""
import pathlib
import sys

import crc32c

tokens, guide = map(pathlib.Path, sys.argv[1:])
program = guide.read_text().split("```python\n")[1].split("```")[0].replace("emoji/tokens", str(tokens))
read = {}
exec(program, read)

manifest, codes, captions, last = (read[name] for name in ("manifest", "codes", "captions", "tensors"))
assert manifest["complete"] and sum(shard["rows"] for shard in manifest["shards"]) == manifest["n_rows"] > 0
assert codes.shape == (manifest["shards"][-1]["rows"], *manifest["grid"]) and codes.max() < manifest["n_codes"]
assert len(captions) == len(codes) and all(lines[0] for lines in captions), captions[:3]
for row, (image, lines) in enumerate(zip(codes, captions)):
    check = crc32c.crc32c("\n".join(lines).encode(), crc32c.crc32c(image.astype("<u2").tobytes()))
    assert check == last["checks"][row], f"row {row}: {check:08x}"
print(f"{len(codes)} rows of the last shard read, such as {captions[0]}")
