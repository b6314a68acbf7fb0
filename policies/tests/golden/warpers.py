"""Golden values of the sampling law: transformers' own logits processors on random logits.

Made with torch 2.11.0, transformers 5.23.0; run `python warpers.py` in this folder. Writes warpers.json:
log-probabilities after guidance (UnbatchedClassifierFreeGuidanceLogitsProcessor's formula is checked through the class
itself), temperature, top-k, top-p and min-p, in the order of `GenerationMixin`; null where a choice is cut away.
"""

import json

import torch
import transformers
from transformers import (
    LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

N = 24
generator = torch.Generator().manual_seed(3)


class Unconditional(torch.nn.Module):
    """Stands for the model of the negative branch: gives the same logits whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, *args, **kwargs):
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.logits[None, None])


cases = []
for guidance in [1.0, 0.0, 2.5, 6.0]:
    for law in [
        {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2},
        {"temperature": 1.6, "top_k": 12, "top_p": 0.85, "min_p": 0.05}, {"temperature": 0.4, "top_p": 0.99},
    ]:
        conditional = 2.0 * torch.randn(N, generator=generator)
        unconditional = 2.0 * torch.randn(N, generator=generator)
        scores = conditional[None]
        if guidance != 1.0:
            processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(guidance, Unconditional(unconditional))
            scores = processor(torch.zeros(1, 1, dtype=torch.long), scores)
        chain = LogitsProcessorList()
        if "temperature" in law:
            chain.append(TemperatureLogitsWarper(law["temperature"]))
        if "top_k" in law:
            chain.append(TopKLogitsWarper(law["top_k"]))
        if "top_p" in law:
            chain.append(TopPLogitsWarper(law["top_p"]))
        if "min_p" in law:
            chain.append(MinPLogitsWarper(law["min_p"]))
        log_probs = torch.log_softmax(chain(None, scores), -1)[0]
        cases.append({
            "guidance": guidance, "temperature": law.get("temperature", 1.0), "top_k": law.get("top_k"),
            "top_p": law.get("top_p", 1.0), "min_p": law.get("min_p", 0.0),
            "conditional": conditional.tolist(), "unconditional": unconditional.tolist(),
            "log_probs": [None if x == float("-inf") else x for x in log_probs.tolist()],
        })

with open("warpers.json", "w") as file:
    json.dump({"made_by": f"warpers.py, torch {torch.__version__}, transformers {transformers.__version__}",
               "cases": cases}, file)
