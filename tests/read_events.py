"""Reads a run's event file with the official tensorboard package (2.21.0) and compares it with metrics.jsonl.

Run: python read_events.py RUN_FOLDER. Fails where a scalar is missing or differs, or a logged step has no panel.
"""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = Path(sys.argv[1])
events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
events.Reload()
tags = events.Tags()

n_scalars = 0
for line in (run / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    for name, value in row.items():
        if name in ("step", "kind"):
            continue
        found = [e.value for e in events.Scalars(name) if e.step == row["step"]]
        as_f32 = struct.unpack("f", struct.pack("f", value))[0]
        assert as_f32 in found, f"{name} at step {row['step']}: {value} was logged, TensorBoard reads {found}"
        n_scalars += 1

panels = events.Images("panel/train")
steps = {int(folder.name.removeprefix("step-")) for folder in (run / "samples").glob("step-*")}
assert steps and steps == {e.step for e in panels}, f"panels at {[e.step for e in panels]}, samples at {steps}"
for e in panels:
    assert e.encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n" and e.width > e.height > 0
assert {e.step for e in events.Images("panel/held_out")} >= {0}
assert events.Histograms("reward") and events.Histograms("advantage")
config = events.Tensors("config/text_summary" if "config/text_summary" in tags["tensors"] else "config")
assert b"[rollout]" in config[0].tensor_proto.string_val[0]
print(f"tensorboard reads {n_scalars} scalars of {len(tags['scalars'])} names, {len(panels)} panels, text and histograms")
