"""Golden files for policies/tests/cosmos_import.rs, made and run by NVIDIA's own modules.

NVIDIA's causal discrete video tokenizer in its published configuration (`discrete_video`), 6 channels wide instead of
128, with random weights: saved as NVIDIA publishes it (`encoder.jit` and `decoder.jit`, traced, in bfloat16,
and `model.pt`, a state dict, here in float16), with the codes and pixels that the modules give in float32. Deviations:
1. every weight is a number that bfloat16, float16 and float32 hold exactly, so that all files are one tokenizer;
2. `implicit_codebook`, which no forward pass reads, is cut to 8 rows in the files, for their size;
3. the archives have no `.debug_pkl` entries, which hold the paths of this program's machine.

    python policies/tests/golden/cosmos_nvidia.py --cosmos FOLDER

FOLDER is a checkout of NVIDIA's Cosmos-Tokenizer, which is run and not copied. Written with Python 3.11, torch 2.11.0
and einops 0.8.
"""

import argparse
import copy
import json
import pathlib
import sys
import types
import warnings
import zipfile

import torch

HERE = pathlib.Path(__file__).parent / "cosmos_nvidia"
SIZES = [(256, 256), (256, 384), (512, 512)]
KEPT_PIXELS = 2000


def nvidia(folder):
    """NVIDIA's class and configuration; their log package is not needed for either."""
    log = types.ModuleType("loguru")
    log.logger = types.SimpleNamespace(info=lambda *_, **__: None)
    sys.modules.setdefault("loguru", log)
    sys.path.insert(0, folder)
    from cosmos_tokenizer.networks.configs import discrete_video
    from cosmos_tokenizer.networks.discrete_video import CausalDiscreteVideoTokenizer

    return CausalDiscreteVideoTokenizer, discrete_video


def draw_weights(model):
    """Lively activations: variance-keeping weights, biases and scales that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 0.1 if name.startswith("decoder.conv_out.1") else 1.3  # pixels mostly in [-1, 1]
                parameter.copy_(torch.randn_like(parameter) * gain / parameter[0].numel() ** 0.5)
            elif ".norm.weight" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            parameter.copy_(((parameter * 4096).round() / 4096).bfloat16())


def picture(height, width):
    """Blocks of colour with a fine grain `[H, W, 3]`; the test computes the same bytes."""
    y = torch.arange(height)[:, None, None]
    x = torch.arange(width)[None, :, None]
    c = torch.arange(3)[None, None, :]
    coarse = ((x // 8) * 37 + (y // 8) * 91 + c * 53 + (x // 8) * (y // 8) * 29) % 200
    return coarse + (x * 7 + y * 13 + c * 5) % 56


def video(image):
    """Bytes `[H, W, 3]` as SimpleAR gives them to the encoder, `[1, 3, 1, H, W]`."""
    return ((image.float() / 255 - 0.5) / 0.5).permute(2, 0, 1)[None, :, None]


def save(model, folder):
    """The files as they are published."""
    small = copy.deepcopy(model)
    small.quantizer.implicit_codebook = small.quantizer.implicit_codebook[:8].clone()
    torch.save({name: tensor.half() for name, tensor in small.state_dict().items()}, folder / "model.pt")
    image = video(picture(32, 32))
    codes = small.encode(image)[0]
    for name, module, example in [("encoder", small.encoder_jit(), image), ("decoder", small.decoder_jit(), codes)]:
        traced = torch.jit.trace(module, example)
        torch.jit.save(traced.to(torch.bfloat16), str(folder / f"{name}.jit"))


def without_paths(path):
    """Takes the places in source files out of an archive."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            if not entry.filename.endswith(".debug_pkl"):
                entry.extra = b""
                archive.writestr(entry, data)


def margin(model, image):
    """How far the nearest latent is from the boundary of its cell, in places."""
    double = copy.deepcopy(model).to(dtype=torch.float64)
    latents = double.quant_conv(double.encoder(video(image).double())).permute(0, 2, 3, 4, 1)
    bounded = double.quantizer.bound(latents)
    return (bounded - bounded.floor() - 0.5).abs().min().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cosmos", required=True, help="NVIDIA's Cosmos-Tokenizer")
    tokenizer, config = nvidia(parser.parse_args().cosmos)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(20250411)
    model = tokenizer(**{**config, "channels": 6}).eval().to(dtype=torch.float32)
    draw_weights(model)
    HERE.mkdir(exist_ok=True)
    cases = []
    with torch.no_grad():
        for height, width in SIZES:
            image = picture(height, width)
            codes = model.encode(video(image))[0]
            pixels = model.decode_code(codes)[0, :, 0].permute(1, 2, 0).flatten()
            kept = torch.randperm(pixels.numel())[:KEPT_PIXELS].sort().values
            cases.append(
                {
                    "size": [height, width],
                    "codes": codes.flatten().tolist(),
                    "places": kept.tolist(),
                    "pixels": [float(f"{value:.7g}") for value in pixels[kept].tolist()],
                }
            )
            closest, distinct = margin(model, image), len(set(cases[-1]["codes"]))
            assert closest > 1e-5 and distinct > len(cases[-1]["codes"]) // 4
            print(f"{height} x {width}: margin {closest:.2g}, {distinct} different codes, pixels {pixels.std():.2f}")
        save(model, HERE)
        for name in ("encoder.jit", "decoder.jit"):
            without_paths(HERE / name)
    (HERE / "golden.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")


if __name__ == "__main__":
    main()
