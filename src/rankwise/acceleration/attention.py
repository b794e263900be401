"""Attention for training, registered with transformers under the name "rankwise", and concatenated rows.

transformers' mask function for sdpa makes the mask, so padding, packing and sliding windows have the same meaning. On a
CPU, a mask in which every query sees one contiguous range of keys goes to the native kernel as ranges. All other cases
use sdpa, but for concatenated rows.

The collator of packed and of padding-free rows gives the start of each row (``cu_seq_lens_q``). transformers would make
a (T, T) mask from the positions. Here the bounds (`RowBounds`) replace the mask: on a CPU the native kernel takes them
as ranges, on a GPU torch's variable-length flash attention takes them. A right-padded batch on a GPU needs no mask at
all: with causal attention no token sees the padding after it.

Legend: B rows, H heads, Hkv key-value heads, L positions, Lk keys, D width of a head; N concatenated rows of T tokens
together.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.acceleration.layouts import KeyRanges, end_to_end
from rankwise.acceleration.parts import Undo, class_forward, is_free, probe, replace_forward
from rankwise.compat.torch import is_fake, writes_to
from rankwise.compat.transformers import names_windows, text_config
from rankwise.constants import ALIGNED, FLASH_WIDTH
from rankwise.ops import attention as kernel
from rankwise.ops import reference
from rankwise.ops.selection import as_autocast, card_capability, is_on_card, transforms_functions

NAME = "rankwise"
_UNKNOWN_TO_THE_KERNEL = ("position_bias", "softcap", "s_aux")

# The least compute capability, and the dtypes, of torch's flash attention.
_FLASH_CAPABILITY = (8, 0)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)

# The attribute of a tensor in the place of a mask that holds its meaning, and of a mask that holds its ranges.
_ATTRIBUTE = "rankwise_keys"


@dataclasses.dataclass(frozen=True)
class RowBounds:
    """Rows laid end to end: int32 (N + 1,), their cumulative lengths. No token sees a row other than its own."""

    cumulative: Tensor
    # {window: ranges}: all layers with the same window need the same ones.
    _found: dict[int | None, KeyRanges] = dataclasses.field(default_factory=dict)

    def ranges(self, length: int, window: int | None) -> KeyRanges:
        """start and end (1, T) for T = ``length`` queries."""
        if window not in self._found:
            bounds = self.cumulative
            start = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=length)
            end = torch.arange(1, length + 1, dtype=torch.int32, device=bounds.device)
            start = start if window is None else torch.maximum(start, end - window)
            self._found[window] = KeyRanges(start[None], end[None])
        return self._found[window]


def as_mask(keys: KeyRanges | RowBounds) -> Tensor:
    """A tensor that carries ``keys``: transformers passes a 4-dimensional mask to every layer unchanged."""
    device = (keys.start if isinstance(keys, KeyRanges) else keys.cumulative).device
    mask = torch.empty((1, 1, 1, 0), dtype=torch.int32, device=device)
    setattr(mask, _ATTRIBUTE, keys)
    return mask


def with_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model, whose attention mask may be `KeyRanges`."""
    keys = inputs.get("attention_mask")
    return {**inputs, "attention_mask": as_mask(keys)} if isinstance(keys, KeyRanges) else inputs


def carried_by(mask: Tensor | None) -> KeyRanges | RowBounds | None:
    """What a tensor in the place of a mask means; None for a real mask."""
    found = getattr(mask, _ATTRIBUTE, None)
    return found if isinstance(found, KeyRanges | RowBounds) else None


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `attention`: whether it got bounds in place of a mask, and its sliding window."""

    by_bounds: bool
    window: int | None


@contextmanager
def noting() -> Iterator[list[Call]]:
    """A context that yields a list to which every call of `attention` by a model is appended."""
    calls: list[Call] = []

    def noted(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        calls.append(Call(isinstance(carried_by(mask), RowBounds), kwargs.get("sliding_window")))
        return attention(module, q, k, v, mask, *args, **kwargs)

    AttentionInterface.register(NAME, noted)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, attention)


def register() -> None:
    """Make ``NAME`` an attention implementation that ``set_attn_implementation`` accepts."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def obstacle(dtype: torch.dtype, like: Tensor, head_width: int = 64) -> str | None:
    """Why attention would not skip masked keys for a model on the device of ``like``, or None."""
    if is_on_card(like):
        return _card_obstacle(dtype, card_capability(like), head_width)
    if not like.is_cpu:
        return "the device has fast attention already"
    q = torch.empty(1, 2, 1, head_width, dtype=dtype)
    return kernel.obstacle(q, q, q)


