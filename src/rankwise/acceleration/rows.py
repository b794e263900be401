"""Concatenated rows, separated by their bounds instead of by a mask over all pairs of tokens.

The collator of packed and of padding-free rows gives the start of each row (``cu_seq_lens_q``). transformers would make
a (T, T) mask from the positions. Here the bounds replace the mask, since transformers passes a 4-dimensional mask to
every layer's attention unchanged. A right-padded batch on a GPU needs no mask at all: with causal attention no token
sees the padding after it.

Legend: T tokens of all rows together, N rows, bounds (1, 1, 1, N + 1) int32 the cumulative lengths of the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rankwise.acceleration import attention
from rankwise.acceleration.replace import Undo, class_forward, is_free, probe, replace_forward
from rankwise.compat.torch import is_fake
from rankwise.compat.transformers import names_windows, text_config
from rankwise.ops.selection import stands_on_card

# Lengths of the rows with which a model is tested.
LENGTHS = (3, 4)
# Admitted difference, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def flattening_obstacle(model: nn.Module) -> str | None:
    """Why rows cannot be concatenated, or None where they can.

    The test: the last logits of a short row must be the same behind another row and by itself.
    """
    parameters = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in parameters]
    if missing:
        return f"the model does not accept {missing[0]}"
    if is_fake(next(model.parameters())):
        return "a fake model's values cannot be compared"
    device = next(model.parameters()).device
    tried = [end_to_end(LENGTHS, device), end_to_end(LENGTHS[1:], device, 1)]
    logits, why_not = probe(model, lambda: [model(**given).logits[0] for given in tried])
    if logits is None:
        return f"the model could not be run with positions ({why_not})"
    together, apart = logits
    return None if close(together[-1], apart[-1]) else "they get other logits than separately"


def end_to_end(lengths: Sequence[int], device: torch.device, first: int = 0) -> dict[str, Tensor | int]:
    """The batch that training makes of rows of these lengths: row i has the ids i + 1, i + 2, ..."""
    ids = [torch.arange(row + 1, row + 1 + length) for row, length in enumerate(lengths, start=first)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


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
    with attention.noting() as calls:
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
        return probe(model, lambda: model(**end_to_end(LENGTHS, device)).logits)[0]
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
        kwargs["attention_mask"] = attention.as_mask(torch.arange(0, B * L + 1, L, device=mask.device))
    elif mask is None and bounds is not None and kwargs.get("past_key_values") is None:
        kwargs["attention_mask"] = attention.as_mask(bounds)
    return class_forward(self)(*args, **kwargs)


def _forward_without_padding(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    mask = kwargs.get("attention_mask")
    if mask is not None and _is_superfluous(mask):
        kwargs["attention_mask"] = None
    return class_forward(self)(*args, **kwargs)


def _is_superfluous(mask: Tensor) -> bool:
    """Whether a mask (B, L) only hides right padding, in a training step on a GPU. This waits for the GPU."""
    if mask.dim() != 2 or not torch.is_grad_enabled() or not stands_on_card(mask):
        return False
    kept = mask.bool()
    # No row has a token after its padding.
    return is_fake(mask) or bool((kept[:, :-1] | ~kept[:, 1:]).all())
