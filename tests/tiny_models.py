"""Models of random weights, small enough for exact tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama of random weights, small enough for exact tests."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).eval()


def tiny_gpt2(seed: int = 0, **overrides: object) -> GPT2LMHeadModel:
    """A two-layer GPT-2 of random weights: Conv1D layers, fused q, k, v, tied head."""
    settings = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(seed)
    config = GPT2Config(**{**settings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **overrides})
    return GPT2LMHeadModel(config).eval()


def tiny_falcon(seed: int = 0, **overrides: object) -> FalconForCausalLM:
    """A two-layer Falcon of random weights: its linear layers are a subclass of their own."""
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": True}
    torch.manual_seed(seed)
    config = FalconConfig(**{**settings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **overrides})
    return FalconForCausalLM(config).eval()


_MOE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES_OF_EXPERTS = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    # Transposed, with biases, gate and up interleaved.
    "gpt_oss": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_moe(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A two-layer mixture of experts of random weights and biases; families that are not above need sizes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_MOE, **_FAMILIES_OF_EXPERTS.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_with_tokenizer(model: PreTrainedModel, tokenizer_folder: Path, folder: Path) -> Path:
    """``model`` as a folder, with the tokenizer of another one."""
    model.save_pretrained(folder)
    for file in tokenizer_folder.glob("token*"):
        shutil.copy(file, folder)
    return folder


def tiny_bert(seed: int = 0, **overrides: object) -> BertModel:
    """A two-layer BERT of random weights, without dropout: an encoder with learned positions and a pooler."""
    settings = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "eos_token_id")}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(seed)
    return BertModel(BertConfig(**{**settings, **dropout, **overrides})).eval()


# --- gpt-oss' experts in MXFP4 ---

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks uint8 (E, out, in / 32, 16), scales uint8 (E, out, in / 32)) nearest to (E, in, out)."""
    parts = W.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = parts.abs().amax(dim=3).clamp(min=2**-20).log2().floor() - 2
    x = parts / torch.exp2(exponents)[..., None]
    codes = (x.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (x < 0)
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def save_in_mxfp4(model: PreTrainedModel, folder: Path) -> Path:
    """A gpt-oss as a folder whose experts are in MXFP4, as it is shipped."""
    model.save_pretrained(folder)
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4(tensor)
            state |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
