"""Configs of every family with realistic proportions and few layers, and models of them on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from rankwise.models.folder import auto_class
from rankwise.models.load import skeleton_of
from rankwise.planning import MemoryEstimate, Workload
from rankwise.planning.extend import cut_of, layers_path, traced, with_layers
from rankwise.planning.memory import assembled
from rankwise.planning.trace import Traced

COMMON = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 8192}
EYES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES |= {"image_size": 56, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model"}
MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 768, "num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "gemma": {"vocab_size": 256000, "tie_word_embeddings": True, **GEMMA},
    "gemma2": {"vocab_size": 256000, "tie_word_embeddings": True, **GEMMA, "sliding_window": 4096},
    "gemma3_text": {"vocab_size": 262144, "tie_word_embeddings": True, **GEMMA, "sliding_window": 512},
    "gemma3": {},
    "idefics3": {},
    "smolvlm": {},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "smollm3": {"vocab_size": 128256, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "gpt2": {"n_positions": 1024, "vocab_size": 50257, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 1408},
    "qwen3_moe": {**MOE, "head_dim": 128},
}
NAMES_OF_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json's content."""
    if family == "gemma3":
        return {"text_config": config_of("gemma3_text", **changes), "vision_config": EYES, "model_type": family}
    if family in ("idefics3", "smolvlm"):
        eyes = {name: value for name, value in EYES.items() if name not in ("vision_use_head", "model_type")}
        return {"text_config": config_of("llama", **changes), "vision_config": eyes, "model_type": family}
    config = {**COMMON, **FAMILIES[family], **changes, "model_type": family}
    if family != "gpt2":
        return config
    kept = ("vocab_size", "n_positions", "bos_token_id", "eos_token_id", "model_type", "pad_token_id")
    dropped = {name: value for name, value in changes.items() if name.endswith("_pdrop")}
    renamed = {ours: config[theirs] for theirs, ours in NAMES_OF_GPT2.items()}
    return dropped | {name: config[name] for name in kept} | renamed | {"tie_word_embeddings": True}


def skeleton(family: str, **changes: Any) -> PreTrainedModel:
    """The model of that config, without memory."""
    config = config_of(family, **changes)
    config.pop("model_type")
    with torch.device("meta"):
        return auto_class(family).from_config(AutoConfig.for_model(family, **config))


def trace(model: PreTrainedModel, method: str, workload: Workload, *, fake: bool = True, **more: Any) -> MemoryEstimate:
    """The estimate from one trace of all layers."""

    def whole(_: Sequence[int]) -> Traced:
        return Traced(copy.deepcopy(model), method, workload, fake=fake, **more)

    return assembled(method, workload, traced(model, method, workload, None, whole))


def extended(model: PreTrainedModel, method: str, workload: Workload) -> MemoryEstimate:
    """The estimate from traces of a few layers; of a model that has too few, from one of all."""
    path = layers_path(model)

    def part(numbers: Sequence[int]) -> Traced:
        return Traced(with_layers(model, path, numbers), method, workload, layers=path)

    return assembled(method, workload, traced(model, method, workload, cut_of(model), part))


def of_config(config: dict[str, Any], method: str, workload: Workload) -> MemoryEstimate:
    """The estimate for a config.json's content."""
    return extended(skeleton_of(AutoConfig.for_model(**config)), method, workload)
