"""Golden values for policies/tests/cosmos.rs from the three-dimensional original of the tokenizer.

An independent implementation, at tiny width with random weights, of Cosmos' factorised video autoencoder
(CausalConv3d pairs, per-frame GroupNorm, spatial and causal temporal attention, hybrid resampling, 3-D Haar wavelets),
run on a single frame. The weights are then folded to the two-dimensional form that grpo-policies computes, and both
are stored: cosmos.safetensors (folded weights) and cosmos.json (config, input, latents, codes, pixels).

    python policies/tests/golden/cosmos.py

Written with Python 3.11, torch 2.11.0 and safetensors 0.8.0; computed in float64, stored in float32.
"""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "channels": 8,
    "channels_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "patch_size": 4,
    "z_channels": 6,
    "embedding_dim": 4,
    "levels": [8, 5, 5, 6],
    "spatial_compression": 16,
    "temporal_compression": 8,
}


class CausalConv3d(nn.Module):
    """Time padded in front with the first frame, space with zeros."""

    def __init__(self, cin, cout, kernel, stride=1, time_stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, kernel, stride=(time_stride, stride, stride))
        self.front = (kernel[0] - 1) + (1 - time_stride)
        self.padding = padding

    def forward(self, x):
        first = x[:, :, :1].repeat(1, 1, self.front, 1, 1) if self.front > 0 else x[:, :, :0]
        x = torch.cat([first, x], dim=2)
        p = self.padding
        return self.conv(F.pad(x, (p, p, p, p)))


class Pair(nn.Module):
    """A convolution over space, then one over time."""

    def __init__(self, cin, cout):
        super().__init__()
        self.space = CausalConv3d(cin, cout, (1, 3, 3), padding=1)
        self.time = CausalConv3d(cout, cout, (3, 1, 1))

    def forward(self, x):
        return self.time(self.space(x))


class FrameNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(1, c, eps=1e-6)

    def forward(self, x):
        b, c, t, h, w = x.shape
        x = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        return self.norm(x).reshape(b, t, c, h, w).permute(0, 2, 1, 3, 4)


def silu(x):
    return x * torch.sigmoid(x)


def point(cin, cout):
    return CausalConv3d(cin, cout, (1, 1, 1))


class ResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(cin), Pair(cin, cout)
        self.norm2, self.conv2 = FrameNorm(cout), Pair(cout, cout)
        self.nin_shortcut = point(cin, cout) if cin != cout else None

    def forward(self, x):
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Attention(nn.Module):
    def __init__(self, c, over_time):
        super().__init__()
        self.norm = FrameNorm(c)
        self.q, self.k, self.v, self.proj_out = (point(c, c) for _ in range(4))
        self.over_time = over_time

    def forward(self, x):
        b, c, t, h, w = x.shape
        n = self.norm(x)
        if self.over_time:
            tokens = lambda y: y.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)
        else:
            tokens = lambda y: y.permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
        q, k, v = tokens(self.q(n)), tokens(self.k(n)), tokens(self.v(n))
        scores = q @ k.transpose(1, 2) * c**-0.5
        if self.over_time:
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        y = scores.softmax(-1) @ v
        if self.over_time:
            y = y.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)
        else:
            y = y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return x + self.proj_out(y)


class Mid(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(c, c), ResBlock(c, c)
        self.space, self.time = Attention(c, False), Attention(c, True)

    def forward(self, x):
        return self.block_2(self.time(self.space(self.block_1(x))))


class Down(nn.Module):
    def __init__(self, c, space, time):
        super().__init__()
        self.conv1 = CausalConv3d(c, c, (1, 3, 3), stride=2) if space else None
        self.conv2 = CausalConv3d(c, c, (3, 1, 1), time_stride=2) if time else None
        self.conv3 = point(c, c)

    def forward(self, x):
        if self.conv1 is not None:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2), stride=(1, 2, 2))
        if self.conv2 is not None:
            x = torch.cat([x[:, :, :1], x], dim=2)
            x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1), stride=(2, 1, 1))
        return self.conv3(x)


