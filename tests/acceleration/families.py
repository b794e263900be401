"""Tiny models of random weights: of several families, and small configurations of every causal one."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny_models import SIZES, tiny_gpt2, tiny_llama

WIDTHS = {
    32: "hidden_size n_embd d_model word_embed_proj_dim",
    48: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    16: "q_lora_rank kv_lora_rank sliding_window",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_key_value_heads "
    "num_experts_per_tok eos_token_id",
    64: "max_position_embeddings n_positions",
    97: "vocab_size vocab_size_per_layer_input",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: width for width, names in WIDTHS.items() for name in names.split()}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "ministral": {"head_dim": 8},
}

MAKERS: dict[str, Any] = {
    "llama": tiny_llama,
    "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=5.0, attn_logit_softcapping=None, sliding_window=8)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=3.0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": tiny_gpt2,
}


def family(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MAKERS[name]().to(dtype).train()


def small_config(family: str, **changes: Any) -> Any:
    """Raises whatever a family's configuration has against being small."""
    plain = transformers.CONFIG_MAPPING[family]().get_text_config()
    had = plain.to_dict()
    chosen = {name: width for name, width in SMALL.items() if had.get(name) is not None}
    heads = had.get("num_key_value_heads")
    if heads is not None and heads in (1, had.get("num_attention_heads")):
        chosen["num_key_value_heads"] = 1 if heads == 1 else chosen["num_attention_heads"]
    return type(plain)(**{**chosen, **SPECIAL.get(family, {}), **changes})


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        for field in [name for name in vars(module) if name == "p" or "dropout" in name]:
            if isinstance(getattr(module, field), float):
                setattr(module, field, 0.0)
    return model
