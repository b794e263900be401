"""The config of a GGUF file, with the settings of its header that transformers leaves at their defaults."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import warn
from rankwise.foreign import Fields
from rankwise.models.folder import check_values
from rankwise.models.gguf_file import read_gguf_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# llama.cpp's architectures whose headers hold one number under each of these keys; others hold lists.
ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
# {key of the header: attribute of the config, where the config has it}.
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Numbers of layers of the Gemmas whose scores have another scale, as llama.cpp tells them.
LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """The config of the model in a GGUF file.

    Raises ModelError (RW310) for a damaged file. Warns RW321 of settings that transformers' model cannot have.
    """
    from transformers import AutoConfig

    header = read_gguf_header(path)
    architecture = str(header.metadata["general.architecture"])
    start = f"{architecture}."
    own = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
    check_values(own, path, "RW310")
    # From an empty folder, since transformers would read an adapter_config.json next to the file.
    with tempfile.TemporaryDirectory() as nowhere:
        config: PreTrainedConfig = AutoConfig.from_pretrained(nowhere, gguf_file=str(path.resolve()))
    ignored = sorted(name for name in header.tensors if name.startswith("rope_"))
    if architecture in ARCHITECTURES:
        _complete(config, architecture, own)
        ignored += _ignored(config, own)
    if ignored:
        warn(
            "RW321",
            f"{path} holds {', '.join(ignored)}, which transformers ignores, so the model's outputs are wrong, most of "
            "all for long rows; use the safetensors version.",
        )
    return config


def _complete(config: Any, architecture: str, own: Fields) -> None:
    for key, name in SETTINGS.items():
        if key in own and hasattr(config, name):
            setattr(config, name, own[key])
    # Gemma 3 rotates its sliding layers by a base of their own, without scaling.
    parameters = getattr(config, "rope_parameters", None) or {}
    rotary = parameters.get("full_attention", parameters)
    if own.get("rope.scaling.type") == "linear" and own.get("rope.scaling.factor"):
        rotary |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    if architecture == "phi3" and "rope.dimension_count" in own:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary["partial_rotary_factor"] = own["rope.dimension_count"] / head_dim
    if architecture in LARGE_GEMMAS:
        config.query_pre_attn_scalar = query_scale(architecture, config)


def query_scale(architecture: str, config: Any) -> int:
    """``query_pre_attn_scalar`` of a Gemma, which no header holds, as llama.cpp has it."""
    if config.num_hidden_layers == LARGE_GEMMAS[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _ignored(config: Any, own: Fields) -> list[str]:
    """The settings of the header, in words, that neither transformers nor `_complete` reads."""
    found = []
    if (kind := own.get("rope.scaling.type", "none")) not in ("none", "linear"):
        found.append(f"the {kind} scaling of its positions")
    window = own.get("attention.sliding_window")
    if window and not hasattr(config, "sliding_window") and window < (own.get("context_length") or window):
        found.append(f"a sliding window of {window:,} tokens")
    return found
