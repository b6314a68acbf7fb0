"""Golden values of low-rank adapters: PEFT on the tiny Qwen2 of decoder.py, with random A and B.

Made with torch 2.11.0, transformers 5.23.0, peft 0.21.2; run `python lora.py` in this folder after decoder.py.
Writes lora_all/ and lora_two/ as PEFT saves them, and lora.json (values).
`python lora.py FOLDER` loads an adapter folder that the tests wrote, with its logits.json, and prints the difference.
"""

import json
import os
import sys

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
with open("decoder.json") as file:
    golden = json.load(file)
ROWS, SLICE, TEMPERATURE = golden["rows"], golden["slice"], golden["temperature"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base():
    with open("decoder_config.json") as file:
        config = Qwen2Config(**json.load(file), attn_implementation="eager")
    model = Qwen2ForCausalLM(config).float().eval()
    missing = model.load_state_dict(load_file("decoder.safetensors"), strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    model.tie_weights()
    return model


def logits_of(model):
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    return model(input_ids=ids, attention_mask=mask).logits


def short(tensor, digits):
    return [float(f"{x:.{digits}g}") for x in tensor.detach().flatten().tolist()]


def case(name, rank, alpha, targets):
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base(), config).eval()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 2 * len(targets)
    with torch.no_grad():
        for value in adapters.values():
            value.copy_(torch.randn_like(value) * 0.3)
    logits = logits_of(model)
    loss = 0.0
    for (row, at), target, weight in zip(golden["places"], golden["targets"], golden["weights"]):
        law = torch.log_softmax(logits[row, at, SLICE[0]:SLICE[1]] / TEMPERATURE, -1)
        loss = loss + weight * law[target - SLICE[0]]
    loss.backward()
    model.save_pretrained(name)
    os.remove(f"{name}/README.md")
    gradients = {n.replace(".default.weight", ".weight"): short(p.grad, 5) for n, p in adapters.items()}
    return {
        "logits": [short(logits[r, : len(row)], 7) for r, row in enumerate(ROWS)],
        "loss": loss.item(), "gradients": gradients,
    }


if len(sys.argv) > 1:
    model = PeftModel.from_pretrained(base(), sys.argv[1]).eval()
    logits = logits_of(model)
    with open(f"{sys.argv[1]}/logits.json") as file:
        ours = json.load(file)
    pairs = [(torch.tensor(got), logits[r, : len(ROWS[r])].flatten()) for r, got in enumerate(ours)]
    print("largest difference", max((a - b).abs().max().item() for a, b in pairs),
          "of logits up to", max(b.abs().max().item() for _, b in pairs),
          "; the base differs by", max((logits_of(base())[r, : len(ROWS[r])].flatten() - a).abs().max().item()
                                       for r, (a, _) in enumerate(pairs)))
else:
    cases = {"lora_all": case("lora_all", 4, 6, ALL), "lora_two": case("lora_two", 3, 8, ["q_proj", "v_proj"])}
    made_by = f"lora.py, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    with open("lora.json", "w") as file:
        json.dump({"made_by": made_by, "cases": cases}, file)
