"""Golden values of AdamW: three steps of torch.optim.AdamW. Run: python adamw.py > adamw.json (PyTorch 2.11.0)."""

import json

import torch

torch.manual_seed(0)
w = torch.randn(1, 6).requires_grad_()
optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
params, gradients = [w.detach().flatten().tolist()], []
for _ in range(3):
    w.grad = torch.randn(1, 6)
    gradients.append(w.grad.flatten().tolist())
    optimizer.step()
    params.append(w.detach().flatten().tolist())
print(json.dumps({"torch": torch.__version__, "params": params, "gradients": gradients}))
