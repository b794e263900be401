"""A QLoRA step of a mixture of experts: experts in 4 bits against experts left dense, on this CPU.

    python benchmarks/experts.py [--rounds 5] [--dtype float32]

Random weights in the proportions of Qwen3-MoE (16 experts of which 4 see a token), two layers, 4 x 256 tokens, adapters
on all linear layers. Alternates between the variants, and prints the median of each.
"""

from __future__ import annotations

import argparse
from typing import Any

import results
import timing
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


def contender(model: Any, ids: torch.Tensor) -> timing.Prepared:
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward(), model.zero_grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    models = {
        "experts in 4 bits": prepared(given.dtype, dense_experts=False, implementation="eager"),
        "dense experts, grouped_mm": prepared(given.dtype, dense_experts=True, implementation="grouped_mm"),
        "dense experts, eager": prepared(given.dtype, dense_experts=True, implementation="eager"),
    }
    ids = torch.randint(SIZES["vocab_size"], (4, 256))
    seconds = timing.alternate({name: contender(model, ids) for name, model in models.items()}, given.rounds)
    print(", ".join(f"{name} {version}" for name, version in results.versions(("torch", "transformers")).items()))
    for name, median in timing.medians(seconds).items():
        size_bytes = sum(tensor.nbytes for tensor in models[name].state_dict().values())
        print(f"{name:28} {median:6.2f} s a step, model {size_bytes / 1e6:7.1f} MB")


if __name__ == "__main__":
    main()
