"""Golden values of rows of pretraining and SFT: SimpleAR's own data set, row maker and collator, draw by draw.

Made with SimpleAR d56b6e5 (github.com/wdrink/SimpleAR), Python 3.11.7, torch 2.15.0, transformers 5.24.0, tokenizers 0.23.3,
numpy 2.4.6; needs `requests` besides. Run `python training_rows.py CHECKOUT` in this folder, CHECKOUT being SimpleAR's.
Writes training_rows/tokenizer.json, a byte-level BPE with SimpleAR's special tokens behind it, and training_rows.json:

    prefixes        the twenty texts of which one stands before each caption
    rows            for each: the label file's text and the codes; the settings; the caption lines that `random.choice` was given
                    and the index it chose (null where it was not asked), the caption after it, the uniform number drawn for
                    dropping the condition, whether it was dropped, the index of the prefix (null where dropped), and the row's
                    input_ids and labels, or the error it ends in
    batches         rows, by index, through the collator: truncated to model_max_length and padded
    dataset_length  how long the data set is of a JSON list of `entries` entries

`T2TokenDataset._get_item` and `preprocess_t2i` are imported and run as they are, with two concessions to the import alone:
`simpar/__init__.py` is left out, as it imports a model that newer versions of transformers cannot load, and the name
`preprocess_t2v`, which t2token_data.py imports and the checkout does not have, stands for nothing. The collator's class is
taken out of train.py, which imports deepspeed, and run as it is. `random.random` and `random.choice` are watched, not changed.
"""

import ast
import dataclasses
import importlib
import json
import locale
import os
import pathlib
import random
import sys
import tempfile
import types
import typing

# The original asks the hub for a tokenizer of Llama 3 while it is imported, and goes on without it.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
SPECIAL = ("<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>")
LABELS = [
    # One line.
    "A red cat sits on a mat. It looks at the moon. The night is cold.",
    "a photo of a cat",
    "a cat.",
    "3.5 cats on a sofa. One of them is small.",
    "Mr. Brown reads a book",
    "Well... a dog. It barks",
    ". a dot comes first",
    ".",
    "no stop, but a question? And an answer! Yes",
    "  two blanks before and three behind   ",
    "\ta tab before. A tab behind\t",
    "   .   a dot among blanks. ",
    "a trailing newline. Here it is\n",
    "a trailing newline without a stop\n",
    "carriage return and newline. Second sentence\r\n",
    "\u3000wide blanks\u3000. and no-break blanks\u00a0",
    "\u200bzero-width space. not a blank\u200b",
    "a unit separator\x1f. at the end\x1f",
    "a line separator\u2028 inside. It ends no line",
    "a form feed\x0c inside. It ends no line",
    "",
    " ",
    "\n",
    "ein W\u00fcrfel f\u00e4llt. na\u00efve caf\u00e9",
    "decomposed cafe\u0301. composed caf\u00e9",
    "\u732b\u304c\u5ea7\u308b\u3002\u5168\u89d2\u306e\u53e5\u70b9",
    "emoji \U0001f600. family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a URL www.example.com/a.png. It has dots",
    "UPPER and lower, 12 345 digits; \"quotes\" & <b>tags</b> {braces}",
    # Two lines: a short and a long caption, as the authors' own data has.
    "a cat\nA red cat sits on a mat. It looks at the moon.",
    "a cat\nA red cat sits on a mat. It looks at the moon.\n",
    "  a cat  \n  A red cat. On a mat  \n",
    "a cat\n\n",
    "a cat\n   \n",
    "\nA red cat sits on a mat",
    "\n\n",
    "a cat\r\nA red cat sits on a mat\r\n",
    "a cat\rA red cat sits on a mat",
    # More lines.
    "a cat\na red cat\nA red cat sits on a mat.",
    "a cat\n\nA red cat sits on a mat.\n",
    "one\ntwo\nthree\nfour\nfive\n",
    "a cat\na red cat\n\n",
    # What looks like a token.
    "a cat <|soi|> a dog. <|t2i|> again",
    "end <|endoftext|> of text. And on",
    "a <|vtokens|> place. And on",
    "<image> of a cat. <image>",
    "<|im_start|>user\\n<|im_end|>. not in this vocabulary",
    "<|t2i|>",
]
SETTINGS = [(short, p) for short in (False, True) for p in (0.0, 0.5, 1.0)]
LONGEST = 1536  # The original's for 512 px.


