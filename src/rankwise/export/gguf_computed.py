"""Settings without a key in a GGUF header, for which llama.cpp has one fixed value for each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rankwise.errors import ModelError, some_of
from rankwise.models.gguf_file import query_scale

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
GATED: dict[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}
# {architecture: {setting of the config: the values that equal llama.cpp's}}.
COMPUTED: dict[str, dict[str, tuple[object, ...]]] = {
    "gemma2": {"hidden_activation": TANH_GELU},
    "gemma3": {"hidden_activation": TANH_GELU, "use_bidirectional_attention": (False,)},
    "gpt2": {
        "activation_function": TANH_GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "llama": GATED,
    "phi3": GATED,
    "qwen2": {**GATED, "use_sliding_window": (False,)},
    "qwen3": {**GATED, "use_sliding_window": (False,)},
    "qwen3moe": {**GATED, "use_sliding_window": (False,), "norm_topk_prob": (True,)},
}
# One layer in so many attends to all tokens; the others have a sliding window.
FULL_LAYERS = {"gemma2": 2, "gemma3": 6}
# The base of the rotary positions in layers with a window.
SLIDING_THETA = 10_000


def check_computed(architecture: str, config: Any) -> None:
    """Raise ModelError (RW746) for a setting that llama.cpp does not have, so that its logits would differ."""
    if wrong := [*_otherwise(architecture, config)]:
        raise ModelError(
            "RW746",
            f"llama.cpp's {architecture} does not have {some_of(wrong)}, so its answers would differ; merge with "
            "rankwise merge, and serve that folder with transformers or vLLM.",
        )


def _otherwise(architecture: str, config: Any) -> Iterator[str]:
    for name, values in COMPUTED[architecture].items():
        if (value := getattr(config, name, values[0])) not in values:
            yield f"{name}={value}"
    if architecture not in FULL_LAYERS:
        return
    scale = query_scale(architecture, config)
    if config.query_pre_attn_scalar != scale:
        yield f"query_pre_attn_scalar={config.query_pre_attn_scalar} (it has {scale})"
    every = FULL_LAYERS[architecture]
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [number % every == 0 for number in range(1, len(full) + 1)]:
        yield f"these layer_types (it has {every - 1} layers with a sliding window before each full one)"
    sliding = (config.rope_parameters or {}).get("sliding_attention") or {}
    if sliding.get("rope_theta", SLIDING_THETA) != SLIDING_THETA:
        yield f"a rope_theta of {sliding['rope_theta']:g} in layers with a sliding window"
