"""Attention for training, registered with transformers under the name "rankwise".

transformers' mask function for sdpa makes the mask, so padding, packing and sliding windows have the same meaning. On a
CPU, a mask in which every query sees one contiguous range of keys goes to the native kernel as ranges. Concatenated
rows have bounds in place of a mask (`rankwise.acceleration.rows`): on a CPU the native kernel takes them as ranges, on
a GPU torch's variable-length flash attention takes them. All other cases use sdpa.

Legend: B rows, H heads, Hkv key-value heads, L positions, Lk keys, D width of a head; bounds (1, 1, 1, N + 1) int32 the
cumulative lengths of N concatenated rows.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.compat.torch import writes_to
from rankwise.constants import ALIGNED, FLASH_WIDTH
from rankwise.ops import attention as kernel
from rankwise.ops import reference
from rankwise.ops.selection import as_autocast, card_capability, stands_on_card, transforms_functions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "rankwise"
_UNKNOWN_TO_THE_KERNEL = ("position_bias", "softcap", "s_aux")

# The least compute capability, and the dtypes, of torch's flash attention.
_FLASH_CAPABILITY = (8, 0)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)

Ranges = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `attention`: whether it got bounds in place of a mask, and its sliding window."""

    by_bounds: bool
    window: int | None


_calls: list[Call] | None = None


@contextmanager
def noting() -> Iterator[list[Call]]:
    """A context that yields a list to which every call of `attention` is appended."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def as_mask(cumulative_lengths: Tensor) -> Tensor:
    """Bounds of rows (N + 1,) int32 as a 4-dimensional mask, which transformers passes to every layer unchanged."""
    return cumulative_lengths.to(torch.int32)[None, None, None]


def ranges_as_mask(start: Tensor, end: Tensor) -> Tensor:
    """The range of keys of each of T queries, (T,) both, as a 4-dimensional mask (1, 1, 2, T)."""
    return torch.stack([start, end]).to(torch.int32)[None, None]


def is_bounds(mask: Tensor | None) -> bool:
    """Whether the mask holds bounds of rows."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2] == 1


def _is_ranges(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2] == 2


def register() -> None:
    """Make ``NAME`` an attention implementation that ``set_attn_implementation`` accepts."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def obstacle(dtype: torch.dtype, like: Tensor, head_width: int = 64) -> str | None:
    """Why attention would not skip masked keys for a model on the device of ``like``, or None."""
    if stands_on_card(like):
        return _card_obstacle(dtype, card_capability(like), head_width)
    if not like.is_cpu:
        return "the device has fast attention already"
    q = torch.empty(1, 2, 1, head_width, dtype=dtype)
    return kernel.obstacle(q, q, q)


def _card_obstacle(dtype: torch.dtype, capability: tuple[int, int], head_width: int) -> str | None:
    if dtype not in _FLASH_DTYPES:
        return f"flash attention needs a 16-bit dtype, and the model computes in {dtype}"
    if capability < _FLASH_CAPABILITY:
        return "flash attention needs compute capability 8.0, and this card has {}.{}".format(*capability)
    if head_width > FLASH_WIDTH or head_width % ALIGNED:
        return (
            f"flash attention needs head sizes up to {FLASH_WIDTH} in steps of {ALIGNED}, and these heads have "
            f"{head_width}"
        )
    # Its module imports torch's compiler, which takes a second.
    from torch.nn.attention import varlen

    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters):
        return f"the flash attention of torch {torch.__version__} does not support sliding windows or grouped heads"
    return None


def config_obstacle(config: PreTrainedConfig) -> str | None:
    """The feature of attention in a model's configuration that the kernel does not support, or None."""
    dropped = next((name for name in ("attention_dropout", "attn_pdrop") if getattr(config, name, 0)), None)
    if dropped is not None:
        return f"it has dropout on attention weights ({dropped} {getattr(config, dropped):g})"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its scores (attn_logit_softcapping)"
    return None