def load(checkout):
    """The modules of the data set and of the rows, and the collator's class."""
    package = types.ModuleType("simpar")
    package.__path__ = [str(checkout / "simpar")]
    sys.modules["simpar"] = package
    rows = importlib.import_module("simpar.train.preprocess")
    assert not hasattr(rows, "preprocess_t2v")
    rows.preprocess_t2v = None
    dataset = importlib.import_module("simpar.train.t2token_data")
    constants = importlib.import_module("simpar.constants")
    tree = ast.parse((checkout / "simpar/train/train.py").read_text())
    (collator,) = [node for node in tree.body if getattr(node, "name", "") == "DataCollatorForSupervisedDataset"]
    scope = {"dataclass": dataclasses.dataclass, "transformers": transformers, "torch": torch,
             "Sequence": typing.Sequence, "Dict": typing.Dict, "IGNORE_INDEX": constants.IGNORE_INDEX,
             "__name__": "simpar.train.train"}
    exec(compile(ast.Module([collator], []), "train.py", "exec"), scope)
    return dataset, rows, scope[collator.name], constants.IGNORE_INDEX


def make_tokenizer(prefixes):
    """Qwen2's kind at a small size: byte-level BPE after NFC, `<|endoftext|>` to pad, and SimpleAR's tokens last."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([*prefixes, *LABELS[:30], *prefixes], trainers.BpeTrainer(
        vocab_size=590, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", model_max_length=LONGEST, padding_side="right",
        clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    first = len(tokenizer) - len(SPECIAL)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(first, len(tokenizer)))
    return tokenizer


class Draws:
    """Watches the global generator: what was asked of it and what it answered."""

    def __init__(self):
        self.uniforms, self.choices = [], []
        self.random, self.choice = random.random, random.choice
        random.random, random.choice = self.watched_random, self.watched_choice

    def watched_random(self):
        self.uniforms.append(self.random())
        return self.uniforms[-1]

    def watched_choice(self, among):
        # Equal entries hide which one was chosen; the same draw among indices shows it.
        before = random.getstate()
        index = self.choice(range(len(among)))
        after = random.getstate()
        random.setstate(before)
        chosen = self.choice(among)
        assert chosen == among[index] and random.getstate() == after
        self.choices.append({"among": list(among), "index": index})
        return chosen

    def restart(self, seed):
        random.seed(seed)
        self.uniforms.clear()
        self.choices.clear()


def write_data(folder):
    """Codes and labels as the original's extract_token.py writes them, and the list that names them."""
    entries = []
    for at, text in enumerate(LABELS):
        codes = np.random.default_rng(at).integers(0, 64000, (1, 1, 2, 3)).astype(np.int32)
        np.save(folder / f"{at}_codes.npy", codes)
        (folder / f"{at}_label.npy").write_bytes(text.encode())
        entries.append({"code_path": f"{at}_codes.npy", "label_path": f"{at}_label.npy"})
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def make_row(data, at, seed, prefixes, draws, captions):
    """One row with all that was drawn for it, and what the collator gets."""
    draws.restart(seed)
    captions.clear()
    try:
        item = data._get_item(at)
        outcome = {key: item[key].tolist() for key in ("input_ids", "labels")}
    except RuntimeError as error:
        item, outcome = None, {"error": str(error)}
    (uniform,), (caption,) = draws.uniforms, captions
    chosen, dropped = list(draws.choices), uniform < data.p_drop_cond
    prefix = None if dropped else chosen.pop()
    assert prefix is None or prefix["among"] == prefixes
    assert len(chosen) == (data.sample_short and LABELS[at] != "")
    codes = np.load(pathlib.Path(data.data_dir) / data.list_data_dict[at]["code_path"])
    row = {
        "label_text": LABELS[at], "codes": codes.ravel().tolist(), "sample_short": data.sample_short,
        "p_drop_cond": data.p_drop_cond, "seed": seed, "choice": chosen[0] if chosen else None, "caption": caption,
        "uniform": uniform, "dropped": dropped, "prefix": prefix and prefix["index"], **outcome,
    }
    return row, item


