"""PyTorch on the same card as experiments/benches/card.rs: the 0.5B shape with random weights, torch alone.

    python card.py [--small]

A decoder of torch's own operations (scaled_dot_product_attention, rms_norm, a fused AdamW) in bf16 with f32 masters under
autocast, as a trainer would write it. Drawing captures one token's work in a CUDA graph over a static cache, with the
visual rows of the head alone and inverse-CDF sampling on the card. Prints the rows of card.rs's table.
"""
import sys
import time

import torch
import torch.nn.functional as F

SMALL = "--small" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, WIDE, LAYERS, HEADS, KV, D, VISUAL, POSITIONS = (
    (64, 96, 2, 4, 2, 16, 128, 64) if SMALL else (896, 4864, 24, 14, 2, 64, 64_000, 4608)
)
PROMPT = 12


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm, self.post_norm = torch.nn.RMSNorm(H, 1e-6), torch.nn.RMSNorm(H, 1e-6)
        self.qkv = torch.nn.Linear(H, (HEADS + 2 * KV) * D)
        self.out = torch.nn.Linear(HEADS * D, H, bias=False)
        self.gate_up, self.down = torch.nn.Linear(H, 2 * WIDE, bias=False), torch.nn.Linear(WIDE, H, bias=False)

    def heads(self, x, cos, sin):
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.input_norm(x)).split([HEADS * D, KV * D, KV * D], -1)
        q, k, v = (t.view(rows, length, -1, D).transpose(1, 2) for t in (q, k, v))

        def turn(t):
            low, high = t.chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(v.dtype)

        return turn(q), turn(k), v

    def finish(self, x, attended):
        rows, _, length, _ = attended.shape
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, HEADS * D))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VISUAL, H)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = torch.nn.RMSNorm(H, 1e-6), torch.nn.Linear(H, VISUAL, bias=False)
        angles = torch.arange(POSITIONS)[:, None] * 1e6 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def hidden(self, ids):
        x, n = self.embedding(ids), ids.shape[1]
        for layer in self.layers:
            q, k, v = layer.heads(x, self.cos[:n], self.sin[:n])
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return self.norm(x)


def sync():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(work, rounds=3):
    all_of_them = []
    for _ in range(rounds + 1):
        sync()
        started = time.perf_counter()
        work()
        sync()
        all_of_them.append(time.perf_counter() - started)
    return sorted(all_of_them[1:])[rounds // 2]


def say(case, taken, speed):
    print(f"| torch: {case} | {taken:.3f} | {speed} | | |", flush=True)


def update(model, rows, length):
    ids = (torch.arange(rows * length, device=DEVICE) * 7919 % VISUAL).reshape(rows, length)

    def lap():
        model.zero_grad(set_to_none=True)
        for row in ids.split(1):  # a row's logits are 1 GB in f32: as many at a time as a trainer would
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model.head(model.hidden(row[:, :-1]))
            F.cross_entropy(logits.float().flatten(0, 1), row[:, 1:].flatten()).backward()

    return lap


@torch.no_grad()
def drawer(model, rows, n):
    """Draws n tokens of each row with one captured step."""
    room = PROMPT + n
    caches = [torch.zeros(2, rows, KV, room, D, device=DEVICE, dtype=torch.bfloat16) for _ in model.layers]
    ids, place = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    seen = torch.arange(room, device=DEVICE)

    def step():
        x = model.embedding(ids)
        cos, sin, mask = model.cos[place], model.sin[place], (seen <= place)[None, None, None]
        for layer, cache in zip(model.layers, caches):
            q, k, v = layer.heads(x, cos, sin)
            cache[0].index_copy_(2, place, k)
            cache[1].index_copy_(2, place, v)
            attended = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask, enable_gqa=True)
            x = layer.finish(x, attended)
        law = model.head(model.norm(x))[:, -1].float().softmax(-1)
        ids.copy_((law.cumsum(-1) < torch.rand(rows, 1, device=DEVICE)).sum(-1, keepdim=True).clamp_max(VISUAL - 1))
        place.add_(1)

    if DEVICE != "cuda":
        def lap():
            place.zero_()
            for _ in range(n):
                step()

        return lap
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def lap():
        place.zero_()
        for _ in range(n):
            graph.replay()

    return lap


def main():
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    for rows in [1] if SMALL else [1, 4, 8]:
        length = 20 if SMALL else 4108
        taken = seconds(update(model, rows, length))
        say(f"update {rows} x {length - 1}", taken, f"{rows * (length - 1) / taken:.0f} tokens/s")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=DEVICE == "cuda")
    taken = seconds(optimiser.step)
    say("AdamW, fused", taken, f"{28 * sum(p.numel() for p in model.parameters()) / taken / 1e9:.0f} GB/s")
    model = model.to(torch.bfloat16)
    model.cos, model.sin = model.cos.float(), model.sin.float()
    for rows in [1, 2] if SMALL else [1, 4, 28, 64]:
        n = 9 if SMALL else 4096
        taken = seconds(drawer(model, rows, n), 1)
        say(f"draw {rows} of {n} tokens", taken, f"{taken / rows:.3f} s/image, {rows * n / taken:.0f} tokens/s")


if __name__ == "__main__":
    main()
