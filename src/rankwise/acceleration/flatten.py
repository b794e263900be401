"""Whether several rows laid end to end in one, told apart by their positions, compute as they do one by one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from rankwise.acceleration.recognise import is_fake
from rankwise.errors import RankwiseError

LENGTHS = (3, 4)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# Of the largest logit.


@torch.no_grad()
def can_flatten(model: Any) -> bool:
    """Tried with two short rows: their last logits in one row (no mask, position_ids from 0 each) equal those apart."""
    parameters = inspect.signature(type(model).forward).parameters
    like = next(model.parameters())
    if not {"position_ids", "logits_to_keep"} <= set(parameters) or is_fake(like):
        return False
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        apart = [_last_logits(model, [length]) for length in LENGTHS]
        together = _last_logits(model, list(LENGTHS))
    except RankwiseError:
        raise
    except Exception:  # noqa: BLE001  a model that cannot be asked this way gets padded rows
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    first, second = together[0, LENGTHS[0] - 1], together[0, -1]
    scale = max(float(logits.float().abs().max()) for logits in apart)
    limit = TOLERANCE.get(together.dtype, 0.0) * scale
    pairs = ((first, apart[0][0, -1]), (second, apart[1][0, -1]))
    return all(float((a.float() - b.float()).abs().max()) <= limit for a, b in pairs)


def _last_logits(model: Any, lengths: list[int]) -> Tensor:
    """Logits (1, sum of lengths, V) of rows laid end to end; row i holds the ids 1, 2, ... from i on."""
    device = next(model.parameters()).device
    start = 0 if len(lengths) > 1 else LENGTHS.index(lengths[0])
    ids = torch.cat([torch.arange(start + row + 1, start + row + 1 + length) for row, length in enumerate(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    given = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device), "use_cache": False}
    return model(**given).logits
