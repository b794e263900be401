"""From a layer and its adapter to the operator with hand-written gradients, where that operator applies.

It applies to whole layers over a dense, transposed (Conv1D) or 4-bit weight that is frozen, in that weight's dtype.
Everything else (fused projections of which parts adapt, autocast, compiled graphs, weights that train too) takes the
same formulas through autograd, in ``lora.py`` and ``dora.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import is_conv1d, is_own
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.selection import is_traced
from rankwise.quantization.linear import Linear4bit

SEEDS = 1 << 31


def frozen_weight(base: nn.Module, x: Tensor) -> Frozen | None:
    """The weight of ``base`` as the operator takes it, or None where it cannot."""
    layer: Any = base
    if is_traced() or layer.weight.requires_grad or not computes_in(x.dtype, x.device) or not is_own(base):
        return None
    if type(base) is Linear4bit:
        computes_as = layer.compute_dtype or x.dtype
        return Frozen(layer.packed) if layer.dtype is x.dtype is computes_as else None
    if layer.weight.dtype is not x.dtype:
        return None
    if type(base) is nn.Linear:
        return Frozen(layer.weight)
    return Frozen(layer.weight.T) if is_conv1d(base) else None


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` stay in it: no autocast, or one to that very dtype."""
    kind = device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype


def branch_of(adapter: Any, base: nn.Module, x: Tensor) -> Branch | None:
    """The operator's view of one adapted layer, or None where it does not apply."""
    frozen = frozen_weight(base, x) if adapter.parts is None else None
    if frozen is None:
        return None
    m = adapter.magnitude
    gain = None if m is None else adapter.fixed_gain(base)
    if m is not None and gain is None:
        return None
    A, B, bias = adapter.lora_A, adapter.lora_B, getattr(base, "bias", None)
    return Branch(frozen, adapter.scaling, A, B, bias, m, gain, comes_back=m is not None and adapter.comes_back)


def drawn_dropout(p: float, training: bool) -> Dropout | None:
    """Dropout with a seed drawn from torch's generator, so that a run's seed decides and a recomputation repeats it."""
    if not training or p == 0:
        return None
    return Dropout(p, int(torch.randint(SEEDS, ())))