def make_batches(rows, items, Collator, tokenizer):
    """Threes of rows that differ in length, whole and cut short, and one with a pad token inside a caption."""
    by_length = [at for _, at in sorted((len(row["input_ids"]), at) for at, row in enumerate(rows) if items[at])]
    n = len(by_length)
    padded = next(at for at, row in enumerate(rows) if items[at] and "<|endoftext|>" in row["caption"] and not row["dropped"])
    threes = [[by_length[at], by_length[n // 2 + at], by_length[n - 1 - 7 * at]] for at in range(0, 24, 4)]
    threes += [[padded, by_length[0], by_length[n // 3]], [by_length[0], by_length[1], by_length[2]]]
    batches = []
    for longest, three in [(LONGEST, three) for three in threes] + [(24, threes[0]), (8, threes[1]), (24, threes[6])]:
        tokenizer.model_max_length = longest
        batch = Collator(tokenizer=tokenizer)([items[at] for at in three])
        batches.append({
            "rows": three, "model_max_length": longest, "input_ids": batch["input_ids"].tolist(),
            "labels": batch["labels"].tolist(), "attention_mask": batch["attention_mask"].int().tolist(),
        })
    tokenizer.model_max_length = LONGEST
    return batches


def main(checkout):
    # The original opens label files in the locale's encoding.
    assert locale.getpreferredencoding(False).lower() == "utf-8", "run this in a UTF-8 locale"
    module, preprocess, Collator, ignored = load(checkout)
    prefixes = preprocess.PROMPTS_GEN
    tokenizer = make_tokenizer(prefixes)
    captions, original = [], module.preprocess_t2i

    def watched_preprocess(sources, *args, **kwargs):
        captions.append(sources[0][1]["value"])
        return original(sources, *args, **kwargs)

    module.preprocess_t2i = watched_preprocess
    draws = Draws()
    rows, items = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        meta = write_data(folder)
        for sample_short, p_drop_cond in SETTINGS:
            # No vision tower, so not "multimodal": captions pass preprocess_multimodal unchanged.
            data_args = types.SimpleNamespace(is_multimodal=False)
            data = module.T2TokenDataset(str(meta), str(folder), tokenizer, data_args, p_drop_cond, sample_short)
            # Without conditions rows differ in their codes alone.
            for at in range(len(LABELS) if p_drop_cond < 1.0 else 5):
                row, item = make_row(data, at, len(rows), prefixes, draws, captions)
                rows.append(row)
                items.append(item)
        length = {"entries": len(LABELS), "length": len(data)}
    batches = make_batches(rows, items, Collator, tokenizer)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
                "numpy": np.__version__}
    values = {
        "versions": versions, "n_text_ids": len(tokenizer), "pad": tokenizer.pad_token_id, "ignored": ignored,
        "special": {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}, "prefixes": prefixes,
        "dataset_length": length, "rows": rows, "batches": batches,
    }
    (HERE / "training_rows").mkdir(exist_ok=True)
    (HERE / "training_rows/tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str() + "\n")
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    # A row or a batch a line, for the sake of differences.
    (HERE / "training_rows.json").write_text(text.replace('{"label_text"', '\n{"label_text"').replace('{"rows":', '\n{"rows":') + "\n")
    print(len(rows), "rows,", len(batches), "batches,", length, versions, sum(row["dropped"] for row in rows), "dropped")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
