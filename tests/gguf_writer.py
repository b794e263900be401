"""Write a tiny model of transformers' as a GGUF, as llama.cpp's converter does with real ones, so that adapters have a
base there.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from rankwise.foreign import read_json
from rankwise.models.gguf_file import GgufNames

# What transformers' table of keys leaves out.
EXTRA_KEYS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Of Qwen 3.5's linear attention.
QWEN35_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}


def write_folder_gguf(path: Path, folder: Path, kind: str = "f32") -> Path:
    """The model in ``folder``, its matrices of ``kind`` where rows are whole blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = GgufNames(model.config)
    writer = gguf.GGUFWriter(path, names.architecture)
    for key, value in _sizes(names).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{names.architecture}.{key}", value)
    _add_tokenizer(writer, folder, names.config.vocab_size)
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for name, W in model.state_dict().items():
        if name == tied or name.endswith(("inv_freq", "embed_scale", ".attn.bias", ".attn.masked_bias")):
            continue
        if names.adds_one(name):
            W = W + 1
        if names.architecture == "gpt2" and ".h." in name and W.dim() == 2:
            W = W.T
        W = names.columns(name.removesuffix(".weight"), names.rows(name, W))
        if ".linear_attn." in name:
            name, W = _of_linear_attention(name, W)
        for part in names.of(name):
            # The decay has no suffix.
            _add_tensor(writer, part.name.replace("ssm_a.weight", "ssm_a"), part.of(W), kind)
    if names.architecture == "qwen35":
        writer.add_array("qwen35.rope.dimension_sections", [2, 1, 1, 0])
    if names.architecture == "gemma4":
        writer.add_array("gemma4.attention.sliding_window_pattern", [True, False])
        # Of the last layer's heads a quarter turns.
        turned = np.where(np.arange(256) < 64, 1.0, 1e30).astype(np.float32)
        writer.add_tensor("rope_freqs.weight", turned)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _of_linear_attention(name: str, W: torch.Tensor) -> tuple[str, torch.Tensor]:
    """llama.cpp's form of what is no matrix: the decay itself, one filter a channel."""
    if name.endswith("A_log"):
        return name, -W.exp()
    return name.replace("dt_bias", "dt_proj.bias"), W.squeeze(1) if "conv1d" in name else W


def _add_tensor(writer: Any, name: str, W: torch.Tensor, wanted: str) -> None:
    kind = gguf.GGMLQuantizationType[wanted.upper()]
    if W.dim() < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        kind = gguf.GGMLQuantizationType.F32
    elif W.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    data = gguf.quantize(np.ascontiguousarray(W.numpy()), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert data.nbytes == prod(W.shape) // block * size
    writer.add_tensor(name, data, raw_dtype=kind)


def _sizes(names: GgufNames) -> dict[str, int | float]:
    config = names.config
    kind = str(config.model_type).removesuffix("_text").replace("mixtral", "mistral")
    # transformers has no table for these, whose keys are those of others.
    known: Any = GGUF_CONFIG_MAPPING[{"smollm3": "llama", "phi": "phi3", "qwen3_5": "qwen3"}.get(kind, kind)]
    if names.architecture == "qwen35":
        known = {**GGUF_CONFIG_MAPPING["qwen3"], **QWEN35_KEYS}
    if names.architecture == "gemma4":
        config.allow_global_per_layer_attribute_access = True
        known = {**known, "attention.key_length": "", "embedding_length_per_layer_input": "hidden_size_per_layer_input"}
    found = {key: getattr(config, name, None) for key, name in {**EXTRA_KEYS, **known}.items() if name}
    if names.architecture == "gpt2":
        found |= {"feed_forward_length": config.n_inner or 4 * config.n_embd, "context_length": config.n_positions}
    else:
        found["rope.dimension_count"] = getattr(config, "head_dim", None) or config.hidden_size // (
            config.num_attention_heads
        )
        parameters = config.rope_parameters
        found["rope.freq_base"] = float(parameters.get("full_attention", parameters)["rope_theta"])
        found["rope.dimension_count"] *= parameters.get("partial_rotary_factor", 1)
        found["rope.dimension_count"] = int(found["rope.dimension_count"])
    if names.architecture == "qwen35":
        found["ssm.inner_size"] = config.linear_num_value_heads * config.linear_value_head_dim
        found["full_attention_interval"] = 4
    if names.architecture == "phi2":
        found["attention.layer_norm_epsilon"] = config.layer_norm_eps
    if names.architecture == "gemma4":
        found |= {f"attention.{side}_length": 512 for side in ("key", "value")} | {"attention.shared_kv_layers": 0}
        found |= {f"attention.{side}_length_swa": 256 for side in ("key", "value")} | {"rope.freq_base_swa": 1e4}
        found |= {"rope.dimension_count": 512, "rope.dimension_count_swa": 256, "rope.freq_base": 1e6}
    return {key: value for key, value in found.items() if isinstance(value, int | float) and value is not True}


def _add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """A byte-level one, as the tests' are."""
    vocab = read_json(folder / "tokenizer.json")["model"]["vocab"]
    special = {token["content"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    texts = {index: text for text, index in vocab.items()}
    listed = [texts.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(listed)
    kinds = gguf.TokenType
    writer.add_token_types([int(kinds.CONTROL if text in special else kinds.NORMAL) for text in listed])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)