class Up(nn.Module):
    def __init__(self, c, space, time):
        super().__init__()
        self.conv1 = CausalConv3d(c, c, (3, 1, 1)) if time else None
        self.conv2 = CausalConv3d(c, c, (1, 3, 3), padding=1) if space else None
        self.conv3 = point(c, c)

    def forward(self, x):
        if self.conv1 is not None:
            if x.shape[2] > 1:
                x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = self.conv1(x) + x
        if self.conv2 is not None:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = self.conv2(x) + x
        return self.conv3(x)


LOW, HIGH = torch.tensor([1.0, 1.0]) / math.sqrt(2), torch.tensor([1.0, -1.0]) / math.sqrt(2)
BANDS = [(t, h, w) for t in (LOW, HIGH) for h in (LOW, HIGH) for w in (LOW, HIGH)]


def haar(x, patch_size):
    x = torch.cat([x[:, :, :1].repeat_interleave(patch_size, dim=2), x[:, :, 1:]], dim=2)
    for _ in range(int(math.log2(patch_size))):
        c = x.shape[1]
        kernel = lambda t, h, w: torch.einsum("i,j,k->ijk", t, h, w).to(x)[None, None].repeat(c, 1, 1, 1, 1)
        x = torch.cat([F.conv3d(x, kernel(*band), stride=2, groups=c) for band in BANDS], 1) / (2 * math.sqrt(2))
    return x


def unhaar(x, patch_size):
    for _ in range(int(math.log2(patch_size))):
        c = x.shape[1] // 8
        kernel = lambda t, h, w: torch.einsum("i,j,k->ijk", t, h, w).to(x)[None, None].repeat(c, 1, 1, 1, 1)
        parts = [
            F.conv_transpose3d(part, kernel(*band), stride=2, groups=c) for part, band in zip(x.split(c, 1), BANDS)
        ]
        x = sum(parts) * (2 * math.sqrt(2))
    return x[:, :, patch_size - 1 :]


