"""Whether several rows laid end to end in one, told apart by their positions, compute as they do one by one."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from rankwise.acceleration.probe import probe
from rankwise.compat.torch import is_fake

LENGTHS = (3, 4)
# Of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def flattening_obstacle(model: nn.Module) -> str | None:
    """Why rows cannot be laid end to end, or None where they can.

    Tried with two short rows: their last logits in one row (no mask, position_ids from 0 each) must equal those apart.
    """
    parameters = inspect.signature(type(model).forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in parameters]
    if missing:
        return f"the model takes no {missing[0]}"
    if is_fake(next(model.parameters())):
        return "a fake model's values cannot be compared"
    rows = [LENGTHS[0]], [LENGTHS[1]], [*LENGTHS]
    logits, why_not = probe(model, lambda: [_last_logits(model, lengths) for lengths in rows])
    if logits is None:
        return f"the model could not be tried with positions ({why_not})"
    *apart, together = logits
    limit = TOLERANCE.get(together.dtype, 0.0) * max(float(each.float().abs().max()) for each in apart)
    pairs = ((together[0, LENGTHS[0] - 1], apart[0][0, -1]), (together[0, -1], apart[1][0, -1]))
    if all(float((a.float() - b.float()).abs().max()) <= limit for a, b in pairs):
        return None
    return "rows laid end to end get other logits than apart"


def _last_logits(model: nn.Module, lengths: list[int]) -> Tensor:
    """Logits (1, sum of lengths, V) of rows laid end to end; row i holds the ids 1, 2, ... from i on."""
    device = next(model.parameters()).device
    start = 0 if len(lengths) > 1 else LENGTHS.index(lengths[0])
    ids = torch.cat([torch.arange(start + row + 1, start + row + 1 + length) for row, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    given = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device), "use_cache": False}
    return model(**given).logits
