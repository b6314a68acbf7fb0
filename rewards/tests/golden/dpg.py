"""DPG-Bench's own program on a table and pictures made here, and an independent second count without its faults.

    python dpg.py CHECKOUT        (a checkout of github.com/TencentQQGYLab/ELLA)

The whole of `dpg_bench/compute_dpg_bench.py` is compiled and its `main` run, with accelerate and tqdm replaced by
single-process stand-ins and the model by a rule: an answer depends on the bytes of the crop and of the question, so
that a crop that is cut otherwise is answered otherwise. Pictures are a formula of file, column and row. Writes
`dpg.json` beside itself.
"""

import contextlib
import io
import json
import pathlib
import platform
import random
import re
import sys
import tempfile
import types

import numpy as np
import pandas as pd
from PIL import Image
import PIL

SIDE = 8
ANSWERS = ["yes", "no", "yes", "Yes", "yes", "yes.", "yes"]
CATEGORIES = ["entity - whole", "entity - part", "attribute - color", "relation - spatial", "global", "other - count"]


def pixel(name, x, y):
    salt = sum(name.encode())
    return [(salt + 7 * x + 13 * y + 31 * channel + x * y) % 256 for channel in range(3)]


def picture(name, width, height):
    rows = [[pixel(name, x, y) for x in range(width)] for y in range(height)]
    return np.array(rows, np.uint8)


def answer(crop, question):
    return ANSWERS[(int(crop.astype(np.int64).sum()) + sum(question.encode())) % len(ANSWERS)]


def table(rng):
    """Rows of (item, number, dependency, tuple, question): chains, several parents, quotes, commas, line breaks."""
    rows = [["partiprompts97", 1, "0", "entity - whole (bench)", "Is there a bench?"]]
    rows += [["partiprompts97", 2, "0", "entity - whole (dog)", "Is there a dog?"]]
    rows += [["partiprompts97", 3, "1", "attribute - color (bench, red)", "Is the bench red?"]]
    # A chain, and a child that is listed before its parent.
    rows += [["chain", n, str(n - 1), f"{CATEGORIES[n % 6]} (link {n})", f'Is link {n}, "the {n}th", there?'] for n in range(1, 9)]
    rows += [["early", n, p, f"{CATEGORIES[n % 6]} (part {n})", f"Is part {n}\nthere?"] for n, p in ((1, "2"), (2, "0"), (3, "1, 2"))]
    for item in ["12", "COCOval7", "midjourney3", "vrd9", "whoops1", "posescript5", "stanford2", "drawtext4", "countbench8", "absent6"]:
        n_questions = rng.randrange(4, 12)
        for n in range(1, n_questions + 1):
            parents = sorted(rng.sample(range(1, n), min(n - 1, rng.choice([0, 1, 1, 2, 3]))))
            dependency = ",".join(map(str, parents)) or "0"
            category = rng.choice(CATEGORIES)
            rows.append([item, n, dependency, f"{category} ({item}, {n})", f"Question {n} of {item}?"])
    return rows


def files(rng, items):
    """Names and sizes: grids with and without borders, one too small, and one of no item."""
    found = [["partiprompts97.png", 0], ["stray.png", 0]]
    found += [[f"{item}.png", rng.choice([0, 0, 2])] for item in items if item not in ("partiprompts97", "absent6")]
    return sorted([name, 2 * SIDE + 3 * border] for name, border in found)