def steps(compression):
    return int(math.log2(compression)) - int(math.log2(CONFIG["patch_size"]))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [CONFIG["channels"] * m for m in CONFIG["channels_mult"]]
        space, time = steps(CONFIG["spatial_compression"]), steps(CONFIG["temporal_compression"])
        c = CONFIG["channels"]
        self.conv_in = Pair(3 * CONFIG["patch_size"] ** 3, c)
        self.blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(CONFIG["num_res_blocks"]):
                blocks.append(ResBlock(c, width))
                c = width
            self.blocks.append(blocks)
            if level + 1 < len(widths):
                self.downs.append(Down(c, level < space, level < time))
        self.mid = Mid(c)
        self.norm_out, self.conv_out = FrameNorm(c), Pair(c, CONFIG["z_channels"])
        self.quant_conv = point(CONFIG["z_channels"], CONFIG["embedding_dim"])

    def forward(self, x):
        x = self.conv_in(haar(x, CONFIG["patch_size"]))
        for level, blocks in enumerate(self.blocks):
            for block in blocks:
                x = block(x)
            if level < len(self.downs):
                x = self.downs[level](x)
        return self.quant_conv(self.conv_out(silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [CONFIG["channels"] * m for m in CONFIG["channels_mult"]]
        space, time = steps(CONFIG["spatial_compression"]), steps(CONFIG["temporal_compression"])
        c = widths[-1]
        self.post_quant_conv = point(CONFIG["embedding_dim"], CONFIG["z_channels"])
        self.conv_in, self.mid = Pair(CONFIG["z_channels"], c), Mid(c)
        self.blocks, self.ups = nn.ModuleDict(), nn.ModuleDict()
        for reverse, level in enumerate(reversed(range(len(widths)))):
            blocks = nn.ModuleList()
            for _ in range(CONFIG["num_res_blocks"] + 1):
                blocks.append(ResBlock(c, widths[level]))
                c = widths[level]
            self.blocks[str(level)] = blocks
            if level:
                time_up = 0 < reverse < time + 1
                self.ups[str(level)] = Up(c, time_up or (reverse < space and space > time), time_up)
        self.norm_out, self.conv_out = FrameNorm(c), Pair(c, 3 * CONFIG["patch_size"] ** 3)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(range(len(self.blocks))):
            for block in self.blocks[str(level)]:
                x = block(x)
            if level:
                x = self.ups[str(level)](x)
        return unhaar(self.conv_out(silu(self.norm_out(x))), CONFIG["patch_size"])


def fsq(z):
    """Codes and values of latents [..., D]."""
    levels = torch.tensor(CONFIG["levels"])
    half = (levels - 1).double() * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    q = bounded.round()
    basis = torch.cat([torch.ones(1, dtype=torch.long), levels.cumprod(0)[:-1]])
    margin = (bounded - bounded.floor() - 0.5).abs().min().item()
    return ((q + levels // 2).long() * basis).sum(-1), q / (levels // 2), margin


def put_conv(out, name, conv):
    weight, bias = conv.conv.weight.sum(2), conv.conv.bias  # summed over time
    out[f"{name}.weight"] = weight[:, :, 0, 0] if weight.shape[-1] == 1 else weight
    out[f"{name}.bias"] = bias


def put_pair(out, name, pair, inputs=None, fold=None):
    """`inputs` selects the live input channels; `fold` `[kept, all]` combines output channels."""
    time = pair.time.conv.weight.sum(2)[:, :, 0, 0]
    weight = torch.einsum("po,oihw->pihw", time, pair.space.conv.weight[:, :, 0])
    bias = time @ pair.space.conv.bias + pair.time.conv.bias
    if inputs is not None:
        weight = weight[:, inputs]
    if fold is not None:
        weight, bias = torch.einsum("po,oihw->pihw", fold, weight), fold @ bias
    out[f"{name}.weight"], out[f"{name}.bias"] = weight, bias


def put_norm(out, name, norm):
    out[f"{name}.weight"], out[f"{name}.bias"] = norm.norm.weight, norm.norm.bias


def put_block(out, name, block):
    for part in ("norm1", "norm2"):
        put_norm(out, f"{name}.{part}", getattr(block, part))
    for part in ("conv1", "conv2"):
        put_pair(out, f"{name}.{part}", getattr(block, part))
    if block.nin_shortcut is not None:
        put_conv(out, f"{name}.nin_shortcut", block.nin_shortcut)


def put_mid(out, name, mid):
    put_block(out, f"{name}.block_1", mid.block_1)
    put_block(out, f"{name}.block_2", mid.block_2)
    put_norm(out, f"{name}.attn_1.0.norm", mid.space.norm)
    for part in ("q", "k", "v", "proj_out"):
        put_conv(out, f"{name}.attn_1.0.{part}", getattr(mid.space, part))
    put_norm(out, f"{name}.attn_1.1.norm", mid.time.norm)
    project = mid.time.proj_out.conv.weight[:, :, 0, 0, 0]
    out[f"{name}.attn_1.1.proj_out.weight"] = project @ mid.time.v.conv.weight[:, :, 0, 0, 0]
    out[f"{name}.attn_1.1.proj_out.bias"] = project @ mid.time.v.conv.bias + mid.time.proj_out.conv.bias


def put_step(out, name, step):
    for part in ("conv1", "conv2", "conv3"):
        if getattr(step, part) is not None:
            put_conv(out, f"{name}.{part}", getattr(step, part))


def live_inputs():
    """Haar channels that are not high in time at any level, in order."""
    channels = [0, 1, 2]
    n = 3
    for _ in range(int(math.log2(CONFIG["patch_size"]))):
        channels = [band * n + c for band in range(4) for c in channels]
        n *= 8
    return channels


def odd_frame_fold():
    """The subtraction of the time bands at every level of the inverse, as a matrix over output channels."""
    n = 3 * CONFIG["patch_size"] ** 3
    fold = torch.eye(n, dtype=torch.float64).reshape(n, n)
    kept = 1  # bands already folded, before the channels of the next level
    for _ in range(int(math.log2(CONFIG["patch_size"]))):
        rest = fold.reshape(kept, 8, -1, n)
        fold = rest[:, :4] - rest[:, 4:]
        kept *= 4
        fold = fold.reshape(kept, -1, n)
    return fold.reshape(-1, n)


def folded(encoder, decoder):
    out = {}
    put_pair(out, "encoder.conv_in", encoder.conv_in, inputs=live_inputs())
    for level, blocks in enumerate(encoder.blocks):
        for i, block in enumerate(blocks):
            put_block(out, f"encoder.down.{level}.block.{i}", block)
        if level < len(encoder.downs):
            put_step(out, f"encoder.down.{level}.downsample", encoder.downs[level])
    put_mid(out, "encoder.mid", encoder.mid)
    put_norm(out, "encoder.norm_out", encoder.norm_out)
    put_pair(out, "encoder.conv_out", encoder.conv_out)
    put_conv(out, "quant_conv", encoder.quant_conv)
    put_conv(out, "post_quant_conv", decoder.post_quant_conv)
    put_pair(out, "decoder.conv_in", decoder.conv_in)
    put_mid(out, "decoder.mid", decoder.mid)
    for level, blocks in decoder.blocks.items():
        for i, block in enumerate(blocks):
            put_block(out, f"decoder.up.{level}.block.{i}", block)
        if level in decoder.ups:
            put_step(out, f"decoder.up.{level}.upsample", decoder.ups[level])
    put_norm(out, "decoder.norm_out", decoder.norm_out)
    put_pair(out, "decoder.conv_out", decoder.conv_out, fold=odd_frame_fold())
    return {name: tensor.detach().float().contiguous() for name, tensor in sorted(out.items())}


def main():
    torch.manual_seed(20250411)
    torch.set_default_dtype(torch.float64)
    encoder, decoder = Encoder(), Decoder()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            if ".norm" in name and name.endswith("weight") or name.startswith("norm_out.norm.weight"):
                parameter.data = 1 + 0.3 * torch.randn_like(parameter)
            elif parameter.dim() > 1:
                parameter.data *= 1.7  # else the biases outweigh what depends on the image
    encoder.quant_conv.conv.weight.data *= 2  # spreads the latents over the places of the quantizer
    with torch.no_grad():
        # Bytes, so that the input is the same in every precision.
        blocks = torch.randint(0, 200, (2, 3, 1, 8, 12)).repeat_interleave(4, 3).repeat_interleave(4, 4)
        bytes_ = blocks + torch.randint(0, 56, (2, 3, 1, 32, 48))
        latents = encoder((bytes_.double() / 255 - 0.5) / 0.5)
        codes, values, margin = fsq(latents.permute(0, 2, 3, 4, 1)[:, 0])
        pixels = decoder(values.permute(0, 3, 1, 2)[:, :, None])
    assert pixels.shape == bytes_.shape and margin > 1e-4, margin
    here = pathlib.Path(__file__).parent
    tensors = folded(encoder, decoder)
    save_file(tensors, here / "cosmos.safetensors")
    last = lambda x: [float(f"{v:.7g}") for v in x.permute(0, 2, 3, 4, 1).flatten().tolist()]
    golden = {
        "config": CONFIG,
        "shape": [2, 32, 48, 3],
        "bytes": bytes_.permute(0, 2, 3, 4, 1).flatten().tolist(),
        "latents": last(latents),
        "codes": codes.flatten(1).tolist(),
        "pixels": last(pixels),
    }
    (here / "cosmos.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"{sum(t.numel() for t in tensors.values())} weights, codes {codes.flatten().tolist()}, margin {margin:.2g}")
    print(f"latents {latents.std():.2f}, pixels {pixels.std():.2f}")


main()
