"""Tiny models of every family that is written as GGUF, each with a tokenizer, and adapters on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rankwise as rw
from gguf_writer import write_folder_gguf
from tiny_models import SIZES, tiny_gpt2, tiny_llama, tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def tiny(kind: str, **overrides: object):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **overrides})).eval()
    # Norms of ones and biases of zeros would hide a wrong transform.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.rand_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3)
    return model


GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 512}},
    "head_dim": 256,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 97,
}
# Two heads of values for each of keys.
QWEN35 = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
OF_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "per_layer_input_gate"]

# What transformers does not read of a GGUF has its default: head sizes, GPT-2's positions, the experts' width.
FAMILIES = {
    "llama": (tiny_llama, {}),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {}),
    "mistral": (lambda: tiny("mistral", head_dim=8, sliding_window=None), {}),
    "qwen2": (lambda: tiny("qwen2"), {}),
    "qwen3": (lambda: tiny("qwen3", head_dim=128), {}),
    "gemma2": (lambda: tiny("gemma2", head_dim=256, query_pre_attn_scalar=256), {}),
    "gemma3_text": (lambda: tiny("gemma3_text", head_dim=256, query_pre_attn_scalar=256), {}),
    "gemma4_text": (lambda: tiny("gemma4_text", **GEMMA4), {"target_modules": OF_LAYERS}),
    "phi": (lambda: tiny("phi"), {}),
    "phi3": (lambda: tiny("phi3"), {}),
    "qwen3_5_text": (lambda: tiny("qwen3_5_text", **QWEN35), {}),
    "smollm3": (lambda: tiny("smollm3"), {}),
    "gpt2": (lambda: tiny_gpt2(n_positions=1024), {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "mixtral": (lambda: tiny_moe("mixtral"), {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3_moe": (
        lambda: tiny_moe("qwen3_moe", moe_intermediate_size=768, head_dim=128),
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 97 tokens with one merge."""
    letters = [chr(code) for code in range(33, 33 + 92)]
    vocab = {text: index for index, text in enumerate(["<pad>", "<s>", "</s>", *letters, "ab", "Ġ"])}
    special = [
        {"id": index, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for text, index in vocab.items()
        if index < 3
    ]  # fmt: skip
    document = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def saved(kind: str, folder: Path, *, changes: Mapping[str, object] | None = None, **settings: object):
    """The adapted model; its base lies in ``folder``/base and its adapter in ``folder``/adapter. ``changes``: of its
    config's fields."""
    make, own = FAMILIES[kind]
    model = make()
    model.config.update(changes or {})
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **own, **settings}))
    for name, parameter in rw.adapter_parameters(model).items():
        if "magnitude" in name:
            # A magnitude starts at the norm of the weight, which would hide that it is left out.
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    rw.save_adapter(model, folder / "adapter", base_model=str(folder / "base"))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_gguf(folder: Path, kind: str = "f32") -> Path:
    return write_folder_gguf(folder / "base.gguf", folder / "base", kind)
