"""Golden bytes of TensorBoard's hparams and layout messages. Run: python board.py > board.json (tensorboard 2.21.0)."""

import json

import tensorboard
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

types = {
    "clip": api_pb2.DATA_TYPE_STRING,
    "kl_weight": api_pb2.DATA_TYPE_FLOAT64,
    "lr": api_pb2.DATA_TYPE_FLOAT64,
    "policy": api_pb2.DATA_TYPE_STRING,
    "resume": api_pb2.DATA_TYPE_BOOL,
}
experiment = api_pb2.Experiment(
    time_created_secs=1.5,
    hparam_infos=[api_pb2.HParamInfo(name=name, type=kind) for name, kind in types.items()],
    metric_infos=[
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in ("reward", "held_out/clip/mean")
    ],
)
experiment.hparam_infos[-1].domain_discrete.extend([False, True])
start = plugin_data_pb2.SessionStartInfo(group_name="seeds", start_time_secs=1.5)
start.hparams["clip"].string_value = "inf"
start.hparams["kl_weight"].number_value = 0.0
start.hparams["lr"].number_value = 1e-5
start.hparams["policy"].string_value = "simplear"
start.hparams["resume"].bool_value = False


def chart(title, *tags):
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))


layout = layout_pb2.Layout(
    category=[
        layout_pb2.Category(title="held out", chart=[chart("held-out means", "held_out/.*/mean$")]),
        layout_pb2.Category(title="training", chart=[chart("reward", "reward$"), chart("policy", "kl$", "entropy$")]),
    ]
)


def end(status):
    return plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=2.5)


data = plugin_data_pb2.HParamsPluginData
success = data(session_end_info=end(api_pb2.STATUS_SUCCESS))
value_metadata = metadata.create_summary_metadata(success)
value_metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
messages = {
    "experiment": data(experiment=experiment),
    "session_start": data(session_start_info=start),
    "session_start_alone": data(session_start_info=plugin_data_pb2.SessionStartInfo(start_time_secs=1.5)),
    "session_success": success,
    "session_failure": data(session_end_info=end(api_pb2.STATUS_FAILURE)),
    "session_end_value": summary_pb2.Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG, metadata=value_metadata, tensor=metadata.NULL_TENSOR
    ),
    "layout": layout,
}
golden = {name: message.SerializeToString(deterministic=True).hex() for name, message in messages.items()}
print(json.dumps({"tensorboard": tensorboard.__version__, **golden}, indent=1))
