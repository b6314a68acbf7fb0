"""GenEval's own functions on random boxes: verdict and reason of each, as the published evaluation gives them.

    python geneval_original.py CHECKOUT        (a checkout of github.com/djghosh13/geneval)

Nothing of the checkout is copied: its functions are compiled out of `evaluation/evaluate_images.py` at run time
and run in a namespace where the detector returns this program's boxes, images are absent, and the classification
of colours returns the colour recorded with a box. `evaluation/summary_scores.py` runs whole, on a file of results.
Writes `geneval_original.json` beside itself. Run it with numpy 1.23 and pandas 1.5, the versions of the published
environment: from numpy 2 on, scalars of `compute_iou` stay in single precision, and newer sorts order ties otherwise.
"""

import ast
import contextlib
import io
import json
import pathlib
import platform
import random
import runpy
import sys
import tempfile

import numpy as np
import pandas as pd

CLASSES = ["cat", "dog", "tv remote", "clock"]
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
RELATIONS = ["left of", "right of", "above", "below"]
FUNCTIONS = ["compute_iou", "relative_position", "evaluate", "evaluate_image"]


def original(checkout):
    """The namespace in which the published functions run; `boxes`, `masks` and `color_of` are set for each case."""
    source = (checkout / "evaluation" / "evaluate_images.py").read_text()
    tree = ast.parse(source)
    wanted = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS)
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COLORS")
    ]
    assert len(wanted) == len(FUNCTIONS) + 1, "the file is not the one this program was written for"

    class NoImage:
        open = exif_transpose = staticmethod(lambda it: it)

    space = {
        "np": np,
        "json": json,
        "Image": NoImage,
        "ImageOps": NoImage,
        "object_detector": None,
        "classnames": CLASSES,
        "THRESHOLD": 0.3,
        "COUNTING_THRESHOLD": 0.9,
        "MAX_OBJECTS": 16,
        "POSITION_THRESHOLD": 0.1,
    }
    space["inference_detector"] = lambda _model, _path: space["result"]
    space["color_classification"] = lambda _image, found, _name: [space["color_of"](*one) for one in found]
    exec(compile(ast.Module(wanted, []), "evaluate_images.py", "exec"), space)
    return space


def run(space, case, with_masks):
    """One case through `evaluate_image`; a colour travels as its box's mask, or is found by the box itself."""
    rows = [[box for box in case["boxes"] if box[0] == index] for index in range(len(CLASSES))]
    arrays = [np.array([[*box[2:6], box[1]] for box in rows_of], np.float32).reshape(-1, 5) for rows_of in rows]
    colors = [[space["COLORS"][box[6]] for box in rows_of] for rows_of in rows]
    if with_masks:
        space["result"] = (arrays, colors)
        space["color_of"] = lambda _box, mask: mask
    else:
        table = {
            row.tobytes(): color for array, names in zip(arrays, colors) for row, color in zip(array, names)
        }
        space["result"] = arrays
        space["color_of"] = lambda box, _mask: table[box.tobytes()]
    space["NMS_THRESHOLD"] = 1.0 if case["overlap"] is None else case["overlap"]
    verdict = space["evaluate_image"]("an image", case["metadata"])
    return verdict["correct"], verdict["reason"]


def f32(value):
    """The shortest decimal that is this single-precision number."""
    return float(str(np.float32(value)))


def random_metadata(rng, tag):
    first, second = rng.sample(range(len(CLASSES)), 2)
    include = [{"class": CLASSES[first], "count": 1}]
    metadata = {"tag": tag, "include": include, "prompt": ""}
    if tag == "counting":
        include[0]["count"] = rng.choice([1, 2, 2, 3, 3, 4, 4, 16, 17])
        metadata["exclude"] = [{"class": CLASSES[first], "count": include[0]["count"] + 1}]
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": CLASSES[second], "count": rng.choice([1, 1, 1, 2, 3])})
    if tag == "position":
        include[0]["count"] = rng.choice([1, 1, 1, 2])
        include[1]["position"] = [rng.choice(RELATIONS), 0]
        if rng.random() < 0.15:
            include.append({"class": CLASSES[first], "count": 1, "position": [rng.choice(RELATIONS), 1]})
        if rng.random() < 0.2:
            rng.choice(include)["color"] = rng.choice(COLORS[:3])
    if tag in ("colors", "color_attr"):
        for entry in include:
            entry["color"] = rng.choice(COLORS[:3])
    if rng.random() < 0.1:
        metadata.setdefault("exclude", []).append({"class": rng.choice(CLASSES), "count": rng.choice([1, 2, 3])})
    return metadata


def random_box(rng):
    """Corners of several kinds: whole and fractional, degenerate, and multiples that put offsets on a threshold."""
    kind = rng.random()
    if kind < 0.1:
        x, y = rng.randrange(500), rng.randrange(500)
        return [x, y, x, y]
    if kind < 0.5:
        x, y = 16 * rng.randrange(30), 16 * rng.randrange(30)
        return [x, y, x + 16 * rng.choice([1, 2, 5, 10]), y + 16 * rng.choice([1, 2, 5, 10])]
    x, y = rng.uniform(0, 500), rng.uniform(0, 500)
    return [f32(round(v, 2)) for v in (x, y, x + rng.uniform(1, 200), y + rng.uniform(1, 200))]


def random_score(rng, counting):
    kind = rng.random()
    if kind < 0.2:
        edge = np.float32(0.9 if counting else 0.3)
        return f32(rng.choice([edge, np.nextafter(edge, np.float32(1)), np.nextafter(edge, np.float32(0))]))
    if kind < 0.4:
        return rng.choice([0.25, 0.5, 0.95, 0.99, 1.0])
    return f32(round(rng.uniform(0.88 if counting else 0.25, 1), 3))