def run_original(checkout, folder, csv_path, n_pictures):
    stand_ins = {
        "accelerate": types.ModuleType("accelerate"),
        "accelerate.utils": types.ModuleType("accelerate.utils"),
        "tqdm": types.ModuleType("tqdm"),
        "torch": types.ModuleType("torch"),
    }

    class Accelerator:
        is_main_process, process_index, num_processes, device = True, 0, 1, "cpu"
        prepare = staticmethod(lambda it: it)
        wait_for_everyone = staticmethod(lambda: None)

    stand_ins["accelerate"].Accelerator = Accelerator
    stand_ins["accelerate.utils"].gather_object = lambda it: it
    stand_ins["tqdm"].tqdm = lambda it: it
    stand_ins["torch"].nn = types.SimpleNamespace(Module=object)
    sys.modules.update(stand_ins)
    path = checkout / "dpg_bench" / "compute_dpg_bench.py"
    space = {"__name__": "original"}
    exec(compile(path.read_text(), str(path), "exec"), space)

    class Rule:
        def __init__(self, device):
            pass

        def vqa(self, image, question):
            return answer(np.array(image.convert("RGB")), question)

    space["MPLUG"] = Rule
    space["time"] = types.SimpleNamespace(time=lambda: 0, localtime=lambda _: 0, strftime=lambda *_: "", sleep=lambda _: None)
    result = folder.parent / "result.txt"
    sys.argv = ["compute_dpg_bench.py", "--image-root-path", str(folder), "--resolution", str(SIDE)]
    sys.argv += ["--csv", str(csv_path), "--res-path", str(result), "--pic-num", str(n_pictures)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        space["main"]()
    return printed.getvalue(), result.read_text()


def read_printed(printed):
    tables, current = {"L1": {}, "L2": {}}, None
    for line in printed.splitlines():
        if line.startswith(("L1", "L2")):
            current = line[:2]
        elif line.startswith("\t"):
            name, value = line.strip().rsplit(": ", 1)
            tables[current][name] = float(value)
    failed = sorted(re.findall(r"Failed filename: (\S+)", printed))
    return {"overall": float(re.search(r"DPG-Bench score: (\S+)", printed)[1]), "failed": failed, **tables}


def fixed(rows, found, n_pictures):
    """A count of its own: every row, borders stepped over, categories over all pictures after the zeros."""
    items = {}
    for item, number, dependency, statement, question in rows:
        parents = [int(part) for part in dependency.split(",") if int(part) != 0]
        items.setdefault(item, {})[number] = (parents, statement.split("(")[0].strip(), question)
    overall, categories, failed = [], {}, []
    for name, size in found:
        questions = items.get(name.split(".")[0])
        if questions is None:
            failed.append(name)
            continue
        border = (size - 2 * SIDE) // 3
        pixels, scores = picture(name, size, size), []
        for at in range(n_pictures):
            top, left = (border + place * (SIDE + border) for place in divmod(at, 2))
            crop = pixels[top : top + SIDE, left : left + SIDE]
            good = {number: answer(crop, question) == "yes" for number, (_, _, question) in questions.items()}
            for number, (parents, _, _) in questions.items():
                good[number] = good[number] and all(good[parent] for parent in parents)
            scores.append(sum(good.values()) / len(good))
            for number, (_, category, _) in questions.items():
                categories.setdefault(category, []).append(good[number])
        overall.append(sum(scores) / len(scores))
    broad = {}
    for category, values in categories.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(values)
    percent = lambda values: 100 * sum(values) / len(values)
    return {
        "overall": percent(overall),
        "failed": failed,
        "L1": {name: percent(values) for name, values in broad.items()},
        "L2": {name: percent(values) for name, values in categories.items()},
    }


def main():
    checkout, rng = pathlib.Path(sys.argv[1]), random.Random(1065)
    rows = table(rng)
    frame = pd.DataFrame(rows, columns=["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"])
    frame.insert(1, "text", 'a "long" prompt, with commas')
    frame.insert(2, "keywords", "")
    found = files(rng, sorted({row[0] for row in rows}))
    counts = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "images"
        folder.mkdir()
        csv_path = pathlib.Path(scratch) / "table.csv"
        frame.to_csv(csv_path, index=False)
        text = csv_path.read_text()
        for name, size in found:
            Image.fromarray(picture(name, size, size)).save(folder / name)
        for n_pictures in (4, 1):
            printed, _ = run_original(checkout, folder, csv_path, n_pictures)
            of_fixed = fixed(rows, found, n_pictures) if n_pictures == 4 else None
            counts.append({"n_pictures": n_pictures, "official": read_printed(printed), "fixed": of_fixed})
    golden = {
        "original": "TencentQQGYLab/ELLA 3c228f1dc6c4d3cad0a47493816151a419f14db3",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pillow": PIL.__version__,
        },
        "side": SIDE,
        "answers": ANSWERS,
        "csv": text,
        "files": found,
        "counts": counts,
    }
    print(json.dumps(counts, indent=1))
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
