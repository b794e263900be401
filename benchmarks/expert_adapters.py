"""A LoRA step with adapters on stacked experts, ours against PEFT's `target_parameters`, on this CPU.

    python benchmarks/expert_adapters.py [--rounds 5] [--tokens 1024]

Random weights in float32, in the proportions of Qwen3-MoE (those of experts.py) and of Mixtral (8 wide experts of which
2 see a token), two layers, rank 16 on gate_up_proj and down_proj alone, the same adapter in both. Alternates between
them; prints the median of each, and what autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import peft
import results
import timing
import torch
from experts import SIZES, contender
from transformers import AutoConfig, AutoModelForCausalLM

import rankwise as rw

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": SIZES,
    "mixtral": {**SIZES, "intermediate_size": 2048, "num_local_experts": 8, "num_experts_per_tok": 2},
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def prepared(family: str, folder: str) -> dict[str, Any]:
    """The same adapter in both, by the folder that PEFT writes."""
    settings: dict[str, Any] = {"target_modules": [], "target_parameters": TARGETS, "init_lora_weights": False}
    theirs: Any = peft.get_peft_model(base(family), peft.LoraConfig(r=16, lora_alpha=32, **settings))
    theirs.save_pretrained(folder)
    ours = base(family)
    rw.load_adapter(ours, folder)
    return {"rankwise": ours.train(), "PEFT": theirs.train()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    print(
        ", ".join(f"{name} {version}" for name, version in results.versions(("torch", "transformers", "peft")).items())
    )
    ids = torch.randint(SIZES["vocab_size"], (4, given.tokens // 4))
    for family in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            models = prepared(family, folder)
        seconds = timing.alternate({name: contender(model, ids) for name, model in models.items()}, given.rounds)
        for name, median in timing.medians(seconds).items():
            kept = timing.saved_bytes(models[name], lambda: models[name](input_ids=ids, use_cache=False))  # noqa: B023
            print(f"{family:10} {name:9} {median:6.2f} s a step, {kept / 1e6:7.1f} MB kept for the backward pass")


if __name__ == "__main__":
    main()
