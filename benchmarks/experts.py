"""A QLoRA step of a mixture of experts: experts in 4 bits against experts left dense, on this CPU.

    python benchmarks/experts.py [--steps 5] [--dtype float32]

Random weights in the proportions of Qwen3-MoE (16 experts of which 4 see a token), two layers, 4 x 256 tokens, adapters
on all linear layers. Alternates between the variants, and prints the least time of each.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import rankwise as rw

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 768,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def prepared(dtype: str, *, dense_experts: bool, implementation: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**SIZES), dtype=getattr(torch, dtype), experts_implementation=implementation
    )
    left_out = ["experts"] if dense_experts else None
    rw.quantize(model, rw.Nf4Config(double_quant=True, modules_to_not_convert=left_out))
    rw.add_adapter(model, rw.LoraConfig(r=16, target_modules="all-linear"))
    rw.optimize_for_training(model)
    return model.train()


def step_seconds(model: Any, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    variants = {
        "experts in 4 bits": prepared(options.dtype, dense_experts=False, implementation="eager"),
        "dense experts, grouped_mm": prepared(options.dtype, dense_experts=True, implementation="grouped_mm"),
        "dense experts, eager": prepared(options.dtype, dense_experts=True, implementation="eager"),
    }
    ids = torch.randint(SIZES["vocab_size"], (4, 256))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.steps + 1):
        for name, model in variants.items():
            times[name].append(step_seconds(model, ids))
    for name, model in variants.items():
        size_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        print(f"{name:28} {min(times[name][1:]):6.2f} s a step, model {size_bytes / 1e6:7.1f} MB")


if __name__ == "__main__":
    main()
