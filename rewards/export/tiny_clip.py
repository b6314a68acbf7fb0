"""The miniature CLIP of the shapes world: its towers, its corpus, and the damage it learns to see.

Shared by train_tiny_clip.py, train_tiny_hps.py and export_onnx.py; needs torch, numpy, scipy and open_clip_torch (for the
byte-pair tokenizer alone: no weights are loaded).
"""
import json
import os
import re
import zlib

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

SIDE = 64
# The ground that the corpus is drawn on.
GREY_BYTE = 150
GREY = GREY_BYTE / 255
CONTEXT = 77
CLIP_VOCABULARY = 49408
END_OF_TEXT = 49407
PAD, UNKNOWN = 0, 1
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Attention(nn.Module):
    """Multi-head self-attention out of plain operations, so that every exporter and runtime knows them."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        head = width // self.n_heads
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * head**-0.5
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width, n_heads, mlp_ratio):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x, mask=None):
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


def coordinates():
    """`[1, 64, 2]`: column and row of each patch, from -1 to 1."""
    line = torch.linspace(-1, 1, SIDE // 8)
    return torch.stack([line.repeat(SIDE // 8), line.repeat_interleave(SIDE // 8)], -1)[None]


class ImageTower(nn.Module):
    """`[B, 3, 64, 64]` to `[B, D]`: a stem of three strided convolutions to 8x8 tokens, layers, pooling.

    `see` makes tokens that know what lies in their patch, `relate` what that means together. Pooling is a sum and four
    attention queries: a sum can count, and each query looks for something else.
    """

    def __init__(self, embed_dim, width=128, n_seeing=2, n_relating=2, n_queries=4):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(24, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn(1, (SIDE // 8) ** 2, width) * 0.02)
        self.seeing = nn.ModuleList(Block(width, 4, 2) for _ in range(n_seeing))
        # What lies in a patch can be told without knowing where it is, so the upper half is told again.
        self.place = nn.Parameter(coordinates() @ torch.randn(2, width) * 0.5 + torch.randn(1, (SIDE // 8) ** 2, width) * 0.05)
        self.relating = nn.ModuleList(Block(width, 4, 2) for _ in range(n_relating))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, n_queries)
        self.summed = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.mixed = nn.Sequential(nn.Linear((n_queries + 1) * width, 2 * width), nn.GELU())
        self.projection = nn.Linear(2 * width, embed_dim, bias=False)

    def see(self, pixel_values):
        """`[B, 64, width]`: one token for each patch of 8x8 pixels."""
        x = self.stem(pixel_values).flatten(2).transpose(1, 2) + self.position
        for layer in self.seeing:
            x = layer(x)
        return x

    def relate(self, x):
        x = x + self.place
        for layer in self.relating:
            x = layer(x)
        x = self.norm(x)
        asked = (self.queries(x).softmax(1).transpose(1, 2) @ x).flatten(1)
        pooled = torch.cat([asked, self.summed(x).mean(1) * 8], 1)
        return F.normalize(self.projection(self.mixed(pooled)), dim=-1)

    def forward(self, pixel_values):
        return self.relate(self.see(pixel_values))


class TextTower(nn.Module):
    """`[B, T]` CLIP ids to `[B, D]`: the ids of the world's words are renamed, all others share one row."""

    def __init__(self, embed_dim, known_ids, width=96, n_layers=2):
        super().__init__()
        rename = torch.full((CLIP_VOCABULARY,), UNKNOWN, dtype=torch.uint8)
        for new, old in enumerate(sorted(known_ids), start=UNKNOWN + 1):
            assert new < 256, f"{len(known_ids)} distinct ids; the rename table holds 254"
            rename[old] = new
        rename[0] = PAD
        self.register_buffer("rename", rename)
        self.embedding = nn.Embedding(len(known_ids) + 2, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.layers = nn.ModuleList(Block(width, 4, 2) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.register_buffer("causal", torch.full((CONTEXT, CONTEXT), -1e4).triu(1))

    def forward(self, input_ids):
        # Trailing padding never reaches the end token (the mask is causal), so training may cut it off.
        length = input_ids.shape[1]
        x = self.embedding(self.rename[input_ids].long()) + self.position[:length]
        mask = self.causal[:length, :length]
        for layer in self.layers:
            x = layer(x, mask)
        end = input_ids.argmax(1)
        last = x.gather(1, end.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)
        return F.normalize(self.projection(self.norm(last)), dim=-1)


class TinyClip(nn.Module):
    """Two towers and the learned factor on their cosines."""

    def __init__(self, known_ids, embed_dim=128):
        super().__init__()
        self.known_ids = sorted(known_ids)
        self.embed_dim = embed_dim
        self.image = ImageTower(embed_dim)
        self.text = TextTower(embed_dim, self.known_ids)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def scale(self):
        return self.log_scale.clamp(max=float(np.log(100.0))).exp()


def normalise(images):
    """`[B, 3, 64, 64]` in `[0, 1]` to the towers' input."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / std


class Corpus:
    """A folder with `images.bin` (RGB bytes, 64x64) and `captions.jsonl` (caption, long, negatives, tag, include).

    The long caption names every object of a picture with its colour, so the truth of any short caption can be counted.
    """

    def __init__(self, folder, device):
        with open(os.path.join(folder, "captions.jsonl")) as lines:
            self.rows = [json.loads(line) for line in lines]
        pixels = np.fromfile(os.path.join(folder, "images.bin"), dtype=np.uint8).reshape(-1, SIDE, SIDE, 3)
        assert len(pixels) == len(self.rows), f"{len(pixels)} images but {len(self.rows)} captions"
        self.device = device
        self.objects = [parse_long(row["long"]) for row in self.rows]
        self.pixels = torch.from_numpy(pixels)
        self.tags = [row["tag"] or "free" for row in self.rows]
        self._index_texts()
        self._count_objects()
        cache = os.path.join(folder, "patches.npy")
        if not os.path.exists(cache):
            np.save(cache, find_patches(pixels, self.objects))
        self.patches = torch.from_numpy(np.load(cache)).long()
        self.layout = layouts(self.patches)

    def _index_texts(self):
        tokenizer = open_clip.get_tokenizer("ViT-H-14")
        for row in self.rows:
            # A scene may allow fewer than three false captions; repeating one leaves the loss as it is.
            false = row["negatives"] or ["a photo of five " + ("stars" if "star" not in row["caption"] else "rings")]
            row["negatives"] = (false * 3)[:3]
        told = [[(row["caption"], row["negatives"]), *more_captions(row["long"])] for row in self.rows]
        texts = {text for row in told for caption, false in row for text in (caption, *false)}
        texts = sorted(texts | {row["long"] for row in self.rows})
        number = {text: at for at, text in enumerate(texts)}
        ids = torch.cat([tokenizer(texts[at : at + 4096]) for at in range(0, len(texts), 4096)])
        self.known_ids = sorted(set(ids.unique().tolist()) - {0})
        self.length = int(ids.argmax(1).max()) + 1
        self.ids = ids[:, : self.length]
        self.caption = torch.tensor([number[row["caption"]] for row in self.rows])
        self.long = torch.tensor([number[row["long"]] for row in self.rows])
        self.negatives = torch.tensor([[number[text] for text in row["negatives"]] for row in self.rows])
        # The last caption of a row is repeated up to three, so that each draws one of three with equal chances.
        told = [(row * 3)[:3] for row in told]
        self.captions = torch.tensor([[number[caption] for caption, _ in row] for row in told])
        self.falsehoods = torch.tensor([[[number[text] for text in false] for _, false in row] for row in told])
        self.texts = texts
        said = [parse_text(text) for text in texts]
        self.said_kind = torch.tensor([[kind for kind, _ in phrases] for phrases in said])
        relations = [parse_relation(text) for text in texts]
        self.relation = torch.tensor([code for code in relations])
        self.said_count = torch.tensor([[count for _, count in phrases] for phrases in said])

    def _count_objects(self):
        """`[N, 71]`: how many objects of each coloured class, then of each class, then 0 for "nothing said"."""
        self.counts = torch.zeros(len(self.rows), N_KINDS + 1, dtype=torch.long)
        for at, objects in enumerate(self.objects):
            for color, kind in objects:
                self.counts[at, kind_of(color, kind)] += 1
                self.counts[at, kind_of(None, kind)] += 1

    def surely_false(self, rows, texts):
        """`[B, K]`: captions that counting alone refutes; a wrong relation or place does not show here."""
        held = torch.ones(len(rows), len(texts), dtype=torch.bool)
        counts = self.counts[rows]
        for slot in range(MAX_PHRASES):
            have = counts[:, self.said_kind[texts][:, slot]]
            wanted = self.said_count[texts][:, slot]
            held &= torch.where(wanted <= 1, have >= wanted, have == wanted)
        return ~held

    def images(self, rows):
        """`[B, 3, 64, 64]` in `[0, 1]`."""
        return self.pixels[rows].to(self.device).permute(0, 3, 1, 2).float() / 255

    def embed(self, model, texts):
        """Embeds each distinct text once."""
        distinct, back = texts.flatten().unique(return_inverse=True)
        ids = self.ids[distinct]
        ids = ids[:, : int(ids.argmax(1).max()) + 1]
        return model.text(ids.to(self.device))[back.to(self.device)].view(*texts.shape, -1)


CLASSES = ["circle", "square", "triangle", "star", "cross", "ring"]
PLURALS = {name + ("es" if name == "cross" else "s"): name for name in CLASSES}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
N_KINDS = len(CLASSES) * (len(COLORS) + 1)
MAX_PHRASES = 4
PHRASE = re.compile(r"\b(an?|two|three|four|five) (?:(%s) )?(%s)\b" % ("|".join(COLORS), "|".join([*PLURALS, *CLASSES])))


def kind_of(color, name):
    """The column of "a red circle" or, without a colour, of "a circle"."""
    at = CLASSES.index(name)
    return N_KINDS - len(CLASSES) + at if color is None else at * len(COLORS) + COLORS.index(color)


def parse_long(text):
    """`[(color, class)]` of every object."""
    return [(color, PLURALS.get(name, name)) for _, color, name in PHRASE.findall(text)]


def more_captions(text):
    """What else is true of a picture of two different classes, with three false captions each: where, and how coloured.

    A long caption names the ninth of the frame of each object. Two ninths of one row or column have a clear relation; of
    two diagonal ones nothing is said.
    """
    parts = re.findall(r"an? (%s) (%s) (?:in|on) the ((?:top|bottom|left|right|center)(?: left| right)?)" % (
        "|".join(COLORS), "|".join(CLASSES)), text)
    if len(parts) != 2 or parts[0][1] == parts[1][1]:
        return []
    (a_color, a, a_area), (b_color, b, b_area) = parts
    more = []
    across = third(a_area, "left", "right") - third(b_area, "left", "right")
    along = third(a_area, "top", "bottom") - third(b_area, "top", "bottom")
    if (across == 0) != (along == 0):
        says, denies = {True: ("right of", "left of"), False: ("left of", "right of")}[across > 0]
        if across == 0:
            says, denies = {True: ("below", "above"), False: ("above", "below")}[along > 0]
        def say(first, word, second):
            return f"a photo of a {first} {word} a {second}"
        other = pick([name for name in CLASSES if name not in (a, b)], text)
        more.append((say(a, says, b), [say(a, denies, b), say(b, says, a), say(a, says, other)]))
    if a_color != b_color:
        def paint(first, second):
            article = ["an" if color == "orange" else "a" for color in (first, second)]
            return f"a photo of {article[0]} {first} {a} and {article[1]} {second} {b}"
        other = pick([color for color in COLORS if color not in (a_color, b_color)], text)
        more.append((paint(a_color, b_color), [paint(b_color, a_color), paint(a_color, other), paint(other, b_color)]))
    return more


def pick(names, text):
    """Any of the names, evenly spread over texts and the same in every run."""
    return names[zlib.crc32(text.encode()) % len(names)]


def third(area, low, high):
    return (high in area.split()) - (low in area.split())


def parse_text(text):
    """Four pairs of kind and count, 0 of the last column where fewer are said; relations and places are left out."""
    found = [(kind_of(color or None, PLURALS.get(name, name)), NUMBERS[n]) for n, color, name in PHRASE.findall(text)]
    assert 1 <= len(found) <= MAX_PHRASES, text
    return found + [(N_KINDS, 0)] * (MAX_PHRASES - len(found))


def parse_relation(text):
    """`[12]`: which way each class is said to lie off the other, across and down; all 0 where no relation is said."""
    code = [0.0] * (2 * len(CLASSES))
    said = re.search(r"an? (?:\w+ )?(%s) (left of|right of|above|below) an? (?:\w+ )?(%s)" % (("|".join(CLASSES),) * 2), text)
    if said:
        first, word, second = said.groups()
        axis, sign = {"left of": (0, -1.0), "right of": (0, 1.0), "above": (1, -1.0), "below": (1, 1.0)}[word]
        code[2 * CLASSES.index(first) + axis] = sign
        code[2 * CLASSES.index(second) + axis] = -sign
    return code


def layouts(patches):
    """`[N, 12]`: how far the objects of each class lie off the middle of all objects, across and down, about -2 to 2."""
    centre = (patches[:, 2] > 0) & (patches[:, 0] > 0)
    kinds = F.one_hot((patches[:, 0] - 1).clamp(min=0), len(CLASSES)).float() * centre[..., None]
    middle = (centre[..., None] * coordinates()).sum(1, keepdim=True) / centre.sum(1).clamp(min=1)[:, None, None]
    return 2 * (kinds[..., None] * (coordinates() - middle)[:, :, None]).sum(1).flatten(1)


def find_patches(pixels, objects):
    """`[N, 3, 64]`: for each patch, class and colour of the object in it and whether its centre is there.

    0 is none; -100 is a class that is not clear. Objects never touch, so each is a connected region; its class is that
    of the long caption's object of its colour, where only one class has that colour.
    """
    found = np.zeros((len(pixels), 3, 64), dtype=np.int8)
    for at, (picture, told) in enumerate(zip(pixels, objects)):
        apart = (np.abs(picture.astype(np.int16) - GREY_BYTE) > 40).any(2)
        labels, n_regions = ndimage.label(apart, structure=np.ones((3, 3)))
        for region, box in zip(range(1, n_regions + 1), ndimage.find_objects(labels)):
            mask = labels == region
            color = np.abs(np.median(picture[mask].astype(np.int32), axis=0)[None] - PALETTE).sum(1).argmin()
            names = {name for painted, name in told if painted == COLORS[color]}
            share = mask.reshape(8, 8, 8, 8).sum((1, 3)).flatten()
            y, x = (int((side.start + side.stop) // 2) // 8 for side in box)
            inside = share >= 12
            found[at, 0, inside] = CLASSES.index(names.pop()) + 1 if len(names) == 1 else -100
            found[at, 1, inside] = color + 1
            found[at, 2, y * 8 + x] = 1
    return found


PALETTE = np.array([
    [220, 25, 30], [255, 140, 0], [255, 230, 30], [25, 150, 50], [25, 70, 225], [125, 30, 170], [255, 130, 200],
    [115, 65, 20], [10, 10, 10], [255, 255, 255],
])


def blur(images, strength):
    """A 3x3 binomial blur mixed in by `strength` `[B]`."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=images.device)
    kernel = (kernel[:, None] * kernel[None, :] / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return images + strength.view(-1, 1, 1, 1) * (soft - images)


def chance(images, probability, generator):
    draws = torch.rand(len(images), generator=generator, device=images.device)
    return (draws < probability).float()


def uniform(images, low, high, generator):
    return low + (high - low) * torch.rand(len(images), generator=generator, device=images.device)


def decode_like(images, generator):
    """What a small autoencoder does to a right picture: softer edges, slightly other colours, faint noise."""
    images = blur(images, chance(images, 0.7, generator) * uniform(images, 0, 1, generator))
    images = blur(images, chance(images, 0.3, generator) * uniform(images, 0, 1, generator))
    shape = (len(images), 3, 1, 1)
    gain = 1 + 0.06 * torch.randn(shape, generator=generator, device=images.device)
    shift = 0.025 * torch.randn(shape, generator=generator, device=images.device)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    level = chance(images, 0.5, generator) * uniform(images, 0, 0.05, generator)
    return (images * gain + shift + level.view(-1, 1, 1, 1) * noise).clamp(0, 1)


def swap_patches(images, n_patches, aligned, generator):
    """Replaces `n_patches` `[B]` of the 64 patches of 8x8 by those of the picture before, as a poor sampler does."""
    other = images.roll(1, 0)
    if not aligned:
        other = other.roll((8, 16), (2, 3))
    order = torch.rand(len(images), 64, generator=generator, device=images.device).argsort(1).argsort(1)
    mask = (order < n_patches.view(-1, 1)).float().view(-1, 1, 8, 8)
    mask = F.interpolate(mask, scale_factor=8, mode="nearest")
    return images + mask * (other - images)


def window_on_shape(images, half, generator):
    """A square mask of half-width `half` `[B]` around a random pixel that is not background."""
    apart = (images - GREY).abs().sum(1).flatten(1) > 0.25
    draws = torch.rand(apart.shape, generator=generator, device=images.device) * (apart.float() + 1e-3)
    at = draws.argmax(1)
    y, x = (at // SIDE).view(-1, 1), (at % SIDE).view(-1, 1)
    grid = torch.arange(SIDE, device=images.device).view(1, -1)
    half = half.view(-1, 1)
    inside = ((grid - y).abs() <= half).float()[:, :, None] * ((grid - x).abs() <= half).float()[:, None, :]
    return inside[:, None]


def damage(images, generator):
    """Pictures that no longer show what they should: a shape gone, covered, mangled, or many patches of another."""
    half = uniform(images, 7, 14, generator)
    window = window_on_shape(images, half, generator)
    gone = images + window * (GREY - images)
    covered = images + window * (images.roll(1, 0).roll((8, -8), (2, 3)) - images)
    mangled = images + window * (images.flip(2).roll((5, 9), (2, 3)) - images)
    patched = swap_patches(images, uniform(images, 6, 20, generator), True, generator)
    strewn = swap_patches(images, uniform(images, 4, 12, generator), False, generator)
    kinds = torch.stack([gone, covered, mangled, patched, strewn])
    kind = torch.randint(len(kinds), (len(images),), generator=generator, device=images.device)
    return kinds[kind, torch.arange(len(images), device=images.device)]
