"""Reads a run's event file with the official tensorboard package (2.21.0) and compares it with metrics.jsonl.

Run: python read_events.py RUN_FOLDER. Fails where a scalar is missing or differs, a logged step has no panel, or the run
lacks a number, picture or text of src/docs/metrics.md that a run of two rewards with a watched one has.
"""

import json
import re
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

# Every number of the page but those of options that the miniature has not on, and of samples that end by themselves.
OFF = {"resampled_groups", "policy_loss", "cispo_clip_ratio", "completions/clipped_ratio"}
OFF |= {"excluded/samples", "excluded/groups", "rewards/{name}/failed", "held_out/excluded"}
OFF |= {f"completions/{which}_terminated_length" for which in ("mean", "min", "max")}
page = (Path(__file__).parent.parent / "src/docs/metrics.md").read_text().split("## Pictures")[0]
rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
patterns = {name for row in rows for name in row.split("`")[1::2]} - OFF
patterns = {name for name in patterns if not name.startswith("sampling/importance_sampling_ratio/")}
for pattern in sorted(patterns):
    regex = re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(pattern)))
    assert any(regex.fullmatch(tag) for tag in tags["scalars"]), f"the run logged no {pattern}"

panels = events.Images("panel/train")
steps = {int(folder.name.removeprefix("step-")) for folder in (run / "samples").glob("step-*")}
assert steps and steps == {e.step for e in panels}, f"panels at {[e.step for e in panels]}, samples at {steps}"
for e in panels:
    assert e.encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n" and e.width > e.height > 0
assert {e.step for e in events.Images("panel/held_out")} >= {0}
assert {e.step for e in events.Images("panel/before_after")}, "no picture of before and after"
assert events.Images("maps/entropy") and events.Images("maps/advantage")
samples = events.Tensors("samples")[0].tensor_proto.string_val[0].decode()
assert samples.startswith("| prompt | draw | sample | reward |"), samples[:80]
assert events.Histograms("reward") and events.Histograms("advantage")
config = events.Tensors("config/text_summary" if "config/text_summary" in tags["tensors"] else "config")
assert b"[rollout]" in config[0].tensor_proto.string_val[0]
print(
    f"tensorboard reads {n_scalars} scalars of {len(tags['scalars'])} names, {len(patterns)} of the page's, "
    f"{len(panels)} panels, maps, text and histograms"
)
