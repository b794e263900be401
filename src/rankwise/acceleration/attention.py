"""Our attention on a CPU, registered with transformers under the name "rankwise".

transformers' own mask function for sdpa makes the mask, so padding, packing and sliding windows mean what they mean
there; a mask in which every query sees one contiguous range of keys is given to the kernel as that range. Whatever the
kernel does not cover goes to sdpa.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.compat.torch import writes_to
from rankwise.ops import attention as kernel
from rankwise.ops.selection import as_autocast, transforms_functions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "rankwise"
_UNKNOWN_TO_THE_KERNEL = ("position_bias", "softcap", "s_aux")

Ranges = tuple[Tensor, Tensor]


def register() -> None:
    """Make ``NAME`` an attention implementation that ``set_attn_implementation`` accepts."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def obstacle(dtype: torch.dtype, device_type: str, head_width: int = 64) -> str | None:
    """Why the kernel is of no use for such a model, or None."""
    if device_type != "cpu":
        return "the device has fast attention of its own"
    like = torch.empty(1, 2, 1, head_width, dtype=dtype)
    return kernel.obstacle(like, like, like)


def config_obstacle(config: PreTrainedConfig) -> str | None:
    """What a model's configuration asks of attention and the kernel does not compute, or None."""
    dropped = next((name for name in ("attention_dropout", "attn_pdrop") if getattr(config, name, 0)), None)
    if dropped is not None:
        return f"it drops weights while training ({dropped} {getattr(config, dropped):g})"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its scores (attn_logit_softcapping)"
    return None


def head_width(config: PreTrainedConfig) -> int:
    """D of a configuration, 64 where it names neither a width nor heads."""
    try:
        width = getattr(config, "head_dim", None)
    except RuntimeError:
        # transformers', of a configuration whose layers differ in it.
        width = None
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return int(width or (hidden // heads if heads and hidden else 64))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, L, D), key and value (B, Hkv, Lk, D) -> (B, L, H, D)."""
    # Rotary positions leave q and k in float32 beside a v in 16 bits; the kernel is asked about what it will get.
    query, key, value = map(as_autocast, (query, key, value))
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    covered = (
        dropout == 0.0
        and not transforms_functions()
        and query.shape[2] > 1
        and all(kwargs.get(name) is None for name in _UNKNOWN_TO_THE_KERNEL)
        and kernel.obstacle(q, k, v, scale=scaling) is None
    )
    ranges = _ranges(module, query, key, attention_mask, is_causal) if covered else None
    if ranges is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return kernel.attention(q, k, v, *ranges, scale=scaling), None


def _ranges(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """start and end (B, L) of the keys that each query sees, (None, None) where plainly causal; None if no ranges."""
    if mask is not None:
        return mask_ranges(mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        return (None, None) if query.shape[2] == key.shape[2] else None
    shape = (query.shape[0], query.shape[2])
    zeros = torch.zeros(shape, dtype=torch.int32)
    return zeros, torch.full(shape, key.shape[2], dtype=torch.int32)


_last: tuple[weakref.ref[Tensor], int, Ranges | None] | None = None


def mask_ranges(mask: Tensor) -> Ranges | None:
    """The ranges of a boolean mask (B, 1, L, Lk), or None for one that is no range everywhere.

    Remembered for the mask seen last: every layer of a model gets the same one.
    """
    global _last
    version = writes_to(mask)
    if _last is not None and _last[0]() is mask and _last[1] == version:
        return _last[2]
    ranges = _find_ranges(mask) if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1 else None
    _last = (weakref.ref(mask), version, ranges)
    return ranges


# Of rows laid end to end the mask alone is the square of all tokens; whole, its comparisons would be three more.
ROWS_AT_ONCE = 512


@torch.no_grad()
def _find_ranges(mask: Tensor) -> Ranges | None:
    found = []
    for rows in mask[:, 0].split(ROWS_AT_ONCE, dim=1):
        ranges = _ranges_of_rows(rows)
        if ranges is None:
            return None
        found.append(ranges)
    starts, ends = zip(*found)
    return torch.cat(starts, dim=1), torch.cat(ends, dim=1)


def _ranges_of_rows(seen: Tensor) -> Ranges | None:
    """Of (B, rows, Lk)."""
    count = seen.sum(-1, dtype=torch.int32)
    first = seen.byte().argmax(-1).to(torch.int32)
    end = torch.where(count > 0, first + count, first)
    keys = torch.arange(seen.shape[-1], dtype=torch.int32)
    as_ranges = (keys >= first[..., None]) & (keys < end[..., None])
    return (first, end) if torch.equal(as_ranges, seen) else None
