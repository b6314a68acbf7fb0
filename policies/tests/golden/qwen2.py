"""Golden values of Hugging Face folders: `transformers`' own Qwen2ForCausalLM, saved, scored and sampled by itself.

Made with torch 2.11.0, transformers 5.23.0, safetensors 0.8.0; run `python qwen2.py` in this folder.
Writes, for a tied head in one file and an untied head in shards, a folder as `save_pretrained` leaves it (qwen2/tied,
qwen2/untied; bf16) and in it golden.safetensors and golden.json:
  log_probs     [positions, ceil(V / 10)], f32: at position p the log-softmax of the columns c with (p + c) % 10 == 0
  next          [positions], f32: the log-prob of the token that comes next, over the whole vocabulary
  gradient/NAME f16: d(sum of weights * next)/d NAME, divided by its largest magnitude (in golden.json)
  greedy        256 tokens of `model.generate`, unguided, and guided by guidance_scale and negative_prompt_ids

`python qwen2.py --load DIR --ids 1,2,3 --logits FILE` is the other direction: AutoModelForCausalLM reads a folder that
we wrote, and its logits after the ids must be those of the safetensors FILE (tensor `logits` [L, V]).
"""

import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, SHARE = 403, 10  # 140 words, 7 special tokens, 256 codes; one column in 10 is kept of each position
LENGTHS = [430, 331, 170, 75]
PROMPTS, NEGATIVE = [[140, 3, 77, 51, 9, 142], [140, 12, 142], [140, *range(20, 60, 3), 142]], [140, 91, 7, 66, 142]
GUIDANCE, TOKENS = 6.0, 256

torch.set_num_threads(1)


def lively(tied, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Wide enough that attention chooses, norms and biases away from their usual 1 and 0; with wider ones
            # the f32 noise of the oracle itself, 3e-5 here against f64, comes near the tolerance of the tests.
            spread = 0.3 if "embed" in name or "lm_head" in name else 0.18
            value.copy_(torch.randn_like(value) * spread + (1.0 if "norm" in name else 0.0))
    return model


def scored(model, out):
    """Log-probs and gradients of rows that are padded on the right."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    ids = torch.tensor([row + [0] * (max(LENGTHS) - len(row)) for row in rows])
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    law = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
    places = [(r, p) for r, row in enumerate(rows) for p in range(len(row) - 1)]
    log_probs = torch.stack([law[r, p] for r, p in places])
    nexts = torch.stack([law[r, p, rows[r][p + 1]] for r, p in places])
    weights = [((n % 7) - 2.6) / 4 for n in range(len(places))]
    (nexts * torch.tensor(weights)).sum().backward()
    # The last row of columns is short at some positions: -1 fills it.
    kept = torch.full((len(places), -(-VOCABULARY // SHARE)), -1.0)
    for n in range(len(places)):
        columns = log_probs[n, (-n) % SHARE :: SHARE]
        kept[n, : len(columns)] = columns
    tensors, largest = {"log_probs": kept.detach(), "next": nexts.detach()}, {}
    for name, value in model.named_parameters():
        largest[name] = value.grad.abs().max().item()
        tensors[f"gradient/{name}"] = (value.grad / largest[name]).half()
    save_file(tensors, out / "golden.safetensors")
    return {"rows": rows, "weights": weights, "largest_gradients": largest}


def greedy(model, prompt, **guidance):
    """256 tokens of transformers' own generate; the smallest margin of an argmax."""
    ids = torch.tensor([prompt])
    drawn = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, **guidance,
    )
    best = torch.stack(drawn.scores)[:, 0].topk(2).values
    tokens = drawn.sequences[0, len(prompt):].tolist()
    assert len(tokens) == TOKENS
    return tokens, (best[:, 0] - best[:, 1]).min().item()


def sampled(model):
    """Greedy continuations, none of them a near-tie and none of them a loop; or nothing."""
    negative = torch.tensor([NEGATIVE])
    found = {"prompts": PROMPTS, "negative": NEGATIVE, "guidance": GUIDANCE, "plain": [], "guided": []}
    for prompt in PROMPTS:
        for name, guidance in [("plain", {}), ("guided", {"guidance_scale": GUIDANCE, "negative_prompt_ids": negative})]:
            tokens, margin = greedy(model, prompt, **guidance)
            if margin < 1.5e-3 or len(set(tokens)) < 40:
                return None
            found[name].append(tokens)
    assert all(p != g for p, g in zip(found["plain"], found["guided"])), "guidance must matter"
    return found


def write(tied, folder):
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(1000):
        lively(tied, seed).bfloat16().save_pretrained(folder, max_shard_size="10GB" if tied else "100KB")
        # Values are those of the weights as saved, computed in f32.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if (found := sampled(model)) is not None:
            break
        shutil.rmtree(folder)
    found = {"made_by": f"qwen2.py, torch {torch.__version__}, transformers {transformers.__version__}, seed {seed}",
             **found, **scored(model, folder)}
    (folder / "golden.json").write_text(json.dumps(found))


def compare(folder, ids, logits):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(input_ids=torch.tensor([ids])).logits[0]
    want = load_file(logits)["logits"]
    print(f"{type(model).__name__} of {folder}: logits {list(got.shape)} up to {want.abs().max():.3g}, "
          f"largest difference {(got - want).abs().max():.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--load")
    parser.add_argument("--ids", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--logits")
    args = parser.parse_args()
    if args.load:
        compare(args.load, args.ids, args.logits)
    else:
        write(True, pathlib.Path("qwen2/tied"))
        write(False, pathlib.Path("qwen2/untied"))
