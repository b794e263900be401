"""The metadata of a GGUF made from a transformers folder: sizes, rotary settings, tokenizer.

Keys and their counterparts in config.json are transformers' own table, by which it reads GGUF files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import ModelError
from rankwise.export.gguf_computed import check_computed
from rankwise.export.gguf_names import GgufNames
from rankwise.foreign import JsonObject, read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

# What that table leaves out, where a config has it.
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
# What the expression of a byte-level tokenizer contains: the name by which llama.cpp knows it.
PRE_TOKENIZERS = {
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2",
}


def write_header(writer: Any, names: GgufNames, folder: Path) -> dict[str, Tensor]:
    """All metadata but the file's type; gives tensors that only GGUF has. Raises ModelError: RW744 to RW746."""
    config = names.config
    check_computed(names.architecture, config)
    for key, value in _sizes(names).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{names.architecture}.{key}", value)
    _add_tokenizer(writer, folder, int(config.vocab_size))
    return _rotary(writer, config)


def _sizes(names: GgufNames) -> dict[str, int | float]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    config = names.config
    known: Any = GGUF_CONFIG_MAPPING[str(config.model_type).removesuffix("_text").replace("mixtral", "mistral")]
    table = {**EXTRA_KEYS, **known}
    found = {key: getattr(config, name, None) for key, name in table.items() if name}
    if names.architecture == "gpt2":
        found["feed_forward_length"] = config.n_inner or 4 * config.n_embd
        found["context_length"] = config.n_positions
    for name in ("rope.freq_base", "rope.dimension_count"):
        found.pop(name, None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if names.architecture != "gpt2":
        found["rope.dimension_count"] = int(head_dim * _rotary_parameters(config).get("partial_rotary_factor", 1.0))
    return {key: value for key, value in found.items() if isinstance(value, int | float) and value is not True}


def _rotary(writer: GGUFWriter, config: PreTrainedConfig) -> dict[str, Tensor]:
    import gguf

    own = _rotary_parameters(config)
    if not own:
        return {}
    kind, theta = own.get("rope_type", "default"), float(own["rope_theta"])
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(own["factor"]))
    elif kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        plain = theta ** -(torch.arange(len(scaled)) / len(scaled))
        return {"rope_freqs.weight": (plain / scaled).float()}
    elif kind != "default":
        raise ModelError(
            "RW745",
            f"rotary positions of type {kind} are not converted to GGUF here; merge with rankwise merge, and convert "
            "that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    return {}


def _rotary_parameters(config: PreTrainedConfig) -> JsonObject:
    parameters = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 rotates its sliding layers by a base of their own, which llama.cpp knows.
    return dict(parameters.get("full_attention", parameters))


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    import gguf

    document = read_object(folder / "tokenizer.json", error=ModelError, code="RW744", constants=True)
    model = document.get("model") or {}
    tokens: dict[int, tuple[str, int]] = {}
    pieces = bool(model.get("byte_fallback"))
    for text, index in (model.get("vocab") or {}).items():
        kind = gguf.TokenType.BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else gguf.TokenType.NORMAL
        tokens[index] = (text, kind)
    for added in document.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    listed = [tokens.get(index, (f"[PAD{index}]", gguf.TokenType.UNUSED)) for index in range(vocabulary)]
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=vocabulary)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(model, [text for text, _ in listed]))
        writer.add_add_space_prefix(_prepends_space(document))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(document))
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([int(kind) for _, kind in listed])
    special.add_to_gguf(writer, quiet=True)


def _scores(model: JsonObject, texts: list[str]) -> list[float]:
    """A piece's score in SentencePiece's sense: the sooner its parts merge, the higher."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(model.get("merges") or ()):
        rank.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), index)
    return [-float(rank.get(text, 0 if len(text) == 1 else len(rank))) for text in texts]


def _splitters(document: JsonObject) -> list[JsonObject]:
    """The steps that split text before merging."""
    stated = document.get("pre_tokenizer") or {}
    return stated.get("pretokenizers") or [stated]


def _prepends_space(document: JsonObject) -> bool:
    """Whether a text gets a space before its first word: by the normalizer, or while it is split."""
    splits = (part for part in _splitters(document) if part.get("type") == "Metaspace")
    return "prepend" in str(document.get("normalizer")).lower() or any(
        part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True) for part in splits
    )


def _pre_tokenizer(document: JsonObject) -> str:
    """llama.cpp's name of how text is split before merging. Raises ModelError (RW744) for one that is not known."""
    parts = _splitters(document)
    expressions = [str((part.get("pattern") or {}).get("Regex", "")) for part in parts]
    for wanted, name in PRE_TOKENIZERS.items():
        if any(wanted in text for text in expressions):
            return name
    kinds = [part.get("type") for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    raise ModelError(
        "RW744",
        f"llama.cpp's name of this model's tokenizer, which splits text by {', '.join(map(str, kinds)) or 'nothing'}, "
        "is not known here; merge with rankwise merge, and convert that folder with llama.cpp's convert_hf_to_gguf.py, "
        "or give the model's own GGUF with --base-gguf.",
    )