def satisfy(include, boxes):
    """Makes the asked relation one that the best boxes nearly stand in, where both are there."""
    first, second = (
        max((box for box in boxes if CLASSES[box[0]] == entry["class"]), key=lambda box: box[1], default=None)
        for entry in include[:2]
    )
    if first is None or second is None:
        return
    dx, dy = (second[axis] + second[axis + 2] - first[axis] - first[axis + 2] for axis in (2, 3))
    across = RELATIONS[0] if dx < 0 else RELATIONS[1]
    include[1]["position"][0] = across if abs(dx) > abs(dy) else RELATIONS[2] if dy < 0 else RELATIONS[3]


def random_case(rng, tag):
    metadata = random_metadata(rng, tag)
    wanted = [e for e in metadata["include"] for _ in range(e["count"]) if rng.random() < 0.95]
    named = [(CLASSES.index(e["class"]), e.get("color")) for e in wanted]
    n_extra = rng.choice([0, 0, 0, 1, 2, 4])
    named += [(rng.randrange(len(CLASSES)), None) for _ in range(n_extra)]
    rng.shuffle(named)
    boxes = []
    for at, color in named:
        of = color if color and rng.random() < 0.85 else rng.choice(COLORS[:5])
        boxes.append([at, random_score(rng, tag == "counting"), *random_box(rng), COLORS.index(of)])
    # More than 16 boxes of a class leave the insertion sort, whose order of ties is known: no ties among them.
    for at in range(len(CLASSES)):
        crowd = [box for box in boxes if box[0] == at]
        if len(crowd) > 16:
            for place, box in enumerate(crowd):
                box[1] = f32(0.905 + 0.005 * place)
    if tag == "position" and rng.random() < 0.6:
        satisfy(metadata["include"], boxes)
    overlap = rng.choice([0.3, 0.5, 0.9]) if rng.random() < 0.2 else None
    if overlap is not None:
        for box in boxes[1:]:
            if rng.random() < 0.5:
                shift = rng.choice([0, 1, 8, 40])
                box[2:6] = [f32(v + shift) for v in rng.choice(boxes)[2:6]]
    return {"metadata": metadata, "boxes": boxes, "overlap": overlap}


def edge_relations(rng, space):
    """Pairs of boxes whose reduced offset lies within a few rounding steps of half the distance."""
    pairs = []
    while len(pairs) < 150:
        w, h = rng.uniform(1, 100), rng.uniform(1, 100)
        dx = rng.uniform(30, 300)
        # Solve (dx - 0.2 w) = 0.5 sqrt(dx^2 + dy^2) for dy.
        square = (2 * (dx - 0.2 * w)) ** 2 - dx**2
        if square <= 0:
            continue
        dy = square**0.5
        a = [f32(v) for v in (0, 0, w, h)]
        b = [f32(v) for v in (dx, dy, dx + w, dy + h)]
        step = rng.choice([0, 0, 1, -1, 2, -2])
        for _ in range(abs(step)):
            b[1] = f32(np.nextafter(np.float32(b[1]), np.float32(np.sign(step) * 1e9)))
        if rng.random() < 0.5:
            a, b = b, a
        pairs.append([a, b])
    pairs += [[random_box(rng), random_box(rng)] for _ in range(100)]
    pairs += [[pairs[0][0], pairs[0][0]]]
    rows = []
    for a, b in pairs:
        found = space["relative_position"]([np.array(a, np.float32)], [np.array(b, np.float32)])
        rows.append([a, b, sorted(RELATIONS.index(name) for name in found)])
    return rows


def summary(checkout, rng):
    """`summary_scores.py` on random verdicts: its printed text."""
    rows = []
    for prompt in range(40):
        tag = rng.choice(TAGS[:5])
        metadata = json.dumps({"tag": tag, "prompt": f"prompt {prompt}"})
        rows += [{"tag": tag, "metadata": metadata, "correct": rng.random() < 0.4} for _ in range(rng.choice([1, 4, 4]))]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "results.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        printed = io.StringIO()
        before, sys.argv = sys.argv, ["summary_scores.py", str(path)]
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(checkout / "evaluation" / "summary_scores.py"))
        sys.argv = before
    return {"rows": rows, "printed": printed.getvalue()}


def main():
    global COLORS
    checkout = pathlib.Path(sys.argv[1])
    space = original(checkout)
    COLORS = space["COLORS"]
    rng = random.Random(553)
    cases = [random_case(rng, TAGS[row % 6]) for row in range(1080)]
    for row, case in enumerate(cases):
        case["correct"], case["reason"] = run(space, case, with_masks=row % 2 == 0)
    relations = edge_relations(rng, space)
    summed = summary(checkout, rng)
    golden = {
        "original": "djghosh13/geneval af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pandas": pd.__version__},
        "classes": CLASSES,
        "colors": COLORS,
        "cases": [
            [c["metadata"], c["boxes"], c["overlap"], c["correct"], c["reason"]] for c in cases
        ],
        "relations": relations,
        "summary": summed,
    }
    for tag in TAGS:
        of = [case for case in cases if case["metadata"]["tag"] == tag]
        print(f"{tag:<14} correct {sum(case['correct'] for case in of):>4} of {len(of)}")
    text = json.dumps(golden, separators=(",", ":")).replace("[{\"tag\"", "\n[{\"tag\"")
    pathlib.Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
