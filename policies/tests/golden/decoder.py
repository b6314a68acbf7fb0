"""Golden values of the decoder: Hugging Face's Qwen2ForCausalLM with random weights at a tiny width.

Made with torch 2.11.0, transformers 5.23.0, safetensors 0.8.0; run `python decoder.py` in this folder.
Writes decoder.safetensors (weights), decoder_config.json and decoder.json (values).
"""

import json

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

SLICE = (20, 90)
TEMPERATURE = 0.8
ROWS = [[3, 14, 15, 92, 65, 35, 89, 79, 32], [38], [46, 26, 43, 38, 32], [79, 50, 28, 84, 19, 71, 69]]

torch.manual_seed(1)
torch.set_num_threads(1)
config = Qwen2Config(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, attn_implementation="eager",
)
model = Qwen2ForCausalLM(config).float().eval()
with torch.no_grad():
    for name, value in model.named_parameters():
        # Wide enough that every operation matters; norms and biases away from their usual 1 and 0.
        spread = 0.5 if name.startswith("model.embed") else 0.3
        value.copy_(torch.randn_like(value) * spread + (1.0 if "norm" in name else 0.0))

longest = max(map(len, ROWS))
ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
logits = model(input_ids=ids, attention_mask=mask).logits

# Every position of every row predicts some token of the slice; weights differ in sign and size.
places, targets, weights, log_probs, entropies = [], [], [], [], []
for r, row in enumerate(ROWS):
    for p in range(len(row)):
        n = len(places)
        law = torch.log_softmax(logits[r, p, SLICE[0]:SLICE[1]] / TEMPERATURE, -1)
        target = SLICE[0] + (7 * n + 3) % (SLICE[1] - SLICE[0])
        places.append([r, p]); targets.append(target); weights.append(((n % 5) - 1.7) / 3)
        log_probs.append(law[target - SLICE[0]])
        entropies.append(-(law.exp() * law).sum().item())
loss = sum(w * l for w, l in zip(weights, log_probs))
loss.backward()

with torch.no_grad():
    greedy = []
    for row in ROWS:
        row = list(row)
        for _ in range(24):
            law = model(input_ids=torch.tensor([row])).logits[0, -1, SLICE[0]:SLICE[1]]
            best = torch.topk(law, 2).values
            assert best[0] - best[1] > 1e-3, "a tie would make the continuation ambiguous; change the seed"
            row.append(SLICE[0] + int(law.argmax()))
        greedy.append(row[-24:])

save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, "decoder.safetensors")
with open("decoder_config.json", "w") as file:
    json.dump({**config.to_dict(), "transformers_version": transformers.__version__}, file, indent=1)


def short(tensor, digits):
    return [float(f"{x:.{digits}g}") for x in tensor.detach().flatten().tolist()]


with open("decoder.json", "w") as file:
    json.dump({
        "made_by": f"decoder.py, torch {torch.__version__}, transformers {transformers.__version__}",
        "rows": ROWS, "slice": SLICE, "temperature": TEMPERATURE,
        "logits": [short(logits[r, : len(row)], 7) for r, row in enumerate(ROWS)],
        "places": places, "targets": targets, "weights": weights,
        "log_probs": [l.item() for l in log_probs], "entropies": entropies,
        "gradients": {n: short(p.grad, 5) for n, p in model.named_parameters()},
        "greedy": greedy,
    }, file)
