"""Trains the miniature CLIP of the shapes world from scratch and exports it.

    python rewards/export/train_tiny_clip.py --data CORPUS --out rewards/models/clip --weights clip.pt

Three stages, so that a CPU suffices:
1. see: the lower half of the image tower learns from each patch which object lies in it (a head that is thrown away);
   found objects are what counts, colours and places are made of, and captions alone teach them many times as slowly;
2. relate: its tokens are computed once, and the upper half and the text tower learn from them by contrast;
3. together: everything is trained at once.

The contrast is CLIP's symmetric cross-entropy with three changes, all of which serve composition:
1. The false captions of every picture of a batch are extra columns for all pictures (after NegCLIP, Yuksekgonul et al.,
   2023), and half of a batch are pictures of the other half's false captions.
2. A pair is negative only where the caption is surely false: captions of a small world are often true elsewhere.
3. Every text also sees a damaged copy of its own picture as an extra row, so that a spoilt picture scores lower.

Works on a GPU where there is one and on the CPU otherwise; the seed fixes everything but the device's rounding, and
with --minutes also the number of steps depends on the device.
"""
import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F

from export_onnx import export_model, round_to_half, versions
from tiny_clip import CLASSES, COLORS, Corpus, TinyClip, damage, decode_like, normalise, swap_patches

IMPOSSIBLE = -1e4