def head_width(config: PreTrainedConfig) -> int:
    """D of a configuration, 64 where it has neither a head size nor a number of heads."""
    try:
        width = getattr(config, "head_dim", None)
    except RuntimeError:
        # transformers raises this for a configuration whose layers differ in head size.
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
    # Rotary positions leave q and k in float32 with a 16-bit v, so all are cast before the kernel is chosen.
    query, key, value = map(as_autocast, (query, key, value))
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    window = kwargs.get("sliding_window")
    if _calls is not None:
        _calls.append(Call(is_bounds(attention_mask), window))
    special = (
        dropout != 0.0 or transforms_functions() or any(kwargs.get(name) is not None for name in _UNKNOWN_TO_THE_KERNEL)
    )
    covered = not special and not stands_on_card(q) and kernel.obstacle(q, k, v, scale=scaling) is None
    if is_bounds(attention_mask):
        assert attention_mask is not None
        B, L = q.shape[:2]
        if not special and _takes_flash(q, k, v):
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            longest = L if B > 1 else kwargs.get("max_length_q", L)
            return _flash(q, k, v, attention_mask, longest, scaling, window).unflatten(0, (B, L)), None
        # Rows of one length are masked alike.
        attention_mask = attention_mask[..., :2] if B > 1 else attention_mask
        if covered and B == 1:
            return kernel.attention(q, k, v, *bounds_as_ranges(attention_mask, L, window), scale=scaling), None
        attention_mask = bounds_as_mask(attention_mask, L, window)
    if _is_ranges(attention_mask):
        assert attention_mask is not None
        start, end = attention_mask[0].unbind(1)
        if not special and not stands_on_card(q):
            return kernel.attention(q, k, v, start, end, scale=scaling), None
        shape = q.shape[0], q.shape[1], k.shape[1]
        attention_mask = reference.visible(start, end, shape, q.device)[:, None]
    covered = covered and query.shape[2] > 1
    ranges = _ranges(module, query, key, attention_mask, is_causal) if covered else None
    if ranges is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return kernel.attention(q, k, v, *ranges, scale=scaling), None


def _takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return stands_on_card(q) and q.dtype in _FLASH_DTYPES and q.shape[-1] == v.shape[-1] <= FLASH_WIDTH


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """q (T, H, D), k and v (T, Hkv, D) -> (T, H, D). A window of W covers a token and the W - 1 before it."""
    from torch.nn.attention import varlen

    rows = bounds.flatten()
    sees = (-1 if window is None else window - 1, 0)
    grouped = q.shape[1] != k.shape[1]
    out = varlen.varlen_attn(q, k, v, rows, rows, longest, longest, scale=scale, window_size=sees, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


def _ranges(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """start and end (B, L) of the keys that each query sees; (None, None) if causal; None if these are no ranges."""
    if mask is not None:
        found = mask_ranges(mask)
        # One mask may stand for all rows of the batch.
        return found and (found[0].expand(len(query), -1), found[1].expand(len(query), -1))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        return (None, None) if query.shape[2] == key.shape[2] else None
    shape = (query.shape[0], query.shape[2])
    zeros = torch.zeros(shape, dtype=torch.int32)
    return zeros, torch.full(shape, key.shape[2], dtype=torch.int32)


# The last ranges, with the mask (and its version) and the window they belong to: every layer needs the same ones.
_last: tuple[weakref.ref[Tensor], tuple[int, int | None], Ranges | None] | None = None


def _remembered(tensor: Tensor, window: int | None, find: Callable[[], Ranges | None]) -> Ranges | None:
    global _last
    state = (writes_to(tensor), window)
    if _last is None or _last[0]() is not tensor or _last[1] != state:
        _last = (weakref.ref(tensor), state, find())
    return _last[2]


def mask_ranges(mask: Tensor) -> Ranges | None:
    """The ranges of a boolean mask (B, 1, L, Lk), or None where some query sees more than one range."""
    is_one = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
    return _remembered(mask, None, lambda: _find_ranges(mask) if is_one else None)


def bounds_as_ranges(bounds: Tensor, length: int, window: int | None) -> Ranges:
    """start and end (1, T) of the keys that each of T = ``length`` queries sees in its own row."""
    found = _remembered(bounds, window, lambda: _ranges_of_bounds(bounds, length, window))
    assert found is not None
    return found


def _ranges_of_bounds(bounds: Tensor, length: int, window: int | None) -> Ranges:
    cumulative = bounds.flatten()
    start = torch.repeat_interleave(cumulative[:-1], cumulative.diff(), output_size=length)
    end = torch.arange(1, length + 1, dtype=torch.int32, device=bounds.device)
    return (start if window is None else torch.maximum(start, end - window))[None], end[None]


def bounds_as_mask(bounds: Tensor, length: int, window: int | None) -> Tensor:
    """The equivalent boolean mask (1, 1, T, T), for attention that takes no ranges."""
    start, end = bounds_as_ranges(bounds, length, window)
    keys = torch.arange(length, device=bounds.device)
    return ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]


# Number of a mask's rows that are compared at once. For concatenated rows the mask is the square of all tokens, and the
# comparisons need three times as much.
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
    """The visible ranges of keys for each row of a mask (B, rows, Lk)."""
    count = seen.sum(-1, dtype=torch.int32)
    first = seen.byte().argmax(-1).to(torch.int32)
    end = torch.where(count > 0, first + count, first)
    keys = torch.arange(seen.shape[-1], dtype=torch.int32)
    as_ranges = (keys >= first[..., None]) & (keys < end[..., None])
    return (first, end) if torch.equal(as_ranges, seen) else None
