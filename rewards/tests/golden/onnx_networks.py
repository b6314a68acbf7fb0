"""The tiny networks of `onnx/`, and what ONNX Runtime's Python package makes of them.

Run in this folder: `python onnx_networks.py`. Writes `onnx/` and `onnx_networks.json`. Each folder below `onnx/` is a reward
of one kind that `reward.toml` can describe; its pictures are prepared by Pillow, torchvision and torch, its texts by open_clip
and tokenizers, and its score is computed here from the networks' outputs.
"""

import hashlib
import json
import os

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import PIL
import tokenizers
import torch
import torchvision
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms import InterpolationMode

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "onnx")


def save(path, nodes, inputs, outputs, constants=()):
    """A checked model; `inputs` and `outputs` are (name, element, shape)."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="grpo")
    model.ir_version = 8
    onnx.checker.check_model(model)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    onnx.save(model, path)


def run(path, feed):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed)))


def ports():
    """Every kind of port a session converts: four inputs, four outputs, one of which nobody asks for."""
    path = os.path.join(FOLDER, "ports.onnx")
    save(
        path,
        [
            helper.make_node("Cast", ["ids"], ["ids16"], to=T.FLOAT16),
            helper.make_node("Cast", ["mask"], ["mask16"], to=T.FLOAT16),
            helper.make_node("Cast", ["bytes"], ["bytes16"], to=T.FLOAT16),
            helper.make_node("Add", ["halves", "ids16"], ["shifted"]),
            helper.make_node("Mul", ["shifted", "mask16"], ["kept"]),
            helper.make_node("Sub", ["kept", "bytes16"], ["mixed"]),
            helper.make_node("ArgMax", ["mixed"], ["best"], axis=1, keepdims=0),
            helper.make_node("Less", ["mixed", "zero"], ["negative"]),
            helper.make_node("Identity", ["mixed"], ["unwanted"]),
        ],
        [
            ("halves", T.FLOAT16, ["batch", 3]),
            ("ids", T.INT32, ["batch", 3]),
            ("mask", T.BOOL, ["batch", 3]),
            ("bytes", T.UINT8, ["batch", 3]),
        ],
        [
            ("mixed", T.FLOAT16, ["batch", 3]),
            ("best", T.INT64, ["batch"]),
            ("negative", T.BOOL, ["batch", 3]),
            ("unwanted", T.FLOAT16, ["batch", 3]),
        ],
        [("zero", np.zeros(1, np.float16))],
    )
    halves = np.array([[0.1, -2.5, 7.0], [3.3333, 0.0, -1.0]], np.float32)
    ids = np.array([[1, 2, 3], [-4, 5, 6]], np.int64)
    mask = np.array([[1, 0, 1], [1, 1, 0]], np.int64)
    octets = np.array([[0, 3, 255], [1, 2, 4]], np.uint8)
    given = {"halves": halves, "ids": ids, "mask": mask, "bytes": octets}
    stored = {
        "halves": halves.astype(np.float16),
        "ids": ids.astype(np.int32),
        "mask": mask.astype(bool),
        "bytes": octets,
    }
    made = run(path, stored)
    return {
        "inputs": {name: value.ravel().tolist() for name, value in given.items()},
        "outputs": {name: made[name].astype(np.float32).ravel().tolist() for name in ("mixed", "best", "negative")},
    }


def external():
    """Weights in a second file, as every tower above 2 GB has them."""
    path = os.path.join(FOLDER, "external.onnx")
    x, y = [(name, T.FLOAT, ["batch", 3]) for name in "xy"]
    save(path, [helper.make_node("Add", ["x", "w"], ["y"])], [x], [y], [("w", np.array([0.5, -2, 0.25], np.float32))])
    data = os.path.join(FOLDER, "external.data")
    if os.path.exists(data):
        os.remove(data)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="external.data", size_threshold=0)
    os.chmod(data, 0o644)


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PICTURES = [(20, 12), (12, 15), (8, 8), (31, 30)]
PROMPTS = [
    {"text": "a red circle", "class": "crane"},
    {"text": "Two blue squares, & a star!", "class": 2},
    {"text": "a " * 90 + "star", "class": "Bald Eagle"},
]
LABELS = ["tench", "crane", "bald eagle", "heron", "heron"]


def patterned(width, height):
    """As `patterned` of `tests/clip.rs`."""
    y, x = np.mgrid[:height, :width]
    base = 3 * x * x + 5 * y * y + 7 * x * y
    return Image.fromarray(np.stack([(base + shift) % 256 for shift in (0, 40, 80)], -1).astype(np.uint8))


def weights(seed, *shape):
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def layer(path, source, shape, weight, result):
    """One matrix: `source` of this shape, flattened, to `result`."""
    nodes = [helper.make_node("Flatten", [source], ["flat"]), helper.make_node("MatMul", ["flat", "w"], [result])]
    save(path, nodes, [(source, T.FLOAT, shape)], [(result, T.FLOAT, ["batch", weight.shape[1]])], [("w", weight)])


def of_ids(path, ids, length, weight, result):
    nodes = [helper.make_node("Cast", [ids], ["floats"], to=T.FLOAT), helper.make_node("MatMul", ["floats", "w"], [result])]
    save(path, nodes, [(ids, T.INT64, ["batch", length])], [(result, T.FLOAT, ["batch", weight.shape[1]])], [("w", weight)])


def manifest(name, scorer, stages, files):
    folder = os.path.join(FOLDER, name)
    lines = ["format = 1", f'name = "{name}"', "[scorer.network]", 'precision = "fp32"', *scorer]
    for file, inputs, outputs in stages:
        lines += ["[[scorer.network.stages]]", f'file = "{file}"', f"inputs = {inputs}", f"outputs = {outputs}"]
    lines.append("[files]")
    for file in files:
        with open(os.path.join(folder, file), "rb") as data:
            lines.append(f'"{file}" = "{hashlib.sha256(data.read()).hexdigest()}"')
    lines += ["[provenance]", 'command = "rewards/tests/golden/onnx_networks.py"']
    with open(os.path.join(folder, "reward.toml"), "w") as file:
        file.write("\n".join(lines) + "\n")


def scores(judge):
    """One row a prompt, one column a picture."""
    return [[float(judge(prompt, patterned(*size))) for size in PICTURES] for prompt in PROMPTS]


def normalised(tensor, mean, std):
    return ((tensor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).numpy()[None]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def pair():
    """Two towers and a scaled cosine, as PickScore."""
    folder = os.path.join(FOLDER, "pair")
    layer(f"{folder}/image.onnx", "pixel_values", ["batch", 3, 8, 8], weights(0, 192, 4), "image_embeds")
    of_ids(f"{folder}/text.onnx", "input_ids", 77, weights(1, 77, 4), "text_embeds")
    manifest(
        "pair",
        [
            'picture = { named = { preprocess = "pil-bicubic", size = 8 } }',
            'tokens = "clip"',
            'score = { cosine = ["image", "text"] }',
            "after = { affine = { scale = 100.0, offset = 0.0 } }",
        ],
        [
            ("text.onnx", '{ input_ids = "ids" }', '{ text_embeds = "text" }'),
            ("image.onnx", '{ pixel_values = "picture" }', '{ image_embeds = "image" }'),
        ],
        ["image.onnx", "text.onnx"],
    )
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def judge(prompt, picture):
        picture = F.center_crop(F.resize(picture, 8, InterpolationMode.BICUBIC), [8, 8])
        pixels = normalised(F.to_tensor(picture), CLIP_MEAN, CLIP_STD)
        image = run(f"{folder}/image.onnx", {"pixel_values": pixels})["image_embeds"]
        text = run(f"{folder}/text.onnx", {"input_ids": tokenizer([prompt["text"]]).numpy()})["text_embeds"]
        return 100 * (unit(image) * unit(text)).sum()

    return scores(judge)


def head():
    """A head on a normalised embedding, as the LAION aesthetic predictor."""
    folder = os.path.join(FOLDER, "head")
    layer(f"{folder}/image.onnx", "pixels", ["batch", 3, 8, 8], weights(2, 192, 4), "embedding")
    layer(f"{folder}/head.onnx", "x", ["batch", 4], weights(3, 4, 1), "rating")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    manifest(
        "head",
        [
            'score = { scalar = "rating" }',
            "[scorer.network.picture.plain]",
            "height = 8",
            "width = 8",
            "fit = { crop = { short = 10 } }",
            'filter = "pil-bilinear"',
            'layout = "nchw"',
            'channels = "rgb"',
            'range = "unit"',
            f"mean = {mean}",
            f"std = {std}",
        ],
        [
            ("image.onnx", '{ pixels = "picture" }', '{ embedding = "embedding" }'),
            ("head.onnx", '{ x = { normalised = "embedding" } }', '{ rating = "rating" }'),
        ],
        ["image.onnx", "head.onnx"],
    )

    def judge(_, picture):
        picture = F.center_crop(F.resize(picture, 10, InterpolationMode.BILINEAR), [8, 8])
        pixels = normalised(F.to_tensor(picture), mean, std)
        embedding = run(f"{folder}/image.onnx", {"pixels": pixels})["embedding"]
        return run(f"{folder}/head.onnx", {"x": unit(embedding).astype(np.float32)})["rating"][0, 0]

    return scores(judge)


def joint():
    """A picture judged together with ids, mask and types, then standardised, as ImageReward."""
    folder, length = os.path.join(FOLDER, "joint"), 12
    weight = [("wp", weights(4, 3 * 8 * 10, 1)), *[(f"w{at}", weights(5 + at, length, 1)) for at in range(3)]]
    nodes = [helper.make_node("Flatten", ["pixels"], ["flat"]), helper.make_node("MatMul", ["flat", "wp"], ["sum"])]
    for at, name in enumerate(("ids", "mask", "types")):
        nodes.append(helper.make_node("Cast", [name], [f"f{at}"], to=T.FLOAT))
        nodes.append(helper.make_node("MatMul", [f"f{at}", f"w{at}"], [f"s{at}"]))
        nodes.append(helper.make_node("Add", ["sum" if at == 0 else f"sum{at - 1}", f"s{at}"], [f"sum{at}"]))
    nodes.append(helper.make_node("Flatten", ["sum2"], ["reward"], axis=1))
    ids = [(name, element, ["batch", length]) for name, element in (("ids", T.INT64), ("mask", T.INT64), ("types", T.INT32))]
    save(f"{folder}/joint.onnx", nodes, [("pixels", T.FLOAT, ["batch", 3, 8, 10]), *ids], [("reward", T.FLOAT, ["batch", 1])], weight)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "two", "blue", "square", "##s", ",", "&", "star", "!"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # A second kind of token behind the text, so that the types are not all 0.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A:0 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(f"{folder}/tokenizer.json")
    manifest(
        "joint",
        [
            f'tokens = {{ file = {{ file = "tokenizer.json", length = {length}, pad_id = 7 }} }}',
            'score = { scalar = "reward" }',
            "after = { standardise = { mean = 0.25, std = 2.0 } }",
            "[scorer.network.picture.plain]",
            "height = 8",
            "width = 10",
            'fit = "stretch"',
            'filter = "bilinear"',
            'layout = "nchw"',
            'channels = "rgb"',
            'range = "unit"',
            f"mean = {CLIP_MEAN}",
            f"std = {CLIP_STD}",
        ],
        [
            (
                "joint.onnx",
                '{ pixels = "picture", ids = "ids", mask = "mask", types = "types" }',
                '{ reward = "reward" }',
            )
        ],
        ["joint.onnx", "tokenizer.json"],
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=7)

    def judge(prompt, picture):
        pixels = F.resize(F.to_tensor(picture), [8, 10], InterpolationMode.BILINEAR, antialias=False)
        encoded = tokenizer.encode(prompt["text"])
        feed = {
            "pixels": normalised(pixels, CLIP_MEAN, CLIP_STD),
            "ids": np.array([encoded.ids], np.int64),
            "mask": np.array([encoded.attention_mask], np.int64),
            "types": np.array([encoded.type_ids], np.int32),
        }
        return (run(f"{folder}/joint.onnx", feed)["reward"].item() - 0.25) / 2.0

    return scores(judge)


def classes():
    """The probability of the class a prompt names; the picture in Caffe's way: bytes, blue first, channels last."""
    folder, mean = os.path.join(FOLDER, "classes"), [104.0, 117.0, 123.0]
    layer(f"{folder}/classes.onnx", "image", ["batch", 8, 10, 3], weights(9, 240, 5) / 40, "logits")
    with open(f"{folder}/labels.txt", "w") as file:
        file.write("\n".join(LABELS) + "\n")
    manifest(
        "classes",
        [
            'score = { softmax = { value = "logits", class = { prompt = { column = "class", labels = "labels.txt" } } } }',
            "[scorer.network.picture.plain]",
            "height = 8",
            "width = 10",
            "fit = { letterbox = { fill = 114 } }",
            'filter = "bicubic"',
            'layout = "nhwc"',
            'channels = "bgr"',
            'range = "bytes"',
            f"mean = {mean}",
            "std = [1.0, 1.0, 1.0]",
        ],
        [("classes.onnx", '{ image = "picture" }', '{ logits = "logits" }')],
        ["classes.onnx", "labels.txt"],
    )

    def judge(prompt, picture):
        width, height = picture.size
        scale = min(10 / width, 8 / height)
        columns, rows = round(width * scale), round(height * scale)
        whole = torch.full((3, 8, 10), 114.0)
        left, top = (10 - columns) // 2, (8 - rows) // 2
        whole[:, top : top + rows, left : left + columns] = 255 * F.resize(
            F.to_tensor(picture), [rows, columns], InterpolationMode.BICUBIC, antialias=False
        )
        image = (whole.flip(0).permute(1, 2, 0).numpy() - np.array(mean, np.float32))[None]
        logits = run(f"{folder}/classes.onnx", {"image": image})["logits"][0].astype(np.float64)
        wanted = prompt["class"]
        wanted = wanted if isinstance(wanted, int) else LABELS.index(wanted.lower())
        return np.exp(logits[wanted] - logits.max()) / np.exp(logits - logits.max()).sum()

    return scores(judge)


def main():
    external()
    golden = {
        "versions": {
            module.__name__: module.__version__
            for module in (onnx, ort, np, PIL, torch, torchvision, open_clip, tokenizers)
        },
        "ports": ports(),
        "pictures": PICTURES,
        "prompts": PROMPTS,
        "scores": {kind.__name__: kind() for kind in (pair, head, joint, classes)},
    }
    with open(os.path.join(HERE, "onnx_networks.json"), "w") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
