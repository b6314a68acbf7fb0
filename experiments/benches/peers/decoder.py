"""transformers and torch as the peer of experiments/benches/decoder.rs, which starts it and speaks to it in lines.

    python decoder.py FOLDER THREADS train BATCH LENGTH | decode BATCH PROMPT NEW | adamw

FOLDER holds config.json and model.safetensors in f32. A lap is a forward and a backward pass, a greedy generation, or a
step of the fused AdamW; its value is [loss, norm of the gradient], the new ids of the first row, or nothing.
"""
import sys
import time

from protocol import Channel, quiet

CHANNEL = Channel()
quiet()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

PIECE = 1 << 20


def ids(model, batch, length):
    """The bench's own formula, so that both sides read the same without a file."""
    flat = (torch.arange(batch * length) * 7919 + 13) % model.config.vocab_size
    return flat.reshape(batch, length)


def norm(model):
    """In f64, since f32 sums of so many squares differ in the digits that are compared; by pieces, which make no peak."""
    pieces = (piece for param in model.parameters() for piece in param.grad.view(-1).split(PIECE))
    return sum(float(piece.double().square().sum()) for piece in pieces) ** 0.5


def train(model, batch, length):
    rows = ids(model, batch, length)
    model.train()

    def lap():
        started = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        seconds = time.perf_counter() - started
        return seconds, [loss.item(), norm(model)]

    return lap


def decode(model, batch, prompt, new):
    prompts = ids(model, batch, prompt)
    model.eval()
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}

    def lap():
        started = time.perf_counter()
        rows = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings)
        seconds = time.perf_counter() - started
        return seconds, rows[0, prompt:].tolist()

    return lap


def adamw(model):
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def lap():
        started = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - started, []

    return lap


def main():
    folder, threads, mode, *sizes = sys.argv[1:]
    torch.set_num_threads(int(threads))
    CHANNEL.imported()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    lap = {"train": train, "decode": decode, "adamw": adamw}[mode](model, *map(int, sizes))
    CHANNEL.say("ready")
    while CHANNEL.wait():
        CHANNEL.lap(*lap())


if __name__ == "__main__":
    main()
