"""Golden negative log-likelihoods of images under the committed miniature policy, by transformers' Qwen2 in f32.

Made with Python 3.11.7, torch 2.15.0, transformers 5.24.0, tokenizers 0.23.3, safetensors 0.8.0; run `python nll.py` in this
folder. Reads policies/models/shapes (bf16 weights, computed in f32 on the CPU). Writes nll.jsonl, 24 captions with 64 codes
each, which `grpo eval nll --data` reads, and nll.json with, in nats and for all rows together and for each,

    full      the mean over image tokens of -log p, the softmax over all ids
    visual    the same, the softmax over the codebook's ids alone
    training  the mean over every token but the row's first, text and specials included, the softmax over all ids: the loss of
              pretraining and SFT; over the rows together it is the mean over their tokens, not of their means

A row is `<|t2i|>` + caption + `<|soi|>` + codes in raster order, a code's id being itself plus the number of text ids. Codes of
the first 12 rows are drawn by the model itself, at temperature 1 from the codebook's ids with one seeded generator; of the
next 6 by numpy's default_rng(row); of the last 6 they are (row * 131 + position * 97) mod 1600, patterns without meaning.
Three captions have words or signs that the vocabulary lacks, and one is empty.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).parent
POLICY = HERE / "../../../policies/models/shapes"
N_TOKENS, N_CODES = 64, 1600
CAPTIONS = [
    # Drawn by the model.
    "a photo of a red circle",
    "a picture of two green stars",
    "an image of a blue ring above a yellow square",
    "a drawing of three purple triangles",
    "a photo of a white cross left of a black circle",
    "a picture of a pink star and a brown square",
    "a red square on the left",
    "an orange ring in the center on a gray background",
    "four blue circles",
    "a photo of a green triangle below a red star",
    "A Photo of ONE yellow Cross",
    "a shiny red circle",
    # At random.
    "a photo of five black rings",
    "an image of a gray background",
    "two white squares in the bottom right",
    "a purple circle right of an orange triangle",
    "a photo of a purple elephant in the rain",
    "a green cross",
    # By the formula.
    "a picture of a brown ring",
    "a drawing of a yellow star and a pink circle and a blue cross",
    "a photo of a photo of a red photo",
    "star",
    "a red circle, a blue square.",
    "",
]
N_DRAWN, N_RANDOM = 12, 6

torch.manual_seed(20)
torch.set_num_threads(1)


def load():
    fields = json.loads((POLICY / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config = Qwen2Config(**fields, attn_implementation="eager", use_sliding_window=False, hidden_act="silu")
    model = Qwen2ForCausalLM(config).float().eval()
    weights = {name: tensor.float() for name, tensor in load_file(POLICY / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    return model, Tokenizer.from_file(str(POLICY / "tokenizer.json"))


def draw(model, prompt, n_text):
    """Codes of an image of the model's own, a token at a time."""
    row = list(prompt)
    for _ in range(N_TOKENS):
        law = torch.softmax(model(input_ids=torch.tensor([row])).logits[0, -1, n_text:], -1)
        row.append(int(torch.multinomial(law, 1)) + n_text)
    return [token - n_text for token in row[len(prompt):]]


def score(model, prompt, codes, n_text):
    """Sums of -log p: over image tokens by either softmax, and over all tokens but the first with their number."""
    row = torch.tensor(prompt + [code + n_text for code in codes])
    logits = model(input_ids=row[None]).logits[0, :-1]
    targets = row[1:]
    of_all = -torch.log_softmax(logits, -1).double().gather(1, targets[:, None])[:, 0]
    image = logits[-N_TOKENS:, n_text:]
    of_codes = -torch.log_softmax(image, -1).double().gather(1, targets[-N_TOKENS:, None] - n_text)[:, 0]
    return {"full": of_all[-N_TOKENS:].sum().item(), "visual": of_codes.sum().item(), "training": of_all.sum().item(),
            "n_targets": len(targets)}


@torch.no_grad()
def main():
    model, tokenizer = load()
    n_text = tokenizer.get_vocab_size(with_added_tokens=True)
    assert model.config.vocab_size == n_text + N_CODES
    start, image_start = (tokenizer.token_to_id(token) for token in ("<|t2i|>", "<|soi|>"))
    lines, rows = [], []
    for at, caption in enumerate(CAPTIONS):
        prompt = [start, *tokenizer.encode(caption, add_special_tokens=False).ids, image_start]
        if at < N_DRAWN:
            codes = draw(model, prompt, n_text)
        elif at < N_DRAWN + N_RANDOM:
            codes = np.random.default_rng(at).integers(0, N_CODES, N_TOKENS).tolist()
        else:
            codes = [(at * 131 + position * 97) % N_CODES for position in range(N_TOKENS)]
        lines.append({"caption": caption, "codes": codes})
        rows.append({"prompt_ids": prompt, **score(model, prompt, codes, n_text)})
    n_image, n_targets = N_TOKENS * len(rows), sum(row["n_targets"] for row in rows)
    means = {name: sum(row[name] for row in rows) / n
             for name, n in [("full", n_image), ("visual", n_image), ("training", n_targets)]}
    for row in rows:
        row["full"], row["visual"] = row["full"] / N_TOKENS, row["visual"] / N_TOKENS
        row["training"] /= row["n_targets"]
    values = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "n_text_ids": n_text,
              "tokens_per_image": N_TOKENS, "n_targets": n_targets, **means, "rows": rows}
    compact = json.dumps(values, separators=(",", ":")).replace('{"prompt_ids"', '\n{"prompt_ids"')
    (HERE / "nll.json").write_text(compact + "\n")
    (HERE / "nll.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(means, n_targets)
    for line, row in zip(lines, rows):
        print(f"{row['full']:8.4f} {row['visual']:8.4f} {row['training']:8.4f} {row['n_targets']:3} {line['caption']!r}")


if __name__ == "__main__":
    main()
