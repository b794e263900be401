"""float32 against bfloat16 adapters over a bfloat16 base: losses of the same run at several learning rates.

    python benchmarks/adapter_dtype.py MODEL_FOLDER IDS.safetensors

IDS holds token ids (1, L) under `train_ids`. Prints a table; the last column is the share of A's entries that the last
step changed.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rankwise as rw

STEPS = 300
RATES = (2e-4, 5e-5, 2e-5)


def train(folder: str, ids: Tensor, dtype: str, rate: float) -> tuple[float, float]:
    """(final loss, share of A's entries that the last step changed)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    rw.add_adapter(model, rw.LoraConfig(r=16, lora_alpha=32, adapter_dtype=dtype))
    parameters = rw.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
    pairs = [parameter for key, parameter in parameters.items() if "lora_A" in key]
    for _ in range(STEPS):
        before = [pair.detach().clone() for pair in pairs]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    changed = sum((old != new).sum().item() for old, new in zip(before, pairs))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    return loss.item(), changed / sum(pair.numel() for pair in pairs)


def main() -> None:
    folder, file = sys.argv[1:]
    ids = load_file(file)["train_ids"]
    print(f"torch {torch.__version__}, {STEPS} steps\n")
    print("| learning rate | float32 | base (bfloat16) | A changed: float32 | A changed: base |\n|---|---|---|---|---|")
    for rate in RATES:
        full, base = (train(folder, ids, dtype, rate) for dtype in ("float32", "base"))
        print(f"| {rate:g} | {full[0]:.4f} | {base[0]:.4f} | {full[1]:.0%} | {base[1]:.0%} |")


if __name__ == "__main__":
    main()
