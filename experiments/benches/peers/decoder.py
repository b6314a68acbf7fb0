"""The peer of benches/decoder.rs: PyTorch and transformers, one lap for each line `go` on its standard input.

    python decoder.py FOLDER THREADS train BATCH LENGTH
    python decoder.py FOLDER THREADS decode BATCH PROMPT NEW
    python decoder.py FOLDER THREADS adamw

FOLDER is a Hugging Face folder; the ids of a batch are (i * 7919 + 13) % vocabulary, row after row.
Versions: peers/requirements.txt.
"""

import json
import os
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM


def main():
    folder, threads, mode, *sizes = sys.argv[1:]
    sizes = [int(size) for size in sizes]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = mode == "decode"
    lap = {"train": train, "decode": decode, "adamw": adamw}[mode](model, *sizes)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        seconds, value = lap()
        print(json.dumps({"seconds": seconds, "value": value}), flush=True)
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    print(json.dumps({"peak_bytes": 1024.0 * int(peak)}), flush=True)


def ids_of(model, batch, length):
    return ((torch.arange(batch * length) * 7919 + 13) % model.config.vocab_size).reshape(batch, length)


def train(model, batch, length):
    model.train()
    ids = ids_of(model, batch, length)

    def lap():
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seconds = time.perf_counter() - start
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        return seconds, [loss.item(), norm.item()]

    return lap


def decode(model, batch, prompt, new):
    model.eval()
    ids = ids_of(model, batch, prompt)

    def lap():
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start, out[0, prompt:].tolist()

    return lap


def adamw(model):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def lap():
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start, []

    return lap


if __name__ == "__main__":
    main()