def _card_obstacle(dtype: torch.dtype, capability: tuple[int, int], head_width: int) -> str | None:
    if dtype not in _FLASH_DTYPES:
        return f"flash attention needs a 16-bit dtype, and the model computes in {dtype}"
    if capability < _FLASH_CAPABILITY:
        return "flash attention needs compute capability 8.0, and this GPU has {}.{}".format(*capability)
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
    """D of a configuration, 64 if it has neither a head size nor a number of heads."""
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
    window, keys = kwargs.get("sliding_window"), carried_by(attention_mask)
    special = (
        dropout != 0.0 or transforms_functions() or any(kwargs.get(name) is not None for name in _UNKNOWN_TO_THE_KERNEL)
    )
    covered = not special and not is_on_card(q) and kernel.obstacle(q, k, v, scale=scaling) is None
    if isinstance(keys, RowBounds):
        B, L = q.shape[:2]
        if not special and takes_flash(q, k, v):
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            longest = L if B > 1 else kwargs.get("max_length_q", L)
            return _flash(q, k, v, keys.cumulative, longest, scaling, window).unflatten(0, (B, L)), None
        # Rows of one length are masked alike.
        keys = (keys if B == 1 else RowBounds(keys.cumulative[:2])).ranges(L, window)
        if covered and B == 1:
            return kernel.attention(q, k, v, keys.start, keys.end, scale=scaling), None
    elif keys is not None and not special and not is_on_card(q):
        return kernel.attention(q, k, v, keys.start, keys.end, scale=scaling), None
    if keys is not None:
        shape = q.shape[0], q.shape[1], k.shape[1]
        attention_mask = reference.visible(keys.start, keys.end, shape, q.device)[:, None]
    covered = covered and query.shape[2] > 1
    ranges = _ranges(module, query, key, attention_mask, is_causal) if covered else None
    if ranges is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return kernel.attention(q, k, v, *ranges, scale=scaling), None


def takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return is_on_card(q) and q.dtype in _FLASH_DTYPES and q.shape[-1] == v.shape[-1] <= FLASH_WIDTH


def _flash(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """q (T, H, D), k and v (T, Hkv, D), rows (N + 1,) -> (T, H, D). A window of W covers W tokens."""
    from torch.nn.attention import varlen

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
        # One mask may be that of all rows of the batch.
        return found if found is None else (found.start.expand(len(query), -1), found.end.expand(len(query), -1))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        return (None, None) if query.shape[2] == key.shape[2] else None
    shape = (query.shape[0], query.shape[2])
    zeros = torch.zeros(shape, dtype=torch.int32)
    return zeros, torch.full(shape, key.shape[2], dtype=torch.int32)


def mask_ranges(mask: Tensor) -> KeyRanges | None:
    """The ranges of a boolean mask (B, 1, L, Lk), or None if some query sees more than one range. Kept on the mask,
    since every layer needs the same ones, until it is written to."""
    known: tuple[int, KeyRanges | None] | None = getattr(mask, _ATTRIBUTE, None)
    if known is None or known[0] != writes_to(mask):
        is_one = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
        known = writes_to(mask), _find_ranges(mask) if is_one else None
        setattr(mask, _ATTRIBUTE, known)
    return known[1]


# Number of a mask's rows that are compared at once. For concatenated rows the mask is the square of all tokens, and the
# comparisons need three times as much.
ROWS_AT_ONCE = 512


@torch.no_grad()
def _find_ranges(mask: Tensor) -> KeyRanges | None:
    found = []
    for rows in mask[:, 0].split(ROWS_AT_ONCE, dim=1):
        ranges = _ranges_of_rows(rows)
        if ranges is None:
            return None
        found.append(ranges)
    starts, ends = zip(*found)
    return KeyRanges(torch.cat(starts, dim=1), torch.cat(ends, dim=1))


def _ranges_of_rows(seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """start and end of the visible keys for each row of a mask (B, rows, Lk)."""
    count = seen.sum(-1, dtype=torch.int32)
    first = seen.byte().argmax(-1).to(torch.int32)
    end = torch.where(count > 0, first + count, first)
    keys = torch.arange(seen.shape[-1], dtype=torch.int32)
    as_ranges = (keys >= first[..., None]) & (keys < end[..., None])
    return (first, end) if torch.equal(as_ranges, seen) else None


# --- concatenated rows ---


# Lengths of the rows with which a model is tested.
LENGTHS = (3, 4)
# Admitted difference, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def flattening_obstacle(model: nn.Module) -> str | None:
    """Why rows cannot be concatenated, or None if they can.

    The test: the last logits of a short row must be the same behind another row and by itself.
    """
    parameters = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in parameters]
    if missing:
        return f"the model does not accept {missing[0]}"
    first = next(model.parameters())
    # Without values the signature decides.
    if is_fake(first) or first.is_meta:
        return None
    device = first.device
    tried = [probe_batch(LENGTHS, device), probe_batch(LENGTHS[1:], device, 1)]
    logits, why_not = probe(model, lambda: [model(**given).logits[0] for given in tried])
    if logits is None:
        return f"the model could not be run with positions ({why_not})"
    together, apart = logits
    return None if close(together[-1], apart[-1]) else "they get other logits than separately"


def probe_batch(lengths: Sequence[int], device: torch.device, first: int = 0) -> dict[str, Any]:
    """The batch that training makes of rows of these lengths: row i has the ids i + 1, i + 2, ..."""
    batch = end_to_end([range(row + 1, row + 1 + length) for row, length in enumerate(lengths, start=first)])
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**moved, "use_cache": False}


