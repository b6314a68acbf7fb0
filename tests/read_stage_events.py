"""Reads the event files of a pretraining's folder back with the official package.

    python tests/read_stage_events.py RUN

Needs tensorboard; made with 2.21.0.
"""
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0}).Reload()
tags = events.Tags()
for name in ("loss", "loss/image", "loss/text", "validation/nll", "validation/image_nll", "throughput/mfu", "data/wait_share"):
    points = events.Scalars(name)
    assert points and all(point.value == point.value for point in points), name
steps = [point.step for point in events.Scalars("loss")]
assert steps == list(range(len(steps))), steps
pictures = events.Images("panel/validation")
assert [picture.step for picture in pictures] == [0, len(steps)], pictures
assert all(picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 300 for picture in pictures)
assert {"config", "custom_scalars__config__"} <= set(tags["tensors"]), tags["tensors"]
print(f"{len(tags['scalars'])} scalars of {len(steps)} steps, {len(pictures)} panels")
