"""Reads the hyper-parameters and chart layout of a folder of runs with the official tensorboard package (2.21.0).

Run: python read_hparams.py LOGDIR. Fails where a run has no row, a column is missing in a run, or a chart is empty.
"""

import re
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

logdir = Path(sys.argv[1])
runs = {}
for folder in sorted({file.parent for file in logdir.rglob("events.out.tfevents.*")}):
    runs[str(folder.relative_to(logdir))] = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
assert runs, f"no event file below {logdir}"
scalars = {name: set(events.Tags()["scalars"]) for name, events in runs.items()}
every_scalar = set().union(*scalars.values())

columns = {}
for name, events in runs.items():
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.start_time_secs > 0 and start.hparams
    declared = {info.name for info in experiment.hparam_infos}
    assert declared == set(start.hparams), f"{name} declares {declared} and has {set(start.hparams)}"
    metrics = [info.name.tag for info in experiment.metric_infos]
    columns[name] = (declared, metrics)
    assert metrics and set(metrics) <= every_scalar, f"{name} never logged {set(metrics) - every_scalar}"
    missing = set(metrics) - scalars[name]
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    print(f"{name}: {values}, group {start.group_name!r}, {len(metrics)} metrics, empty cells {sorted(missing)}")

    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert charts and all(category.title for category in layout.category)
    for chart in charts:
        for tag in chart.multiline.tag:
            assert any(re.match(tag, scalar) for scalar in every_scalar), f"{chart.title}: no scalar matches {tag}"
# TensorBoard takes the columns from one run alone.
first = next(iter(columns.values()))
assert all(column == first for column in columns.values()), f"the runs differ in their columns: {columns}"
print(f"tensorboard reads {len(runs)} rows of {len(first[0])} hyper-parameters, {len(charts)} charts")
