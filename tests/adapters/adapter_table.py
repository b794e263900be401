"""The table of adapters, bases and dtypes on which the properties are tested."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny_models import tiny_gpt2, tiny_llama

ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"v_proj": 4, "c_proj": 4}},
    "dora_bias": {"use_dora": True, "bias": "lora_only"},
    "whole_head": {"modules_to_save": ["lm_head"]},
    "layer_1": {"layers_to_transform": [1]},
    "fused_lora": {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}},
    "fused_dora": {
        "target_modules": ["c_attn", "c_fc"],
        "enable_lora": {"c_attn": [False, True, True]},
        "use_dora": True,
    },
    "embedding": {"target_modules": ["q_proj", "c_attn", "embed_tokens", "wte"]},
    "embedding_dora": {"target_modules": ["q_proj", "c_attn", "embed_tokens", "wte"], "use_dora": True},
}
BASES = {
    "llama": lambda: tiny_llama(attention_bias=True),
    "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "llama_tied": ["q_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
DTYPES = (torch.float32, torch.bfloat16)
# Tied weights matter to what trains an embedding or the head; in bfloat16 bases take turns.
CASES = [
    pytest.param(adapter, base, dtype, id=f"{adapter}-{base}-{str(dtype).removeprefix('torch.')}")
    for (i, adapter), (j, base), dtype in itertools.product(enumerate(ADAPTERS), enumerate(BASES), DTYPES)
    if not (adapter.startswith("fused") and base != "gpt2")
    and not (base == "llama_tied" and adapter not in ("dora", "whole_head", "embedding", "embedding_dora"))
    and (dtype is torch.float32 or (i + j) % 2 == 0)
]


def build(adapter: str, base: str, dtype: torch.dtype, **settings) -> tuple[nn.Module, rw.LoraConfig]:
    model = BASES[base]().to(dtype)
    given = {"r": 3, "lora_alpha": 8, "target_modules": TARGETS[base], **ADAPTERS[adapter], **settings}
    # The table above names the layers of all families.
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    given["target_modules"] = [name for name in given["target_modules"] if name in there]
    return model, rw.LoraConfig(**given)