class Batches:
    """Rows in pairs: a picture, then one whose caption is false for the first (or any other)."""

    def __init__(self, corpus, rows, seed):
        self.corpus, self.rows = corpus, rows
        self.generator = torch.Generator().manual_seed(seed)
        # What counting alone decides is learned long before what binds a colour or a place to a shape.
        hard = {"position": 4.0, "color_attr": 3.0, "free": 3.0}
        self.weights = torch.tensor([hard.get(corpus.tags[row], 1.0) for row in rows.tolist()])
        self.by_caption = {}
        for row in rows.tolist():
            self.by_caption.setdefault(int(corpus.caption[row]), []).append(row)

    def _below(self, n):
        return int(torch.randint(n, (1,), generator=self.generator))

    def draw(self, size):
        anchors = self.rows[torch.multinomial(self.weights, size // 2, generator=self.generator)]
        pairs = []
        for row in anchors.tolist():
            pictured = [text for text in self.corpus.negatives[row].tolist() if text in self.by_caption]
            group = self.by_caption[pictured[self._below(len(pictured))]] if pictured else self.rows
            pairs += [row, int(group[self._below(len(group))])]
        return torch.tensor(pairs)


def contrast(logits, target, false):
    """Cross-entropy of rows over columns where only the target and what is surely false compete."""
    compete = false.clone()
    compete[torch.arange(len(logits)), target] = True
    compete = compete.to(logits.device)
    return F.cross_entropy(logits.masked_fill(~compete, IMPOSSIBLE), target.to(logits.device))


def caption_loss(model, layout, corpus, rows, images, spoilt):
    """Pictures over short captions and false ones, short captions over pictures and damaged ones, both for long ones.

    `layout` reads from pictures and captions alike which class lies where. Without it relations are a saddle: a picture's
    embedding gains nothing from telling where what is before captions' embeddings tell it too, and the other way round.
    """
    n, own = len(rows), torch.arange(len(rows))
    scale = model.scale()
    variant = torch.randint(corpus.captions.shape[1], (n,))
    texts = torch.cat([corpus.captions[rows, variant], corpus.falsehoods[rows, variant].flatten()])
    false = corpus.surely_false(rows, texts)
    # A caption listed as false for a picture is so even where counting alone cannot tell.
    listed = (corpus.falsehoods[rows].flatten(1)[:, :, None] == texts[None, None, :]).any(1)
    false |= listed
    embedded = corpus.embed(model, texts)
    logits = scale * images @ embedded.T
    loss = contrast(logits, own, false)

    by_text, false_rows = logits[:, :n].T, false[:, :n].T
    if len(spoilt):
        # Only the first captions have a damaged picture; the others' column is masked like a true one.
        score = scale * (embedded[: len(spoilt)] * spoilt).sum(1)
        by_text = torch.cat([by_text, F.pad(score, (0, n - len(spoilt)))[:, None]], 1)
        false_rows = torch.cat([false_rows, (own < len(spoilt))[:, None]], 1)
    loss = loss + contrast(by_text, own, false_rows)

    # Long captions are costly and less often asked for, so a quarter of the rows has to do.
    few = own[: n // 4]
    long = corpus.long[rows[few]]
    false = corpus.surely_false(rows[few], long)
    logits = scale * images[few] @ corpus.embed(model, long).T
    loss = loss + 0.25 * (contrast(logits, few, false) + contrast(logits.T, few, false.T))

    said = corpus.relation[texts].to(images.device)
    tells = said.abs().sum(1) > 0
    read_from_text = F.smooth_l1_loss(layout(embedded[tells]).float(), said[tells]) if tells.any() else 0
    read_from_images = F.smooth_l1_loss(layout(images).float(), corpus.layout[rows].to(images.device))
    return loss + 5 * (read_from_text + read_from_images)


class Sight(torch.nn.Module):
    """What the tokens of the lower half are asked: the class and colour in their patch, and whether a centre is there."""

    def __init__(self, width):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in (len(CLASSES) + 1, len(COLORS) + 1, 2))

    def loss(self, tokens, patches):
        patches = patches.to(tokens.device)
        each = [
            F.cross_entropy(head(tokens).flatten(0, 1).float(), patches[:, at].flatten())
            for at, head in enumerate(self.heads)
        ]
        # Centres are rare, so their mean is small.
        return each[0] + each[1] + 3 * each[2]

    def accuracy(self, tokens, patches):
        patches = patches.to(tokens.device)
        right = []
        for at, head in enumerate(self.heads):
            asked = patches[:, at] > 0
            right.append((head(tokens).argmax(-1) == patches[:, at])[asked].float().mean().item())
        return [round(share, 3) for share in right]


def as_sampled(images, generator):
    """Right pictures as a policy draws them; a stray patch or two do not change what they show."""
    images = decode_like(images, generator)
    stray = torch.randint(0, 3, (len(images),), generator=generator, device=images.device)
    stray = stray * (torch.rand(len(images), generator=generator, device=images.device) < 0.3)
    return swap_patches(images, stray, True, generator)


def see(model, images):
    return model.image.see(normalise(images).contiguous(memory_format=torch.channels_last))


class Seen:
    """The lower half's tokens of some pictures, freshly disturbed and freshly damaged, and batches of those pictures."""

    @torch.no_grad()
    def __init__(self, model, batches, n_rows, generator):
        corpus = batches.corpus
        chosen = torch.multinomial(batches.weights, min(n_rows, len(batches.rows)), generator=batches.generator)
        rows = batches.rows[chosen].sort().values
        self.batches = Batches(corpus, rows, batches._below(2**31))
        self.at = torch.zeros(len(corpus.rows), dtype=torch.long)
        self.at[rows] = torch.arange(len(rows))
        right, damaged = [], []
        for part in rows.split(256):
            clean = corpus.images(part)
            right.append(see(model, as_sampled(clean, generator)).float())
            damaged.append(see(model, decode_like(damage(clean, generator), generator)).float())
        self.right, self.damaged = torch.cat(right), torch.cat(damaged)

    def draw(self, size):
        """Rows and the tokens of their pictures, then those of damaged pictures of the first third."""
        rows = self.batches.draw(size)
        at = self.at[rows]
        return rows, torch.cat([self.right[at], self.damaged[at[: size // 3]]])


@torch.no_grad()
def evaluate(model, corpus, rows, seed):
    """Accuracy against the three false captions by tag, and how often a clean picture beats a damaged one."""
    model.eval()
    generator = torch.Generator(device=corpus.device).manual_seed(seed)
    right, beaten, tags = [], [], []
    for part in rows.split(256):
        clean = corpus.images(part)
        image = model.image(normalise(clean))
        spoilt = model.image(normalise(damage(clean, generator)))
        texts = torch.cat([corpus.caption[part][:, None], corpus.negatives[part]], 1)
        text = corpus.embed(model, texts)
        scores = torch.einsum("bd,bkd->bk", image, text)
        right += (scores.argmax(1) == 0).tolist()
        beaten += (scores[:, 0] > (spoilt * text[:, 0]).sum(1)).tolist()
        tags += [corpus.tags[row] for row in part.tolist()]
    model.train()
    by_tag = {tag: sum(r for r, t in zip(right, tags) if t == tag) / tags.count(tag) for tag in sorted(set(tags))}
    return {
        "right_caption_of_4": round(sum(right) / len(right), 4),
        "right_caption_of_4_by_tag": {tag: round(value, 4) for tag, value in by_tag.items()},
        "clean_above_damaged": round(sum(beaten) / len(beaten), 4),
        "n_held_out": len(rows),
    }


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with images.bin and captions.jsonl")
    parser.add_argument("--out", required=True, help="folder for image.onnx, text.onnx and reward.toml")
    parser.add_argument("--weights", help="file for the torch weights, from which train_tiny_hps.py goes on")
    parser.add_argument("--start", help="weights of an earlier run to go on from")
    parser.add_argument("--see", type=int, default=900, help="steps of the first stage")
    parser.add_argument("--relate", type=int, default=2500, help="steps of the second stage")
    parser.add_argument("--cached", type=int, default=4000, help="pictures whose tokens are kept in the second stage")
    parser.add_argument("--renew", type=int, default=300, help="steps of the second stage until others are kept")
    parser.add_argument("--together", type=int, default=800, help="steps of the third stage")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=1e9, help="at most this long in all: stages end early")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice; 1 where other work shares the cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Stage:
    """One optimizer, one warm-up, one cosine, over so many steps or minutes, whichever ends first."""

    def __init__(self, name, modules, lr, limits):
        self.name, self.lr = name, lr
        self.n_steps, self.seconds = limits
        self.parameters = [p for module in modules for p in module.parameters()]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        plain = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

    def run(self, loss_of_step, report):
        """Returns the number of steps taken."""
        started, step = time.time(), 0
        while (done := max(step / self.n_steps if self.n_steps else 1, (time.time() - started) / self.seconds)) < 1:
            warm = min(1.0, (step + 1) / 40)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
            loss = loss_of_step(step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            step += 1
            if step % 50 == 0 or step == 10:
                print(f"{self.name} {step} {time.time() - started:.0f}s loss {loss.item():.3f} {report()}", flush=True)
        return step


class Training:
    """The three stages over one corpus."""

    def __init__(self, model, corpus, rows, held_out, args):
        self.model, self.corpus, self.rows, self.held_out, self.args = model, corpus, rows, held_out, args
        self.sight = Sight(model.image.norm.normalized_shape[0]).to(corpus.device)
        self.layout = torch.nn.Linear(model.embed_dim, 2 * len(CLASSES)).to(corpus.device)
        self.batches = Batches(corpus, rows, args.seed)
        self.generator = torch.Generator(device=corpus.device).manual_seed(args.seed)
        self.autocast = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16)

    def limits(self, stage):
        """Its steps, and its share of the minutes among the stages there are."""
        shares = {"see": 0.25, "relate": 0.5, "together": 0.25}
        taken = sum(share for name, share in shares.items() if getattr(self.args, name))
        return getattr(self.args, stage), shares[stage] / max(taken, 0.25) * 60 * self.args.minutes

    def held(self):
        return evaluate(self.model, self.corpus, self.held_out[:512], self.args.seed)

    @torch.no_grad()
    def seen(self):
        rows = self.held_out[:256]
        return self.sight.accuracy(see(self.model, self.corpus.images(rows)), self.corpus.patches[rows])

    def see(self):
        def loss(_step):
            rows = self.batches.draw(self.args.batch)
            with self.autocast():
                tokens = see(self.model, as_sampled(self.corpus.images(rows), self.generator))
                return self.sight.loss(tokens, self.corpus.patches[rows])

        modules = [self.model.image.stem, self.model.image.seeing, self.sight, Bare(self.model.image.position)]
        return Stage("see", modules, self.args.lr, self.limits("see")).run(loss, self.seen)

    def relate(self):
        seen = None

        def loss(step):
            nonlocal seen
            with self.autocast():
                # Other pictures and disturbances now and then, or the upper half would learn them by heart.
                if step % self.args.renew == 0:
                    seen = Seen(self.model, self.batches, self.args.cached, self.generator)
                rows, tokens = seen.draw(self.args.batch)
                images = self.model.image.relate(tokens).float()
                return caption_loss(self.model, self.layout, self.corpus, rows, images[: len(rows)], images[len(rows) :])

        image = self.model.image
        modules = [image.relating, image.norm, image.queries, image.summed, image.mixed, image.projection, self.model.text]
        modules += [Bare(image.place), Bare(self.model.log_scale), self.layout]
        return Stage("relate", modules, self.args.lr, self.limits("relate")).run(loss, self.held)

    def together(self):
        def loss(_step):
            rows = self.batches.draw(self.args.batch)
            clean = self.corpus.images(rows)
            spoilt = decode_like(damage(clean[: len(rows) // 3], self.generator), self.generator)
            with self.autocast():
                tokens = see(self.model, torch.cat([as_sampled(clean, self.generator), spoilt]))
                images = self.model.image.relate(tokens).float()
                captions = caption_loss(self.model, self.layout, self.corpus, rows, images[: len(rows)], images[len(rows) :])
                # A head that the first stage did not train would spoil tokens that an earlier run did.
                if not self.args.see:
                    return captions
                return captions + self.sight.loss(tokens[: len(rows)], self.corpus.patches[rows])

        stage = Stage("together", [self.model, self.sight, self.layout], self.args.lr / 2, self.limits("together"))
        return stage.run(loss, self.held)


class Bare(torch.nn.Module):
    """A parameter that belongs to no module of its own, as one, so that a stage can train it."""

    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus(args.data, args.device)
    n_held_out = min(2000, len(corpus.rows) // 10)
    rows = torch.arange(len(corpus.rows) - n_held_out)
    held_out = torch.arange(len(corpus.rows) - n_held_out, len(corpus.rows))
    model = TinyClip(corpus.known_ids)
    if args.start:
        model.load_state_dict(torch.load(args.start, map_location="cpu", weights_only=True)["state"])
    model = model.to(args.device)
    n_params = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("image", "text")}
    print(f"{len(corpus.rows)} pictures, {len(corpus.texts)} texts of at most {corpus.length} ids, parameters {n_params}")
    started = time.time()
    training = Training(model, corpus, rows, held_out, args)
    n_steps = [training.see(), training.relate(), training.together()]
    round_to_half(model)
    measured = evaluate(model, corpus, held_out, args.seed)
    print(json.dumps(measured))
    provenance = {
        "command": f"train_tiny_clip.py --see {args.see} --relate {args.relate} --together {args.together} --batch {args.batch} --lr {args.lr} --seed {args.seed}"
        + (f" --minutes {args.minutes}" if args.minutes < 1e9 else ""),
        "steps_taken": n_steps,
        "start": args.start and os.path.basename(args.start),
        "minutes": round((time.time() - started) / 60, 1),
        "device": args.device,
        "n_pictures": len(corpus.rows),
        "held_out": measured,
        "versions": versions(),
    }
    os.makedirs(args.out, exist_ok=True)
    if args.weights:
        torch.save({"known_ids": model.known_ids, "state": model.state_dict()}, args.weights)
    export_model(model, args.out, "clip", provenance)


if __name__ == "__main__":
    main()
