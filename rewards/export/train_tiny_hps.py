"""Fine-tunes the miniature CLIP on preference pairs, as HPSv2 is made from CLIP, and exports it.

    python rewards/export/train_tiny_hps.py --data CORPUS --weights clip.pt --out rewards/models/hps

The loss is HPSv2's (Wu et al., 2023, "Human Preference Score v2", section 4): for a prompt and two pictures, the
cross-entropy of a softmax over the two scaled cosines against the preferred one.

The preferences are SYNTHETIC: no person was asked. A stated rule prefers, in this order,
1. a picture for which the prompt is true over one for which it is false;
2. a clean picture over a damaged one;
3. of two clean true pictures, the one with the higher appeal: the share of the picture that its shapes cover, minus
   the distance of their common centre from the middle (both in [0, 1]); closer than 0.03 is no preference.
So it measures what an HPS measures in kind, composition and looks together, and nothing about human taste.
"""
import argparse
import json
import os
import time

import torch
import torch.nn.functional as F

from export_onnx import export_model, round_to_half, versions
from tiny_clip import GREY, SIDE, Corpus, TinyClip, damage, decode_like, normalise
from train_tiny_clip import Batches, evaluate

LEAST_DIFFERENCE = 0.03


def appeal(images):
    """Covered share minus the distance of the shapes' centre from the middle, `[B]`."""
    covered = ((images - GREY).abs().sum(1) > 0.25).float()
    total = covered.sum((1, 2)).clamp(min=1)
    place = (torch.arange(SIDE, device=images.device) + 0.5) / SIDE - 0.5
    x = (covered.sum(1) * place).sum(1) / total
    y = (covered.sum(2) * place).sum(1) / total
    return covered.mean((1, 2)) - (x**2 + y**2).sqrt()


class Pairs:
    """For each row a prompt, its picture and a second one; +1 where the first is preferred, -1 the second, 0 neither."""

    def __init__(self, corpus, rows, seed):
        self.corpus = corpus
        self.batches = Batches(corpus, rows, seed)
        self.generator = torch.Generator(device=corpus.device).manual_seed(seed)

    def draw(self, size):
        """The pairs of each of the three rules, in thirds: rows, first pictures, second pictures, preferences."""
        rows = self.batches.draw(size - size % 6)
        third = len(rows) // 3
        first = self.corpus.images(rows)
        second = first.clone()
        preference = torch.ones(len(rows), device=first.device)

        # The partner beside each row shows what is false of it, or the batch would not have paired them; where it was
        # a random picture, counting decides and unclear pairs are dropped.
        other = rows[torch.arange(third) ^ 1]
        second[:third] = self.corpus.images(other)
        preference[:third] = self._is_false(rows[:third], other).to(first.device).float()

        second[third : 2 * third] = damage(first[third : 2 * third], self.generator)

        same = torch.tensor([self._same_caption(row) for row in rows[2 * third :].tolist()])
        second[2 * third :] = self.corpus.images(same)
        difference = appeal(first[2 * third :]) - appeal(second[2 * third :])
        preference[2 * third :] = torch.where(difference.abs() < LEAST_DIFFERENCE, 0.0, difference.sign())
        return rows, first, second, preference

    def _is_false(self, rows, others):
        listed = (self.corpus.negatives[others] == self.corpus.caption[rows][:, None]).any(1)
        return self.corpus.surely_false(others, self.corpus.caption[rows]).diagonal() | listed

    def _same_caption(self, row):
        group = self.batches.by_caption[int(self.corpus.caption[row])]
        return group[self.batches._below(len(group))]


def margins(model, corpus, rows, first, second):
    """Scaled cosine of the first picture minus that of the second, `[B]`."""
    images = model.image(normalise(torch.cat([first, second]))).float()
    text = corpus.embed(model, corpus.caption[rows]).float()
    first, second = images.chunk(2)
    return model.scale() * ((first - second) * text).sum(1)


@torch.no_grad()
def agreement(model, corpus, rows, seed):
    """How often the model prefers what the rule prefers, by rule."""
    model.eval()
    pairs, by_rule = Pairs(corpus, rows, seed), {"true": [], "clean": [], "appealing": []}
    for _ in range(10):
        drawn, first, second, preference = pairs.draw(192)
        right = margins(model, corpus, drawn, first, second) * preference > 0
        for rule, right, preference in zip(by_rule, right.chunk(3), preference.chunk(3)):
            by_rule[rule] += right[preference != 0].tolist()
    model.train()
    return {rule: round(sum(right) / max(1, len(right)), 4) for rule, right in by_rule.items()}


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with images.bin and captions.jsonl")
    parser.add_argument("--weights", required=True, help="what train_tiny_clip.py --weights wrote")
    parser.add_argument("--out", required=True, help="folder for image.onnx, text.onnx and reward.toml")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop early, with the schedule bent to end in time")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice; 1 where other work shares the cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train(model, corpus, rows, args):
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    pairs, started, step = Pairs(corpus, rows, args.seed), time.time(), 0
    generator = torch.Generator(device=corpus.device).manual_seed(args.seed)
    while (done := max(step / args.steps, (time.time() - started) / (60 * args.minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20) * (1 - done)
        drawn, first, second, preference = pairs.draw(args.batch)
        first, second = decode_like(first, generator), decode_like(second, generator)
        with torch.autocast(corpus.device if isinstance(corpus.device, str) else corpus.device.type, torch.bfloat16):
            margin = margins(model, corpus, drawn, first, second)
        losses = F.softplus(-margin * preference) * (preference != 0)
        loss = losses.sum() / (preference != 0).sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            print(f"{step} {time.time() - started:.0f}s loss {loss.item():.3f}", flush=True)
    return step


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus(args.data, args.device)
    n_held_out = min(2000, len(corpus.rows) // 10)
    rows = torch.arange(len(corpus.rows) - n_held_out)
    held_out = torch.arange(len(corpus.rows) - n_held_out, len(corpus.rows))
    saved = torch.load(args.weights, map_location="cpu", weights_only=True)
    model = TinyClip(saved["known_ids"])
    model.load_state_dict(saved["state"])
    model = model.to(args.device)
    before = agreement(model, corpus, held_out, args.seed)
    print("agreement before", before, flush=True)
    started = time.time()
    n_steps = train(model, corpus, rows, args)
    round_to_half(model)
    measured = {
        "agreement_before": before,
        "agreement": agreement(model, corpus, held_out, args.seed),
        **evaluate(model, corpus, held_out, args.seed),
    }
    print(json.dumps(measured))
    provenance = {
        "preferences": "synthetic: true over false, then clean over damaged, then larger and better centred",
        "command": f"train_tiny_hps.py --steps {args.steps} --batch {args.batch} --lr {args.lr} --seed {args.seed}"
        + (f" --minutes {args.minutes}" if args.minutes < 1e9 else ""),
        "steps_taken": n_steps,
        "minutes": round((time.time() - started) / 60, 1),
        "device": args.device,
        "n_pictures": len(corpus.rows),
        "held_out": measured,
        "versions": versions(),
    }
    os.makedirs(args.out, exist_ok=True)
    export_model(model, args.out, "hps", provenance)


if __name__ == "__main__":
    main()