def close(a: Tensor, b: Tensor) -> bool:
    """Whether logits agree up to the rounding of their dtype."""
    limit = TOLERANCE.get(a.dtype, 0.0) * float(b.float().abs().max())
    return float((a.float() - b.float()).abs().max()) <= limit


def replace_masks(model: nn.Module, undo: Undo, *, bounds: bool) -> bool:
    """Let the model's decoder use the bounds of rows as a mask (with ``bounds``, which needs rankwise's attention), and
    on a GPU no mask for right padding. Returns whether it does.

    The test: the logits of two short rows must equal those under the model's own masks.
    """
    if not isinstance(model, PreTrainedModel) or not names_windows(model):
        return False
    decoder = model.base_model
    if decoder is model or not is_free(decoder):
        return False
    mine = Undo()
    change = _forward_with_bounds if bounds else _forward_without_padding

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return change(self, *args, **kwargs)

    # The class's signature stays visible. One function for each model, since signatures differ between families.
    forward.__signature__ = inspect.signature(type(decoder).forward)  # type: ignore[attr-defined]
    device = next(model.parameters()).device
    wanted = None if is_fake(next(model.parameters())) else _logits(model, device, bounds=bounds)
    replace_forward(decoder, forward, mine)
    if not _agrees(model, device, wanted, bounds=bounds):
        mine()
        return False
    undo.add(mine)
    return True


def _agrees(model: PreTrainedModel, device: torch.device, wanted: Tensor | None, *, bounds: bool) -> bool:
    with noting() as calls:
        found = _logits(model, device, bounds=bounds)
    if found is None or (wanted is None and not is_fake(found)):
        return False
    if bounds and not (calls and all(call.by_bounds for call in calls)):
        return False
    if bounds and has_window(model.config) and not any(call.window for call in calls):
        # The layers do not tell which of them have the window.
        return False
    return wanted is None or close(found, wanted)


def _logits(model: nn.Module, device: torch.device, *, bounds: bool) -> Tensor | None:
    """The logits of two rows, concatenated or right-padded; of padded rows, those at real tokens."""
    if bounds:
        return probe(model, lambda: model(**probe_batch(LENGTHS, device)).logits)[0]
    width = max(LENGTHS)
    ids = torch.arange(1, 1 + len(LENGTHS) * width, device=device).view(len(LENGTHS), width)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).to(device)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = probe(model, lambda: model(**given).logits, grad=True)[0]
    return logits if logits is None or is_fake(logits) else logits.detach()[mask]


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers attend to a window of the tokens only."""
    text = text_config(config)
    if getattr(text, "attention_chunk_size", None):
        return True
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)


def _forward_with_bounds(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    mask, bounds = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if mask is not None and _is_superfluous(mask):
        B, L = mask.shape
        rows = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=mask.device)
        kwargs["attention_mask"] = as_mask(RowBounds(rows))
    elif mask is None and bounds is not None and kwargs.get("past_key_values") is None:
        kwargs["attention_mask"] = as_mask(RowBounds(bounds.to(torch.int32)))
    return class_forward(self)(*args, **kwargs)


def _forward_without_padding(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    mask = kwargs.get("attention_mask")
    if mask is not None and _is_superfluous(mask):
        kwargs["attention_mask"] = None
    return class_forward(self)(*args, **kwargs)


def _is_superfluous(mask: Tensor) -> bool:
    """Whether a mask (B, L) only hides right padding, in a training step on a GPU. This waits for the GPU."""
    if mask.dim() != 2 or not torch.is_grad_enabled() or not is_on_card(mask):
        return False
    kept = mask.bool()
    # No row has a token after its padding.
    return is_fake(mask) or bool((kept[:, :-1] | ~kept[:, 1:]).all())
