"""Golden verdicts for GenEval's rules, from an implementation of their description alone.

Writes `geneval.json` beside itself: random boxes with the metadata they are judged against, the verdict of
each, and random pairs of boxes with their relations. Python 3.11 or later, standard library only (the
committed values were made with the version that the file names); run `python geneval.py`.

The rules, as the paper's evaluation describes them: keep boxes above 0.3 (0.9 when counting), the best 16 of a
class; each entry of `include` takes its best `count`; colours of the boxes taken; positions against the boxes
taken for an earlier entry; `exclude` fails at `count`.
"""

import json
import math
import pathlib
import platform
import random

CLASSES = ["bench", "cat", "dog", "clock"]
COLORS = ["red", "green", "blue"]
RELATIONS = ["left of", "right of", "above", "below"]


def true_relations(box_a, box_b):
    """Offset of the centres, shrunk by a tenth of both extents per axis, over the unshrunk distance."""
    shrunk, raw = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box_a[low] + box_a[high]) / 2 - (box_b[low] + box_b[high]) / 2
        slack = 0.1 * (abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low]))
        raw.append(offset)
        shrunk.append(math.copysign(max(abs(offset) - slack, 0.0), offset))
    if abs(shrunk[0]) < 1e-3 and abs(shrunk[1]) < 1e-3:
        return []
    norm = math.sqrt(raw[0] ** 2 + raw[1] ** 2)
    x, y = shrunk[0] / norm, shrunk[1] / norm
    names = []
    if x < -0.5:
        names.append("left of")
    if x > 0.5:
        names.append("right of")
    if y < -0.5:
        names.append("above")
    if y > 0.5:
        names.append("below")
    return names


def is_correct(metadata, boxes):
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    per_class = {}
    for box in sorted(boxes, key=lambda box: box["score"], reverse=True):
        group = per_class.setdefault(box["class"], [])
        if box["score"] > threshold and len(group) < 16:
            group.append(box)
    taken_by_entry = []
    for entry in metadata["include"]:
        taken = per_class.get(entry["class"], [])[: entry["count"]]
        good = len(taken) == entry["count"]
        if good and "color" in entry:
            good = sum(box["color"] == entry["color"] for box in taken) >= entry["count"]
        if good and "position" in entry:
            relation, target = entry["position"]
            anchors = taken_by_entry[target]
            good = anchors is not None and all(
                relation in true_relations(box["bbox"], anchor["bbox"]) for box in taken for anchor in anchors
            )
        taken_by_entry.append(taken if good else None)
    too_many = any(len(per_class.get(e["class"], [])) >= e["count"] for e in metadata.get("exclude", []))
    return None not in taken_by_entry and not too_many


def random_metadata(rng, tag):
    first, second = rng.sample(CLASSES, 2)
    metadata = {"tag": tag, "include": [{"class": first, "count": 1}], "prompt": f"{tag} of {first}"}
    if tag == "counting":
        count = rng.choice([2, 3, 4, 16])
        metadata["include"][0]["count"] = count
        metadata["exclude"] = [{"class": first, "count": count + 1}]
    if tag in ("two_object", "position", "color_attr"):
        metadata["include"].append({"class": second, "count": rng.choice([1, 1, 2])})
    if tag == "position":
        metadata["include"][1]["position"] = [rng.choice(RELATIONS), 0]
    if tag in ("colors", "color_attr"):
        for entry in metadata["include"]:
            entry["color"] = rng.choice(COLORS)
    return metadata


def random_box(rng):
    x, y = rng.uniform(0, 500), rng.uniform(0, 500)
    corners = [x, y, x + rng.uniform(1, 300), y + rng.uniform(1, 300)]
    return [round(corner, 2) for corner in corners]


def random_boxes(rng, metadata):
    wanted = [entry for entry in metadata["include"] for _ in range(entry["count"]) if rng.random() < 0.93]
    boxes = [(entry["class"], entry.get("color")) for entry in wanted]
    extra = rng.choice([0, 0, 1, 2, 5]) if metadata["tag"] != "counting" else rng.choice([0, 0, 0, 1])
    boxes += [(rng.choice(CLASSES), None) for _ in range(extra)]
    rng.shuffle(boxes)
    low = 0.88 if metadata["tag"] == "counting" and rng.random() < 0.8 else 0.25
    return [
        {
            "class": name,
            "score": round(rng.uniform(low, 1.0), 4),
            "bbox": random_box(rng),
            "color": color if color and rng.random() < 0.85 else rng.choice(COLORS),
        }
        for name, color in boxes
    ]


def main():
    rng = random.Random(20240607)
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    verdicts = []
    while len(verdicts) < 240:
        metadata = random_metadata(rng, tags[len(verdicts) % 6])
        boxes = random_boxes(rng, metadata)
        verdicts.append({"metadata": metadata, "boxes": boxes, "correct": is_correct(metadata, boxes)})
    pairs = [(random_box(rng), random_box(rng)) for _ in range(120)]
    pairs += [(box, box) for box, _ in pairs[:2]]
    golden = {
        "python": platform.python_version(),
        "verdicts": verdicts,
        "relations": [{"a": a, "b": b, "relations": true_relations(a, b)} for a, b in pairs],
    }
    shares = {tag: sum(v["correct"] for v in verdicts if v["metadata"]["tag"] == tag) for tag in tags}
    print("correct of 40:", shares)
    text = json.dumps(golden, separators=(",", ":")).replace('{"metadata"', '\n{"metadata"').replace('{"a"', '\n{"a"')
    pathlib.Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
